"""Several devices: whole batches each without a word between them, or one batch split with the losses of the whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SHAPE

from dvinv import DvinvError, balanced_labels, invert
from dvinv.config import InversionConfig, Stage, Weights
from dvinv.inversion import make_inverter
from dvinv.inversion.programs import _over_batches, _over_one_batch
from dvinv.inversion.step import InversionState, initial_parameters, make_step
from dvinv.runtime.devices import AXIS, make_mesh, training_mesh

BATCH, BATCHES = 8, 8
STAGE = Stage(3, 0.1, resolution=5, beta1=0.5, beta2=0.9, augmentation='crop', jitter=2, flip=True, noise=0.1)
WEIGHTS = Weights(feature=0.3, first_bn_multiplier=2.0, total_variation=1e-2, l2=1e-2, competition=0.5)
COLLECTIVE = 'all-reduce|all-gather|all-to-all|reduce-scatter|collective'


def _keys(numbers):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.asarray(numbers))


def _run_batches(teacher, student, parameterization, devices, numbers=range(BATCHES)):
    """Images [n, B, H, W, C] of numbered batches, `devices` at a time."""
    config = InversionConfig((STAGE,), WEIGHTS, parameterization=parameterization)
    run = make_inverter(teacher, config, make_mesh(devices), student.apply_fn)
    rounds = np.asarray(numbers).reshape(-1, devices)
    labels = [[balanced_labels(i, BATCH, 3) for i in numbers] for numbers in rounds]
    return np.concatenate(
        [run(_keys(numbers), label, student.variables).images for numbers, label in zip(rounds, labels, strict=True)]
    )


@pytest.fixture(scope='module', params=['pixels', 'fourier'])
def parameterization(request):
    return request.param


@pytest.fixture(scope='module')
def batches(teacher, student, parameterization):
    return _run_batches(teacher, student, parameterization, 1)


@pytest.mark.optimized
@pytest.mark.parametrize('devices', [2, 8])
def test_batches_are_the_same_bytes_on_any_number_of_devices(teacher, student, parameterization, batches, devices):
    assert _run_batches(teacher, student, parameterization, devices).tobytes() == batches.tobytes()


@pytest.mark.optimized
def test_no_image_is_drawn_twice(batches):
    starts = np.stack([initial_parameters(key, BATCH, IMAGE_SHAPE)[0] for key in _keys(range(BATCHES))])
    for images in (starts, batches):
        assert len({image.tobytes() for image in images.reshape(-1, *IMAGE_SHAPE)}) == BATCHES * BATCH


@pytest.mark.optimized
def test_the_number_of_a_batch_decides_not_its_place(teacher, student, parameterization, batches):
    assert _run_batches(teacher, student, parameterization, 2, [5, 2]).tobytes() == batches[[5, 2]].tobytes()


def _first_step(teacher, student, parameterization, bn_stats, devices):
    """(compiled program of one iteration, its arguments) on a batch of noise; a batch a device in device mode."""
    config = InversionConfig((STAGE,), WEIGHTS, parameterization=parameterization, bn_stats=bn_stats)
    mesh, split = make_mesh(devices), bn_stats == 'global'
    step = make_step(teacher, config, STAGE, student.apply_fn, AXIS if split else None)
    program = (_over_one_batch if split else _over_batches)(mesh)(step, weights=2)
    blank, key = initial_parameters(jax.random.key(1), BATCH, IMAGE_SHAPE)
    state = InversionState(blank, STAGE.make_optimizer().init(blank), np.int32(0), key)
    per_batch = (state, balanced_labels(0, BATCH, 3))
    if not split:
        per_batch = jax.tree.map(lambda a: jnp.stack([a] * devices), per_batch)
    arguments = (*per_batch, teacher.variables, student.variables)
    return program.lower(*arguments).compile(), arguments


def _collectives(compiled):
    return re.findall(rf' ({COLLECTIVE})[\w-]*\(', compiled.as_text())


@pytest.mark.slow
def test_devices_with_batches_of_their_own_never_communicate(teacher, student, parameterization):
    assert not _collectives(_first_step(teacher, student, parameterization, 'device', 8)[0])


@pytest.fixture(scope='module')
def undivided(teacher, student, parameterization):
    return _loss_and_gradient(*_first_step(teacher, student, parameterization, 'global', 1))


def _loss_and_gradient(compiled, arguments):
    """(metrics, gradient to the parameters) of the first step; Adam's first moment is (1 - beta1) times the gradient."""
    # A compiled program takes its arguments as they were laid out at its compilation.
    placed = jax.tree.map(jax.device_put, arguments, compiled.input_shardings[0])
    state, metrics = compiled(*placed)
    return jax.device_get((metrics, state.opt_state[0].mu / (1 - STAGE.beta1)))


@pytest.mark.parametrize('devices', [2, 8])
def test_a_split_batch_has_the_losses_and_the_gradient_of_the_whole(teacher, student, parameterization, undivided, devices):
    compiled, arguments = _first_step(teacher, student, parameterization, 'global', devices)
    assert _collectives(compiled)
    metrics, gradient = _loss_and_gradient(compiled, arguments)
    assert set(metrics) == {'loss', 'cross_entropy', 'feature', 'total_variation', 'l2', 'competition'}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, undivided[0][name], rtol=1e-5, err_msg=name)
    difference = np.linalg.norm(gradient - undivided[1]) / np.linalg.norm(undivided[1])
    assert difference < 1e-5


@pytest.mark.slow
def test_a_split_batch_ends_in_about_the_same_images(teacher):
    config = InversionConfig((STAGE,), WEIGHTS, bn_stats='global')
    labels, key = balanced_labels(0, BATCH, 3), jax.random.key(2)
    one, eight = (invert(teacher, labels, config, key, mesh=make_mesh(devices)) for devices in (1, 8))
    assert one.images.shape == eight.images.shape == (BATCH, *IMAGE_SHAPE)
    np.testing.assert_allclose(eight.metrics['loss'], one.metrics['loss'], rtol=1e-4)
    # Adam divides by the size of a gradient that is rounded differently; hardly any pixel feels it.
    assert np.quantile(np.abs(eight.images - one.images), 0.99) < 1e-3


def test_a_batch_that_devices_do_not_divide_is_refused(teacher):
    config = InversionConfig((STAGE,), WEIGHTS, bn_stats='global')
    with pytest.raises(DvinvError, match='A batch of 12 images cannot be split evenly over 8 devices'):
        invert(teacher, balanced_labels(0, 12, 3), config, jax.random.key(0))


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(DvinvError, match='devices is 9, but JAX sees only 8'):
        make_mesh(9)


def test_trainings_do_not_depend_on_the_number_of_virtual_devices():
    assert training_mesh(make_mesh(8)).size == 1
