"""Hints: layers or stages that student and teacher have in common, what their distance is, a student that follows them."""

import dataclasses
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from smoke import synthesis_config
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, trained, trained_variables

from dvinv import DvinvError
from dvinv.config import TrainingSettings, default_config, parse
from dvinv.distillation.student import (
    Hints,
    choose_hints,
    distillation_loss,
    hints_of,
    job_of,
    layer_error,
    staged_forward,
    staged_loss,
)
from dvinv.graph.stages import graft, initial_projections, record, relative_error, to_student, to_teacher
from dvinv.inversion import from_linen, from_nnx
from dvinv.inversion.linen_modules import features_in_training
from dvinv.inversion.programs import in_precision
from dvinv.networks import create, initialise
from dvinv.pipeline import tasks as pipeline
from dvinv.pipeline.run import Run
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.workdir import Workdir
from dvinv.training.step import Rounds, TrainJob, TrainStep, initial_state, make_train_step
from dvinv.training.trainer import Records, Training

LAYERS = ('BatchNorm_0', 'BatchNorm_1')


def small_teacher():
    """An untrained `small_resnet` as a Teacher."""
    module = create('small_resnet', 10)
    variables = trained_variables(module, (8, 8, 1))
    return from_linen(module, variables, image_shape=(8, 8, 1), mean=(0.5,), std=(0.5,))


def _images(batch=6):
    return np.random.default_rng(0).normal(size=(batch, *IMAGE_SHAPE)).astype(np.float32)


def test_layers_of_one_path_and_shape_are_shared(teacher):
    def layers(channels):
        return choose_hints('layers', TinyNet(channels=channels), teacher).layers

    assert layers((4, 5)) == layers((4, 5, 6)) == LAYERS
    assert layers((4, 7)) == layers((4,)) == LAYERS[:1]


def test_the_layers_are_chosen_where_both_networks_have_all_of_them_in_common(teacher):
    assert choose_hints('auto', TinyNet(), teacher) == Hints(layers=LAYERS)
    for channels in ((4, 7), (4, 5, 6), (4,)):
        assert choose_hints('auto', TinyNet(channels=channels), teacher).kind == 'stages'
    assert choose_hints('none', TinyNet(), teacher) == Hints()


def test_a_student_without_such_a_layer_is_refused(teacher):
    words = r"no BatchNorm layer of the student .* \(BatchNorm_0, BatchNorm_1\); set distillation.hints='stages'"
    with pytest.raises(DvinvError, match=words):
        choose_hints('layers', TinyNet(channels=(3, 3)), teacher)


def test_the_distance_is_relative_to_what_the_teacher_hears():
    rng = np.random.default_rng(0)
    student, target = ({name: tuple(rng.normal(size=(n, 2, 4, 4, 3))) for name, n in (('a', 2), ('b', 1))} for _ in range(2))
    pairs = [pair for name in target for pair in zip(student[name], target[name], strict=True)]
    value = layer_error({**student, 'more': None}, target)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, np.mean([((x - y) ** 2).mean() / (y**2).mean() for x, y in pairs]), rtol=1e-5)
    louder = jax.tree.map(lambda x: 100 * x, (student, target))
    np.testing.assert_allclose(layer_error(*louder), value, rtol=1e-5)
    x, y = pairs[-1]
    assert layer_error(target, target) == 0
    silent = {**target, 'b': (np.zeros_like(target['b'][0]),)}
    np.testing.assert_allclose(layer_error(student, silent), value - (((x - y) ** 2).mean() / (y**2).mean() / 3), rtol=1e-4)


