"""Whole inversions: golden values, stages against Adam in numpy, what has a gradient, what stops a run."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, tiny_teacher

from dvinv import DvinvError, balanced_labels, invert
from dvinv.config import InversionConfig, Stage, Weights, default_config, parse
from dvinv.inversion import Inversion, losses, make_feature_loss, make_inverter
from dvinv.inversion.step import InversionState, initial_parameters, make_objective, make_step
from dvinv.runtime.devices import make_mesh

GOLDEN = Path(__file__).parents[1] / 'golden' / 'inversion.npz'
KEY, LABELS = jax.random.key(7), np.array([0, 1, 2, 0, 1, 2], np.int32)
EVERY_TERM = Weights(feature=0.3, first_bn_multiplier=2.0, total_variation=1e-2, l2=1e-2, competition=0.5)


def _config(*stages, **fields):
    return InversionConfig(stages or (Stage(2, 0.1),), **{'pixel_scale': 'network', **fields})


def _flat_batch(teacher, stage, config, **others):
    """Arguments of `_objective` for a batch of noise."""
    images, key = initial_parameters(KEY, len(LABELS), IMAGE_SHAPE)
    arguments = {
        'student_fn': None,
        'images': images,
        'labels': LABELS,
        'variables': teacher.variables,
        'student_variables': None,
        'key': key,
        **others,
    }
    return {'teacher': teacher, 'config': config, 'stage': stage, **arguments}


def _objective(teacher, config, stage, student_fn, **arguments):
    return make_objective(teacher, config, stage, student_fn)(**arguments)


def _gradient(arguments):
    """(gradient of the objective with respect to the pixels, its terms)."""
    images = arguments.pop('images')
    return jax.jit(jax.grad(lambda x: _objective(images=x, **arguments), has_aux=True))(images)


# What is shown of a result


def test_results_and_networks_are_shown_in_one_line(teacher):
    result = Inversion(np.zeros((6, 8, 8, 2), np.float32), {'loss': np.array([3.0, 2.5])}, LABELS)
    assert repr(result) == ('Inversion(images float32 [6, 8, 8, 2], labels 0, 1, 2, 0, 1, 2, 2 iterations, final loss 2.5)')
    many = Inversion(np.zeros((2, 20, 8, 8, 2)), {}, np.zeros((2, 20), int))
    assert repr(many) == f'Inversion(images float64 [2, 20, 8, 8, 2], labels {", ".join("0" * 12)} and 28 more)'
    assert repr(Inversion(np.zeros(1), {})) == 'Inversion(images float64 [1])'
    assert repr(teacher).startswith('Teacher(image_shape=(8, 8, 2), num_classes=3, mean=(0.4, 0.6), std=(0.2, 0.3), ')
    assert len(repr(teacher)) < 125


# Golden values


def _golden_run(teacher, student):
    look = {'beta1': 0.5, 'beta2': 0.9, 'flip': True}
    config = _config(
        Stage(4, 0.2, resolution=4, jitter=1, warmup=1, **look),
        Stage(5, 0.1, augmentation='crop', jitter=2, noise=0.1, **look),
        weights=EVERY_TERM,
    )
    result = invert(teacher, LABELS, config, KEY, student_fn=student.apply_fn, student_variables=student.variables)
    return {'images': result.images, **result.metrics}


@pytest.mark.slow
@pytest.mark.optimized
def test_a_fixed_key_gives_the_golden_images_and_metrics(teacher, student):
    before = jax.tree.map(np.copy, (teacher.variables, student.variables))
    result, golden = _golden_run(teacher, student), np.load(GOLDEN)
    assert set(result) == set(golden)
    # JAX 0.10 and 0.12 differ by rounding alone (5e-7 here); another CPU may sum in another order, and Adam enlarges that.
    for name, values in golden.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    # Both networks are frozen, running statistics included.
    jax.tree.map(np.testing.assert_array_equal, before, (teacher.variables, student.variables))


# Stages


def _scaling(old, new):
    """[new, old]: how a line is scaled down: means where `new` divides, elsewhere as by JAX's own antialiased resize."""
    if old % new == 0:
        return np.kron(np.eye(new), np.full(old // new, new / old))
    return np.float64(jax.image.resize(np.eye(old), (new, old), 'linear', antialias=True))


def _reference(images, stages, low, high):
    """The iterates of Adam in numpy on the norm of the scaled batch, whose gradient is x / ||x||."""
    iterates = [images.astype(np.float64)]
    for stage in stages:
        first = second = np.zeros(images.shape)
        lines = _scaling(images.shape[1], stage.resolution or images.shape[1])
        for t in range(stage.iterations):
            x = iterates[-1]
            scaled = np.einsum('ih,bhwc,jw->bijc', lines, x, lines)
            gradient = np.einsum('ih,bijc,jw->bhwc', lines, scaled / np.linalg.norm(scaled), lines)
            first = stage.beta1 * first + (1 - stage.beta1) * gradient
            second = stage.beta2 * second + (1 - stage.beta2) * gradient**2
            step = first / (1 - stage.beta1 ** (t + 1)) / (np.sqrt(second / (1 - stage.beta2 ** (t + 1))) + 1e-8)
            if t < stage.warmup:
                rate = stage.learning_rate * t / stage.warmup
            elif stage.schedule == 'constant':
                rate = stage.learning_rate
            else:
                share = (t - stage.warmup) / (stage.iterations - stage.warmup)
                rate = stage.learning_rate * (1 + np.cos(np.pi * share)) / 2
            x = x - rate * step
            iterates.append(np.clip(x, low, high) if stage.clip else x)
    return iterates


ONLY_NORM = {'weights': Weights(main=0, feature=0, total_variation=0, l2=1), 'l2': 'batch', 'prior_on': 'image'}


@pytest.mark.slow
@pytest.mark.parametrize(
    'stages',
    [
        (Stage(5, 0.3, resolution=4, warmup=2, beta1=0.5, beta2=0.9, clip=False), Stage(4, 0.2, warmup=1, clip=True)),
        (Stage(5, 0.3, resolution=5, beta1=0.5, clip=True), Stage(4, 0.2, resolution=7, beta1=0.5, clip=True)),
        (Stage(4, 2.0, schedule='constant', clip=False),),
        (Stage(4, 0.3, schedule='constant', warmup=3), Stage(2, 0.1, schedule='constant', clip=True)),
    ],
    ids=['pooled, then whole', 'two sizes that do not divide', 'constant', 'constant after warm-up'],
)
def test_stages_are_adam_restarted_on_scaled_images_and_the_last_iterate_is_kept(teacher, stages):
    result = invert(teacher, LABELS, _config(*stages, **ONLY_NORM), KEY)
    initial, _ = initial_parameters(KEY, len(LABELS), IMAGE_SHAPE)
    low, high = teacher.valid_range
    iterates = _reference(np.asarray(initial), stages, low, high)
    np.testing.assert_allclose(result.images, iterates[-1], rtol=1e-3, atol=1e-4)
    norms = [np.linalg.norm(x) for x in iterates]
    assert len(result.metrics['loss']) == len(norms) - 1
    if not stages[0].resolution:  # losses are those before each update
        np.testing.assert_allclose(result.metrics['loss'], norms[:-1], rtol=1e-4)
    inside = (result.images >= low) & (result.images <= high)
    assert inside.all() == stages[-1].clip
    if stages[0].learning_rate == 2:  # long steps overshoot: the best iterate is an earlier one
        assert min(norms[:-1]) < norms[-1]


@pytest.mark.slow
def test_many_iterations_a_dispatch_are_the_same_inversion(teacher):
    config = _config(Stage(5, 0.1, jitter=1), weights=Weights(feature=0.3))
    reports = []
    run = make_inverter(teacher, dataclasses.replace(config, iterations_per_dispatch=2), make_mesh(1))
    many = run(KEY[None], LABELS[None], on_chunk=lambda done, terms: reports.append((done, set(terms))))
    one = invert(teacher, LABELS, config, KEY)
    np.testing.assert_allclose(many.images[0], one.images, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(many.metrics['loss'][0], one.metrics['loss'], rtol=1e-4)
    assert reports[-1] == (5, set(one.metrics))
    assert [*one.labels] == [*many.labels[0]] == [*LABELS]


# The objective and its gradient


def test_the_loss_is_the_weighted_sum_of_its_logged_terms(teacher, student):
    config = _config(weights=EVERY_TERM)
    arguments = _flat_batch(
        teacher, config.stages[0], config, student_fn=student.apply_fn, student_variables=student.variables
    )
    loss, terms = jax.jit(lambda: _objective(**arguments))()
    weights = {'cross_entropy': 1.0, 'feature': 0.3, 'total_variation': 1e-2, 'l2': 1e-2, 'competition': 0.5}
    np.testing.assert_allclose(loss, sum(weights[name] * float(value) for name, value in terms.items()), rtol=1e-5)


@pytest.mark.slow
def test_the_first_layer_alone_is_multiplied(teacher):
    stage = Stage(1, 0.1)
    values = []
    for multiplier in (1.0, 10.0):
        weights = Weights(main=0, feature=1, total_variation=0, first_bn_multiplier=multiplier)
        arguments = _flat_batch(teacher, stage, _config(weights=weights))
        values.append(float(_objective(**arguments)[0]))
    _, moments = teacher.tap(teacher.variables, arguments['images'])
    pairs = zip(moments['BatchNorm_0'], teacher.statistics(teacher.variables)['BatchNorm_0'], strict=True)
    first = sum(np.linalg.norm(moment - running) for moment, running in pairs)
    np.testing.assert_allclose(values[1] - values[0], 9 * first, rtol=1e-4)


@pytest.mark.slow
def test_prior_only_has_no_gradient_of_the_features(teacher):
    moved = dataclasses.replace(teacher, statistics=lambda v: jax.tree.map(lambda a: 3 * a + 1, teacher.statistics(v)))
    config = default_config('digits')
    assert parse(config).inversion_config().weights.feature > 0
    prior_only = parse(config).inversion_config('prior_only').weights
    for weights, alike in ((prior_only, True), (dataclasses.replace(prior_only, feature=0.3), False)):
        gradients, terms = zip(
            *(_gradient(_flat_batch(t, Stage(1, 0.1), _config(weights=weights))) for t in (teacher, moved)), strict=True
        )
        assert terms[0]['feature'] != terms[1]['feature']  # logged all the same
        assert np.array_equal(*gradients) == alike


@pytest.mark.slow
def test_the_priors_are_taken_on_the_view_or_on_the_image(teacher):
    stage, weights = Stage(1, 0.1, resolution=4, jitter=2, augmentation='crop'), Weights(l2=1.0)
    images, _ = initial_parameters(KEY, len(LABELS), IMAGE_SHAPE)
    pooled = np.asarray(images).reshape(6, 4, 2, 4, 2, 2).mean((2, 4))
    values = {}
    for where in ('view', 'image'):
        arguments = _flat_batch(teacher, stage, _config(weights=weights, prior_on=where))
        values[where] = {name: float(value) for name, value in _objective(**arguments)[1].items()}
    np.testing.assert_allclose(values['image']['l2'], losses.l2_per_image(pooled), rtol=1e-5)
    np.testing.assert_allclose(values['image']['total_variation'], losses.total_variation_l2(pooled), rtol=1e-5)
    assert abs(values['view']['l2'] / values['image']['l2'] - 1) > 0.01
    assert values['view']['feature'] == values['image']['feature']


@pytest.mark.slow
def test_the_gradient_of_the_competition_flows_through_both_networks(teacher, student):
    def frozen(fn):
        return lambda variables, x, *rest: jax.lax.stop_gradient(fn(variables, x, *rest))

    def gradient(teacher, student_fn):
        config = _config(weights=Weights(main=0, feature=0, total_variation=0, competition=1))
        arguments = _flat_batch(
            teacher, config.stages[0], config, student_fn=student_fn, student_variables=student.variables
        )
        return _gradient(arguments)[0]

    both = gradient(teacher, student.apply_fn)
    by_teacher = gradient(teacher, frozen(student.apply_fn))
    by_student = gradient(dataclasses.replace(teacher, tap=frozen(teacher.tap)), student.apply_fn)
    size = np.abs(both).max()
    assert min(np.abs(by_teacher).max(), np.abs(by_student).max()) > 0.01 * size > 0
    np.testing.assert_allclose(by_teacher + by_student, both, atol=1e-4 * size)


def test_no_weight_has_a_gradient_and_none_is_a_constant_of_the_program(teacher):
    stage = Stage(1, 0.1)
    config = _config(stage)
    step = make_step(teacher, config, stage)
    parameters, key = initial_parameters(KEY, len(LABELS), IMAGE_SHAPE)
    state = InversionState(parameters, stage.make_optimizer().init(parameters), jnp.int32(0), key)

    def convolutions(jaxpr):
        shapes = re.findall(r'f32\[([\d,]+)\] = conv_general_dilated', str(jaxpr))
        return [tuple(map(int, shape.split(','))) for shape in shapes]

    kernels = {leaf.shape for leaf in jax.tree.leaves(teacher.variables) if leaf.ndim == 4}
    assert len(kernels) == 2
    program = jax.make_jaxpr(step)(state, LABELS, teacher.variables, None)
    assert len(convolutions(program)) == 2 * len(kernels)  # forwards, and backwards to the pixels
    assert not kernels & set(convolutions(program))
    assert all(np.size(constant) <= IMAGE_SHAPE[-1] for constant in program.consts)
    # The same count of a program that does differentiate weights tells them apart.
    by_weights = jax.grad(lambda variables: step(state, LABELS, variables, None)[1]['loss'])
    assert kernels <= set(convolutions(jax.make_jaxpr(by_weights)(teacher.variables)))


def test_the_feature_loss_of_images_has_unit_layer_weights(teacher):
    images, _ = initial_parameters(KEY, len(LABELS), IMAGE_SHAPE)
    _, moments = teacher.tap(teacher.variables, images)
    statistics = teacher.statistics(teacher.variables)
    expected = sum(np.linalg.norm(moments[layer][i] - statistics[layer][i]) for layer in moments for i in (0, 1))
    measured = make_feature_loss(teacher, Stage(1, 0.1))(teacher.variables, images, KEY)
    np.testing.assert_allclose(measured, expected, rtol=1e-4)


# What stops a run


@pytest.mark.slow
def test_weights_that_are_not_numbers_stop_the_first_iteration(teacher):
    broken = dataclasses.replace(teacher, variables=jax.tree.map(lambda a: np.full_like(a, np.nan), teacher.variables))
    with pytest.raises(DvinvError, match=r'The term (cross_entropy|feature) is not a finite number at iteration 0 .*NaNs'):
        invert(broken, LABELS, _config(), KEY)


@pytest.mark.slow
def test_a_learning_rate_that_blows_up_is_told_with_its_iteration_over_all_stages(teacher):
    stages = Stage(2, 0.1), Stage(3, 1e30, schedule='constant', clip=False)
    with pytest.raises(DvinvError, match=r'The term (?!loss)\w+ is not a finite number at iteration 3 .*lower the learning'):
        invert(teacher, LABELS, _config(*stages), KEY)


def test_a_last_update_that_blows_up_is_told_too(teacher):
    stage = Stage(1, 0.1, schedule='constant', clip=False)
    object.__setattr__(stage, 'learning_rate', float('inf'))  # which no stage is made with
    with pytest.raises(DvinvError, match='not finite'):
        invert(teacher, LABELS, _config(stage), KEY)


@pytest.mark.parametrize(
    ('labels', 'sentence'),
    [
        ([0, 3], 'Label 3 is out of range: the network has 3 classes, 0 to 2'),
        ([-1, 0], 'Label -1 is out of range'),
        ([0.0, 1.0], 'Labels must be a vector of integers; these are float64'),
        ([[0], [1]], 'Labels must be a vector of integers; .* of shape \\(2, 1\\)'),
    ],
)
def test_labels_that_the_teacher_does_not_know_are_refused(teacher, labels, sentence):
    with pytest.raises(DvinvError, match=sentence):
        invert(teacher, labels, _config(), KEY)


@pytest.mark.parametrize(
    ('cls', 'fields', 'sentence'),
    [
        (Stage, {'resolution': -1}, 'resolution is -1; it must be at least 0'),
        (Stage, {'iterations': 0}, 'iterations is 0; it must be at least 1'),
        (Stage, {'warmup': 5}, 'warmup is 5, but the stage has only 5 iterations'),
        (Stage, {'schedule': 'linear'}, "schedule is 'linear'; choose one of cosine, constant"),
        (Stage, {'augmentation': 'cut'}, "augmentation is 'cut'; choose one of roll, crop"),
        (InversionConfig, {'bn_stats': 'pod'}, "bn_stats is 'pod'; choose one of device, global"),
        (InversionConfig, {'total_variation': 'l3'}, "total_variation is 'l3'; choose one of l2, l1"),
        (InversionConfig, {'stages': ()}, 'stages is empty'),
        (InversionConfig, {'stages': Stage(1, 0.1)}, 'it must be a tuple of stages'),
        (InversionConfig, {'contrast': 0.0}, 'contrast is 0.0; it must be above 0'),
    ],
)
def test_settings_are_validated_when_they_are_made(cls, fields, sentence):
    usual = {'iterations': 5, 'learning_rate': 0.1} if cls is Stage else {'stages': (Stage(5, 0.1),)}
    with pytest.raises(DvinvError, match=sentence):
        cls(**{**usual, **fields})


def test_a_resolution_above_the_images_is_refused_before_anything_runs(teacher):
    config = _config(Stage(1, 0.1), Stage(1, 0.1, resolution=9))
    with pytest.raises(DvinvError, match=r'stages\[1\].resolution is 9, .* 8 pixels; choose at most 8'):
        make_inverter(teacher, config, make_mesh(1))


# Labels and presets


@pytest.mark.parametrize(('batch_size', 'classes'), [(1, 3), (7, 3), (10, 10), (256, 10), (84, 1000), (5, 7)])
def test_labels_are_balanced_in_each_batch_and_over_batches(batch_size, classes):
    batches = [balanced_labels(number, batch_size, classes) for number in range(9)]
    for labels in (*batches, np.concatenate(batches)):
        counts = np.bincount(labels, minlength=classes)
        assert np.ptp(counts) <= 1
        assert len(counts) == classes


def test_labels_of_far_batches_do_not_overflow():
    assert balanced_labels(10**9, 152, 1000)[0] == 152 * 10**9 % 1000


if __name__ == '__main__':  # writes the golden values anew
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez(GOLDEN, **_golden_run(tiny_teacher(), tiny_teacher(seed=1, channels=(3,))))
