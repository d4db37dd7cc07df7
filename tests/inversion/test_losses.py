"""Every loss against its formula in numpy, and what its form promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_teacher

from dvinv.distillation.student import distillation_loss
from dvinv.inversion import losses

LN2 = np.log(2)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).normal(size=(3, 5, 4, 2)).astype(np.float32)


def _logits(seed, scale=1.0, shape=(4, 5)):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def _softmax(logits, temperature=1.0):
    exps = np.exp(np.asarray(logits, np.float64) / temperature)
    return exps / exps.sum(-1, keepdims=True)


def _divergence(p, q):
    return (p * np.log(p / q)).sum(-1)


def _jensen_shannon(p, q):
    return (_divergence(p, (p + q) / 2) + _divergence(q, (p + q) / 2)) / 2


def _shifts(x):
    """The four pairs of neighbours, pixel by pixel."""
    _, height, width, _ = x.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [
            (x[:, i + down, j + right], x[:, i, j])
            for i in range(height)
            for j in range(width)
            if i + down < height and 0 <= j + right < width
        ]
        yield np.stack([a - b for a, b in pairs])


# The norm


def test_the_norm_is_not_squared_and_its_gradient_at_zero_is_zero():
    x = np.array([3.0, 4.0], np.float32)
    np.testing.assert_allclose(losses.safe_norm(x), 5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(losses.safe_norm)(x), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(losses.safe_norm)(np.zeros(3, np.float32)), 0)


@pytest.mark.slow
@pytest.mark.parametrize('loss', [*losses.TOTAL_VARIATION.values(), *losses.L2.values()])
def test_priors_of_a_flat_black_batch_have_the_gradient_zero(loss):
    np.testing.assert_array_equal(jax.grad(loss)(np.zeros((2, 4, 4, 1), np.float32)), 0)


# Cross-entropy


def test_cross_entropy_is_the_mean_over_images():
    logits, labels = _logits(1), np.array([0, 4, 2, 2])
    expected = -np.log(_softmax(logits)[np.arange(4), labels]).mean()
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)


# The feature term


@pytest.fixture(scope='module')
def features():
    rng = np.random.default_rng(2)

    def draw(channels):
        return rng.normal(size=channels).astype(np.float32), rng.uniform(1, 2, channels).astype(np.float32)

    return {'b': draw(3), 'a': draw(7)}, {'a': draw(7), 'b': draw(3)}


def test_the_feature_term_sums_unsquared_norms_over_layers_without_dividing(features):
    moments, statistics = features
    terms = losses.feature_terms(moments, statistics)
    for layer, (mean, variance) in moments.items():
        expected = np.sqrt(((mean - statistics[layer][0]) ** 2).sum()) + np.sqrt(
            ((variance - statistics[layer][1]) ** 2).sum()
        )
        np.testing.assert_allclose(terms[layer], expected, rtol=1e-6)
    np.testing.assert_allclose(losses.feature_loss(terms), float(terms['a']) + float(terms['b']), rtol=1e-6)


def test_the_multiplier_is_of_the_first_layer_in_forward_order(features):
    terms = losses.feature_terms(*features)
    np.testing.assert_allclose(losses.feature_loss(terms, 10.0), float(terms['a']) + 10 * float(terms['b']), rtol=1e-6)


def test_the_feature_term_of_matching_moments_is_zero_with_the_gradient_zero(features):
    _, statistics = features

    def loss(moments):
        return losses.feature_loss(losses.feature_terms(moments, statistics))

    value, gradient = jax.value_and_grad(loss)(statistics)
    assert 0 <= value < 1e-5
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


# Priors


def test_total_variation_l2_is_four_norms_of_the_whole_batch(images):
    expected = sum(np.sqrt((d**2).sum()) for d in _shifts(images))
    np.testing.assert_allclose(losses.total_variation_l2(images), expected, rtol=1e-6)


def test_total_variation_l1_is_four_means(images):
    expected = sum(np.abs(d).mean() for d in _shifts(images))
    np.testing.assert_allclose(losses.total_variation_l1(images), expected, rtol=1e-6)


def test_l2_of_images_and_of_the_batch(images):
    squares = (images.astype(np.float64) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(losses.l2_per_image(images), np.sqrt(squares).mean(), rtol=1e-6)
    np.testing.assert_allclose(losses.l2_per_batch(images), np.sqrt(squares.sum()), rtol=1e-6)


@pytest.mark.parametrize(
    ('loss', 'growth'),
    [(losses.total_variation_l2, 2), (losses.l2_per_batch, 2), (losses.total_variation_l1, 1), (losses.l2_per_image, 1)],
)
def test_growth_with_four_times_the_batch(images, loss, growth):
    np.testing.assert_allclose(loss(np.tile(images, (4, 1, 1, 1))), growth * loss(images), rtol=1e-6)


# Competition


@pytest.mark.parametrize('scale', [0.1, 3.0, 20.0])
def test_jensen_shannon_is_the_formula_symmetric_and_at_most_ln_2(scale):
    p, q = _logits(3, scale), _logits(4, scale)
    value = np.asarray(losses.jensen_shannon(p, q, 3.0))
    np.testing.assert_allclose(value, _jensen_shannon(_softmax(p, 3), _softmax(q, 3)), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(value, losses.jensen_shannon(q, p, 3.0), rtol=1e-5, atol=1e-7)
    assert np.all((value >= 0) & (value <= LN2 + 1e-6))


def test_competition_uses_temperature_three_and_the_mean_over_images():
    p, q = _logits(5, 4.0), _logits(6, 4.0)
    expected = 1 - _jensen_shannon(_softmax(p, 3), _softmax(q, 3)).mean()
    np.testing.assert_allclose(losses.competition(p, q), expected, rtol=1e-5)


def test_competition_of_equal_networks_is_one():
    np.testing.assert_allclose(losses.competition(_logits(7), _logits(7)), 1, atol=1e-6)


@pytest.mark.slow
def test_confident_disagreement_costs_least_and_still_has_a_gradient():
    p, q = (jnp.zeros((1, 4)).at[0, winner].set(12.0) for winner in (0, 1))  # softmax(12 / 3) of the winner: .95
    value, gradients = jax.value_and_grad(losses.competition, (0, 1))(p, q)
    assert 1 - LN2 < value < 0.5
    for gradient in gradients:
        assert 0.01 < np.abs(gradient).max() < 1


def _divergence_where_p(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize('masked', ['teacher', 'both'])
def test_masked_classes_count_as_zero_times_log_zero(masked):
    """Logits of -inf: KL and JS are those over the other classes, and so are their gradients."""
    student, teacher = _logits(15, 2.0), _logits(16, 2.0)
    teacher[:, [1, 3]] = -np.inf
    if masked == 'both':
        student[:, 3] = -np.inf
    p, q = _softmax(teacher), _softmax(student)
    value, gradient = jax.value_and_grad(_distil(1.0))(student, teacher)
    np.testing.assert_allclose(value, _divergence_where_p(p, q).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, (q - p) / len(p), atol=1e-6)
    p, q = _softmax(teacher, 3), _softmax(student, 3)
    middle = (p + q) / 2
    expected = (_divergence_where_p(p, middle) + _divergence_where_p(q, middle)).mean() / 2
    value, gradients = jax.value_and_grad(losses.competition, (0, 1))(teacher, student)
    np.testing.assert_allclose(value, 1 - expected, rtol=1e-5)
    steep = jax.grad(losses.competition, (0, 1))(np.maximum(teacher, -200), np.maximum(student, -200))
    np.testing.assert_allclose(gradients, steep, atol=1e-6)
    assert np.isfinite(losses.cross_entropy(teacher, np.array([0, 2, 4, 0])))


# Half precision


def test_logits_in_bfloat16_are_weighed_in_float32():
    p, q, labels = _logits(8).astype(jnp.bfloat16), _logits(9).astype(jnp.bfloat16), np.array([0, 1, 2, 3])
    p32, q32 = p.astype(np.float32), q.astype(np.float32)
    for value, exact in (
        (losses.cross_entropy(p, labels), losses.cross_entropy(p32, labels)),
        (losses.competition(p, q), losses.competition(p32, q32)),
    ):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=1e-6)


# Distillation


def _distil(temperature):
    """The loss for a teacher whose logits are its variables."""
    teacher = dataclasses.replace(tiny_teacher(), apply_fn=lambda variables, x: variables)
    loss = distillation_loss(teacher, temperature)
    return lambda student_logits, teacher_logits: loss(student_logits, {}, None, None, teacher_logits, 0.0)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_distillation_is_the_teachers_divergence_times_temperature_squared(temperature):
    student, teacher = _logits(10, 2.0), _logits(11, 2.0)
    expected = temperature**2 * _divergence(_softmax(teacher, temperature), _softmax(student, temperature)).mean()
    np.testing.assert_allclose(_distil(temperature)(student, teacher), expected, rtol=1e-5)


def test_the_size_of_the_distillation_gradient_hardly_depends_on_the_temperature():
    student, teacher = _logits(12), _logits(13)
    small, large = (np.linalg.norm(jax.grad(_distil(t))(student, teacher)) for t in (4.0, 40.0))
    assert 0.9 < small / large < 1.1


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn():
    value, gradient = jax.value_and_grad(_distil(3.0))(_logits(14), _logits(14))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_first_layer_of_raw_pixels_is_in_units_of_its_deviation():
    rng = np.random.default_rng(0)
    moments, statistics = ({name: tuple(rng.uniform(0.5, 2, (2, 4))) for name in ('first', 'second')} for _ in range(2))

    def scaled(layers, by):
        (mean, variance), second = layers['first'], layers['second']
        return {'first': (by * mean, by**2 * variance), 'second': second}

    plain, raw, rawer = (losses.feature_terms(scaled(moments, by), scaled(statistics, by)) for by in (1, 64, 255))
    deviation = np.sqrt(statistics['first'][1].mean())
    np.testing.assert_allclose(raw['first'], rawer['first'], rtol=1e-5)
    mean, variance = (np.linalg.norm(moments['first'][i] - statistics['first'][i]) for i in (0, 1))
    np.testing.assert_allclose(plain['first'], mean + variance, rtol=1e-5)
    np.testing.assert_allclose(raw['first'], mean / deviation + variance / deviation**2, rtol=1e-5)
    np.testing.assert_allclose([raw['second'], rawer['second']], [plain['second']] * 2)