def test_features_in_training_are_the_inputs_that_move_the_running_statistics(teacher):
    module = TinyNet()
    logits, features, statistics = features_in_training(module, teacher.variables, _images(), {})
    plain, changed = module.apply(teacher.variables, _images(), train=True, mutable=['batch_stats'])
    np.testing.assert_array_equal(logits, plain)
    jax.tree.map(np.testing.assert_array_equal, statistics, changed['batch_stats'])
    for layer in LAYERS:
        (x,) = features[layer]
        before, after = (group[layer]['mean'] for group in (teacher.variables['batch_stats'], statistics))
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_hints_are_added_to_the_answers_loss_and_reach_the_shared_layers_alone(teacher):
    student = trained_variables(TinyNet(), seed=5)
    x = _images()

    def losses(params, hint, layers):
        variables = {**student, 'params': params}
        logits, features, _ = features_in_training(TinyNet(), variables, x, {})
        return distillation_loss(teacher, 3.0, hint, layers)(logits, features, x, None, teacher.variables, 0.0)

    run = jax.jit(jax.value_and_grad(losses), static_argnums=(1, 2))
    (plain, without), (both, _), (_, gradient) = (
        run(student['params'], *arguments) for arguments in ((0.0, ()), (2.0, LAYERS), (2.0, LAYERS[:1]))
    )
    _, features, _ = features_in_training(TinyNet(), student, x, {})
    _, target = teacher.features(teacher.variables, x)
    np.testing.assert_allclose(both - plain, 2 * layer_error(features, target), rtol=1e-4)
    np.testing.assert_allclose(gradient['Conv_1']['kernel'], without['Conv_1']['kernel'], rtol=1e-4, atol=1e-6)
    assert np.abs(gradient['Conv_0']['kernel'] - without['Conv_0']['kernel']).max() > 1e-3


@pytest.mark.slow
def test_the_configs_hint_is_in_the_lesson():
    config, teacher = default_config('digits'), small_teacher()
    variables = trained(teacher.variables, seed=5)
    jobs = []
    for hint in (0.0, 7.0):
        config.distillation.hint = hint
        run = Run(parse(config))
        jobs.append(job_of(run, teacher, Rounds(4), hints_of(run, teacher)).loss_fn)

    @jax.jit
    def measure(x):
        logits, features, _ = features_in_training(create('small_resnet', 10), variables, x, {})
        _, target = teacher.features(teacher.variables, x)
        without, with_hints = (loss(logits, features, x, None, teacher.variables, 0.0) for loss in jobs)
        return with_hints - without, layer_error(features, target)

    difference, hints = measure(np.random.default_rng(0).normal(size=(4, *teacher.image_shape)).astype(np.float32))
    np.testing.assert_allclose(difference, 7 * hints, rtol=1e-4)


