"""How frozen networks are run: pixels' gradient alone, bfloat16 inside and float32 outside, in stretches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, tiny_teacher

from dvinv import DvinvError, from_nnx, invert
from dvinv.config import InversionConfig, Stage, Weights
from dvinv.inversion.programs import Programs, in_precision
from dvinv.runtime.devices import make_mesh

KEY, LABELS = jax.random.key(3), np.arange(6) % 3
STAGE = Stage(4, 0.1, resolution=7, beta1=0.5, beta2=0.9, augmentation='crop', jitter=1, flip=True)
CONFIG = InversionConfig((STAGE,), Weights(feature=0.3, total_variation=1e-2, competition=0.5))


def _windows(hlo: str) -> set[str]:
    """What slides over what in the convolutions of a program: kernels, or for a gradient of weights whole pictures."""
    return {*re.findall(r'convolution\(.*window={size=(\w+)', hlo)}


def _compiled_step(teacher, **changes) -> str:
    programs = Programs(teacher, dataclasses.replace(CONFIG, **changes), make_mesh(1))
    state = programs.restart(STAGE, programs.begin(KEY[None], len(LABELS)))
    arguments = state, programs.labels(LABELS[None]), programs.variables, None
    return programs.advance(STAGE, 1).lower(*arguments).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize('changes', [{}, {'precision': 'bfloat16'}, {'recompute': 2}], ids=str)
def test_no_convolution_of_the_step_makes_a_gradient_of_weights(teacher, changes):
    assert _windows(_compiled_step(teacher, **changes)) == {'3x3'}


def test_the_check_above_knows_a_gradient_of_weights(teacher):
    x = np.zeros((6, *IMAGE_SHAPE), np.float32)
    loss = jax.jit(jax.grad(lambda variables: teacher.apply_fn(variables, x).sum()))
    assert _windows(loss.lower(teacher.variables).compile().as_text()) == {'3x3', '8x8'}


def _inversion(teacher, student, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return invert(teacher, LABELS, config, KEY, student_fn=student.apply_fn, student_variables=student.variables)


@pytest.fixture(scope='module')
def usual(teacher, student):
    return _inversion(teacher, student)


@pytest.mark.slow
def test_stretches_make_the_same_images(teacher, student, usual):
    result = _inversion(teacher, student, recompute=3)
    np.testing.assert_allclose(result.images, usual.images, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_makes_about_the_same_images(teacher, student, usual):
    result = _inversion(teacher, student, precision='bfloat16')
    for term, values in usual.metrics.items():
        assert result.metrics[term].dtype == np.float32
        np.testing.assert_allclose(result.metrics[term], values, rtol=0.05, err_msg=term)
    assert 0 < np.abs(result.images - usual.images).mean() < 0.05


def test_in_bfloat16_moments_and_statistics_stay_float32(teacher):
    seen = {}

    def spied(tap):
        def spy(variables, x):
            logits, moments = tap(variables, x)
            seen.update(x=x, logits=logits, **variables, moments=moments)
            return logits, moments

        return spy

    spied_teacher = dataclasses.replace(teacher, tap=teacher.tap.rewritten(spied))
    programs = Programs(spied_teacher, dataclasses.replace(CONFIG, precision='bfloat16'), make_mesh(1))
    state = programs.restart(STAGE, programs.begin(KEY[None], len(LABELS)))
    jax.eval_shape(programs.advance(STAGE, 1), state, programs.labels(LABELS[None]), programs.variables, None)
    dtypes = {name: {leaf.dtype for leaf in jax.tree.leaves(value)} for name, value in seen.items()}
    assert dtypes['x'] == dtypes['logits'] == dtypes['params'] == {jnp.dtype(jnp.bfloat16)}
    assert dtypes['moments'] == dtypes['batch_stats'] == {jnp.dtype(np.float32)}


@pytest.mark.slow
def test_a_teacher_answers_in_the_precision_of_a_training(teacher):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *IMAGE_SHAPE)), jnp.float32)
    assert in_precision(teacher, 'float32') is teacher
    logits, features = in_precision(teacher, 'bfloat16').features(teacher.variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, features))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(logits.astype(np.float32), teacher.apply_fn(teacher.variables, x), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_an_nnx_teacher_runs_the_same_ways(student):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    teacher = from_nnx(Net(nnx.Rngs(0)), image_shape=IMAGE_SHAPE, mean=(0.4, 0.6), std=(0.2, 0.3))
    usual = _inversion(teacher, student)
    for changes, tolerance in (({'recompute': 2}, 1e-4), ({'precision': 'bfloat16'}, 0.3)):
        np.testing.assert_allclose(_inversion(teacher, student, **changes).images, usual.images, atol=tolerance)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'precision': 'half'}, "precision is 'half'; choose one of float32, bfloat16"),
        ({'recompute': -1}, 'recompute is -1'),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(DvinvError, match=words):
        invert(tiny_teacher(), LABELS, dataclasses.replace(CONFIG, **changes), KEY)
