"""Hints: which layers student and teacher share, what their distance is, and that a student follows them."""

import jax
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, TinyNet, trained, trained_variables

from dvinv import DvinvError
from dvinv.configuration import base_config
from dvinv.hints import hint_loss, shared_layers
from dvinv.inversion import from_linen
from dvinv.inversion.tap import features_in_training
from dvinv.networks import create, initialise
from dvinv.recipe import Recipe
from dvinv.rounds import Rounds
from dvinv.student import distillation_loss, lesson_of
from dvinv.training import initial_state, make_train_step

LAYERS = ('BatchNorm_0', 'BatchNorm_1')


def small_teacher():
    """An untrained `small_resnet` as a Teacher."""
    module = create('small_resnet', 10)
    variables = trained_variables(module, (8, 8, 1))
    return from_linen(module, variables, image_shape=(8, 8, 1), mean=(0.5,), std=(0.5,))


def _images(batch=6):
    return np.random.default_rng(0).normal(size=(batch, *IMAGE_SHAPE)).astype(np.float32)


def test_layers_of_one_path_and_shape_are_shared(teacher):
    assert shared_layers(TinyNet(), teacher) == LAYERS
    assert shared_layers(TinyNet(channels=(4, 7)), teacher) == LAYERS[:1]
    assert shared_layers(TinyNet(channels=(4, 5, 6)), teacher) == LAYERS
    assert shared_layers(TinyNet(channels=(4,)), teacher) == LAYERS[:1]


def test_a_student_without_such_a_layer_is_refused(teacher):
    with pytest.raises(DvinvError, match=r'no BatchNorm layer of the student .* \(BatchNorm_0, BatchNorm_1\); .*hint=0'):
        shared_layers(TinyNet(channels=(3, 3)), teacher)


def test_the_distance_is_relative_to_what_the_teacher_hears():
    rng = np.random.default_rng(0)
    ours, theirs = ({name: tuple(rng.normal(size=(n, 2, 4, 4, 3))) for name, n in (('a', 2), ('b', 1))} for _ in range(2))
    pairs = [pair for name in theirs for pair in zip(ours[name], theirs[name], strict=True)]
    value = hint_loss({**ours, 'more': None}, theirs)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, np.mean([((x - y) ** 2).mean() / (y**2).mean() for x, y in pairs]), rtol=1e-5)
    louder = jax.tree.map(lambda x: 100 * x, (ours, theirs))
    np.testing.assert_allclose(hint_loss(*louder), value, rtol=1e-5)
    x, y = pairs[-1]
    assert hint_loss(theirs, theirs) == 0
    silent = {**theirs, 'b': (np.zeros_like(theirs['b'][0]),)}
    np.testing.assert_allclose(hint_loss(ours, silent), value - (((x - y) ** 2).mean() / (y**2).mean() / 3), rtol=1e-4)


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


def test_hints_are_added_to_the_answers_loss_and_reach_the_shared_layers_alone(teacher):
    student = trained_variables(TinyNet(), seed=5)
    x = _images()

    def losses(params, hint, layers):
        variables = {**student, 'params': params}
        logits, features, _ = features_in_training(TinyNet(), variables, x, {})
        return distillation_loss(teacher, 3.0, hint, layers)(logits, features, x, None, teacher.variables)

    run = jax.jit(jax.value_and_grad(losses), static_argnums=(1, 2))
    (plain, without), (both, _), (_, gradient) = (
        run(student['params'], *arguments) for arguments in ((0.0, ()), (2.0, LAYERS), (2.0, LAYERS[:1]))
    )
    _, ours, _ = features_in_training(TinyNet(), student, x, {})
    _, theirs = teacher.features(teacher.variables, x)
    np.testing.assert_allclose(both - plain, 2 * hint_loss(ours, theirs), rtol=1e-4)
    np.testing.assert_allclose(gradient['Conv_1']['kernel'], without['Conv_1']['kernel'], rtol=1e-4, atol=1e-6)
    assert np.abs(gradient['Conv_0']['kernel'] - without['Conv_0']['kernel']).max() > 1e-3


def test_the_configs_hint_is_in_the_lesson():
    config, teacher = base_config('digits'), small_teacher()
    variables = trained(teacher.variables, seed=5)
    lessons = []
    for hint in (0.0, 7.0):
        config.distillation.hint = hint
        lessons.append(lesson_of(config, teacher, Rounds(4)).loss_fn)

    @jax.jit
    def measure(x):
        logits, features, _ = features_in_training(create('small_resnet', 10), variables, x, {})
        _, theirs = teacher.features(teacher.variables, x)
        without, with_hints = (loss(logits, features, x, None, teacher.variables) for loss in lessons)
        return with_hints - without, hint_loss(features, theirs)

    difference, hints = measure(np.random.default_rng(0).normal(size=(4, *teacher.image_shape)).astype(np.float32))
    np.testing.assert_allclose(difference, 7 * hints, rtol=1e-4)


def test_a_student_learns_the_teachers_layers_from_hints_and_not_from_answers(teacher):
    images = np.random.default_rng(1).integers(0, 256, (64, *IMAGE_SHAPE), dtype=np.uint8)
    recipe = Recipe(updates=60, batch_size=64, learning_rate=0.02)

    def distance(hint):
        loss = distillation_loss(teacher, 3.0, hint, LAYERS if hint else ())
        update = jax.jit(make_train_step(TinyNet(), recipe, loss, teacher))
        state = initial_state(recipe, initialise(TinyNet(), jax.random.key(0), IMAGE_SHAPE))
        for _ in range(recipe.updates):
            state, _ = update(state, images, np.zeros(64, np.int32), teacher.variables, jax.random.key(1))
        kernel = teacher.variables['params']['Conv_0']['kernel']
        return np.linalg.norm(state.params['Conv_0']['kernel'] - kernel) / np.linalg.norm(kernel)

    assert distance(100.0) < 0.5 < 0.8 < distance(0.0)