@pytest.mark.parametrize(('decay', 'weights'), [(0.0, (7, 7, 7)), (1.0, (7, 3.5, 0)), (2.0, (7, 1.75, 0))])
def test_the_weight_of_hints_falls_over_the_training(decay, weights):
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    features = {'teacher_logits': logits, 'stage_errors': np.array([0.5, 1.5], np.float32)}
    loss = jax.jit(staged_loss(3.0, 7.0, decay), static_argnums=2)
    measured = [loss(logits, features, None, None, None, progress) for progress in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(measured, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_layers_error_falls_by_the_configs_decay():
    config, teacher = default_config('digits'), small_teacher()
    config.distillation.update(hint=8.0, hint_decay=2.0)
    variables, x = trained(teacher.variables, seed=5), np.random.default_rng(0).normal(size=(4, *teacher.image_shape))
    run = Run(parse(config))
    loss = job_of(run, teacher, Rounds(4), hints_of(run, teacher)).loss_fn

    @jax.jit
    def measure(x):
        logits, features, _ = features_in_training(create('small_resnet', 10), variables, x, {})
        return [loss(logits, features, x, None, teacher.variables, progress) for progress in (0.0, 0.5, 1.0)]

    first, half, last = measure(x.astype(np.float32))
    np.testing.assert_allclose(half - last, (first - last) / 4, rtol=1e-3)
    assert first > last + 1


@pytest.mark.slow
def test_a_student_learns_the_teachers_layers_from_hints_and_not_from_answers(teacher):
    images = np.random.default_rng(1).integers(0, 256, (64, *IMAGE_SHAPE), dtype=np.uint8)
    recipe = TrainingSettings(updates=60, batch_size=64, learning_rate=0.02)

    def distance(hint):
        loss = distillation_loss(teacher, 3.0, hint, LAYERS if hint else ())
        update = jax.jit(make_train_step(TinyNet(), TrainJob(recipe, loss, Rounds(8)), teacher, make_mesh(1)))
        state = initial_state(recipe, initialise(TinyNet(), jax.random.key(0), IMAGE_SHAPE))
        for _ in range(recipe.updates):
            state, _ = update(state, images, np.zeros(64, np.int32), teacher.variables, jax.random.key(1))
        kernel = teacher.variables['params']['Conv_0']['kernel']
        return np.linalg.norm(state.params['Conv_0']['kernel'] - kernel) / np.linalg.norm(kernel)

    assert distance(100.0) < 0.5 < 0.8 < distance(0.0)


# Stages


class Strided(nn.Module):
    """Two convolutions with BatchNorm, the second with half the resolution and as many channels as asked for."""

    channels: int = 6

    @nn.compact
    def __call__(self, x, train: bool = False):
        for channels, stride in ((4, 1), (self.channels, 2)):
            x = nn.Conv(channels, (3, 3), stride)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Pooled(nn.Module):
    """Unlike `Strided` in all but the resolutions: other names, a pooling, no BatchNorm in the second half."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(nn.Conv(4, (5, 5), name='first')(x))
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(3)(nn.tanh(nn.Conv(5, (3, 3), name='second')(x)).reshape(len(x), -1))


class Model(nnx.Module):
    """The NNX twin of `Strided`."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.Conv(4, 6, (3, 3), 2, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(channels, rngs=rngs) for channels in (4, 6)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def _teachers():
    pictures = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}
    return {
        'linen': from_linen(Strided(), trained_variables(Strided()), **pictures),
        'nnx': from_nnx(Model(nnx.Rngs(0)), **pictures),
    }


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_stages_of_unrelated_networks_are_matched_and_put_in_a_table(kind):
    hints = choose_hints('auto', Pooled(), _teachers()[kind])
    assert hints.kind == 'stages'
    assert [(row[0], row[3]) for row in hints.rows()] == [('8x8', 'none'), ('4x4', '5 to 6 channels')]
    assert 'relu' in hints.rows()[0][1]
    assert str(hints).startswith('Hints: the outputs of the stages, teacher and student.\n  8x8: 4 channels of ')


def _staged(teacher, module, share=0.5, hint=10.0):
    """The job of a student by its stages."""
    pairs = choose_hints('stages', module, teacher).pairs
    recipe = TrainingSettings(updates=8, batch_size=6, learning_rate=0.03, clip_norm=10.0)
    return TrainJob(
        recipe,
        staged_loss(3.0, hint),
        Rounds(20),
        teacher.variables,
        forward=staged_forward(module, teacher, pairs, share),
        auxiliary=initial_projections(jax.random.key(0), pairs),
    )


def _train(folder, teacher, job, stops=()):
    """(variables, metrics) of a training that is made again at each of `stops`."""
    images = np.random.default_rng(1).integers(0, 256, (20, *IMAGE_SHAPE), dtype=np.uint8)
    labels, logging = np.zeros(20, np.int32), SimpleNamespace(every=2, checkpoint_every=4)
    workdir = Workdir(folder, {})
    for stop in (*stops, None):
        with Training(
            Pooled(), job, teacher, 3, make_mesh(1), Records(workdir, 'distillation', 'student', logging)
        ) as training:
            variables = training.advance(images, labels, stop) if stop else training.finish(images, labels)
    workdir.close()
    return variables, [*workdir.metrics.lines('distillation', 'student')]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_a_student_of_an_unrelated_teacher_learns_and_resumes_to_the_bit(kind, tmp_path):
    teacher = _teachers()[kind]
    job = _staged(teacher, Pooled())
    variables, metrics = _train(tmp_path / 'once', teacher, job)
    resumed, _ = _train(tmp_path / 'resumed', teacher, job, stops=(4,))
    jax.tree.map(np.testing.assert_array_equal, resumed, variables)
    assert metrics[-1]['loss'] < metrics[0]['loss']
    assert {*variables['params']} == {'first', 'norm', 'second', 'Dense_0'}  # and no projection


@pytest.mark.slow
def test_grafted_stages_are_entered_from_the_teachers_output_of_the_stage_before():
    teacher, student = _teachers()['linen'], trained_variables(Pooled(), seed=5)
    job, x = _staged(teacher, Pooled(), share=1.0), _images()
    (full, half), projections = choose_hints('stages', Pooled(), teacher).pairs, job.auxiliary
    rngs = {'dropout': jax.random.key(2)}
    _, features, _ = jax.jit(job.forward)(student, projections, x, rngs, teacher.variables, 0.0)
    teacher_logits, (teacher_full, teacher_half) = record(teacher.apply_fn, [(8, 8), (4, 4)])(teacher.variables, x)

    def own(variables, x):
        return features_in_training(Pooled(), variables, x, rngs)

    def replace(index, output):
        return to_student(projections, (full, half)[index], (teacher_full, teacher_half)[index])

    _, (own_full, own_half) = graft(own, [(8, 8), (4, 4)], replace)(student, x)
    expected = [
        relative_error(own_full, teacher_full),
        relative_error(to_teacher(projections, half, own_half), teacher_half),
    ]
    np.testing.assert_allclose(features['stage_errors'], expected, rtol=1e-4)
    np.testing.assert_allclose(features['teacher_logits'], teacher_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_in_bfloat16_stages_are_compared_in_float32():
    teacher = _teachers()['linen']
    job = _staged(in_precision(teacher, 'bfloat16'), Pooled())
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, precision='bfloat16'))
    step = TrainStep(Pooled(), job, teacher, make_mesh(1))
    images = np.random.default_rng(1).integers(0, 256, (6, *IMAGE_SHAPE), dtype=np.uint8)
    state, batch, key = step.initial_state(jax.random.key(0)), (images, np.zeros(6, np.int32)), jax.random.key(1)
    text = str(jax.make_jaxpr(step.function(several=False))(state, (), batch, job.frozen, key))
    assert len(re.findall(r':f32\[[^=]*= conv_general_dilated', text)) == 0
    variables, x = {'params': state.params, 'batch_stats': state.batch_stats}, _images().astype(jnp.bfloat16)
    _, features, _ = job.forward(variables, state.auxiliary, x, {'dropout': key}, teacher.variables, 0.0)
    assert features['stage_errors'].dtype == np.float32
    state, loss = step(state, batch, key)
    assert np.isfinite(loss)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.auxiliary))} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_the_matching_is_printed_and_stands_in_results_and_report(tmp_path, capsys):
    config = synthesis_config(
        synthesis__method='noise',
        tasks=('synthesis', 'distillation', 'report'),
        student__network='small_convnet',
        distillation__hint=10.0,
        distillation__updates=2,
        distillation__warmup=0,
    )
    distillation = pipeline.run(config, tmp_path / 'run')['distillation']
    assert (distillation['hints'], distillation['hinted_layers']) == ('stages', 0)
    ((resolution, of_teacher, of_student, projection),) = distillation['hinted_stages']
    assert (resolution, projection) == ('8x8', '4 to 5 channels')
    assert of_teacher.startswith('5 channels of ')
    assert of_student.startswith('4 channels of ')
    assert 'Hints: the outputs of the stages, teacher and student.\n  8x8: 5 channels' in capsys.readouterr().err
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'with hints from 1 stages of the teacher' in page
    assert 'Stages after which student and teacher are compared.' in page
