"""Figures of quality against their definitions, and features of any network."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny import tiny_teacher

from dvinv import evaluation
from dvinv.evaluation import with_features
from dvinv.networks import create, initialise
from dvinv.runtime.errors import DvinvError

RNG = np.random.default_rng(0)


def test_the_inception_score_is_that_of_its_definition():
    assert evaluation.inception_score(np.zeros((7, 5))) == pytest.approx(1)
    assert evaluation.inception_score(50 * np.eye(5)) == pytest.approx(5)
    assert evaluation.inception_score(50 * np.eye(5)[[0, 0, 0]]) == pytest.approx(1)  # sure, but of one class alone
    masked = np.where(np.arange(5) < 3, 50 * np.eye(5), -np.inf)[:3]
    assert evaluation.inception_score(masked) == pytest.approx(3)


def test_the_frechet_distance_of_gaussians():
    x = RNG.normal(size=(400, 3))
    assert evaluation.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluation.frechet_distance(x, x + np.array([3, 0, 4])) == pytest.approx(25)
    assert evaluation.frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * np.trace(np.cov(x.T)))
    y = x @ RNG.normal(size=(3, 3))
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T)) - 2 * np.sqrt(product).sum()
    assert evaluation.frechet_distance(x, y) == pytest.approx(expected)


def test_the_kernel_distance_is_unbiased():
    same = [evaluation.kernel_distance(*RNG.normal(size=(2, 20, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5
    assert min(same) < 0
    assert evaluation.kernel_distance(RNG.normal(size=(50, 4)), RNG.normal(size=(50, 4)) + 2) > 10 * np.std(same)


def test_spread_tells_one_picture_again_and_again_from_variety():
    labels, centres = np.repeat([0, 1], 50), np.repeat([[0.0, 0], [9, 0]], 50, axis=0)
    assert evaluation.spread(centres, labels) == 0
    assert evaluation.spread(RNG.normal(size=(100, 2)), labels) == pytest.approx(1, abs=0.05)
    assert evaluation.spread(np.zeros((3, 2)), np.arange(3)) is None


def test_nearest_is_the_cosine_of_another_image():
    x = np.array([[1.0, 0], [2, 0], [0, 1]])
    assert evaluation.nearest(x) == pytest.approx((1 + 1 + 0) / 3)


class Jitted(nn.Module):
    """A user's network, with a jitted part and two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        hidden = nn.relu(nn.jit(nn.Dense)(6, name='hidden')(x.reshape(len(x), -1)))
        self.sow('intermediates', 'kept', hidden)
        return nn.Dense(3)(hidden)


def test_features_are_what_the_last_layer_is_fed_with():
    module, x = Jitted(), RNG.normal(size=(4, 5, 5, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    logits, features = with_features(lambda v, x: module.apply({'params': v['params']}, x))(variables, x)
    expected, kept = module.apply({'params': variables['params']}, x, mutable='intermediates')
    np.testing.assert_allclose(features, kept['intermediates']['kept'][0], rtol=1e-5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'features'), [('resnet20', 16), ('squeezenet1_1', 128)])
def test_a_convolution_as_the_head_has_features_over_space(name, features):
    module, x = create(name, 10, 0.25), RNG.normal(size=(2, 48, 48, 3)).astype(np.float32)
    variables = initialise(module, jax.random.key(0), x.shape[1:])
    logits, found = with_features(lambda v, x: module.apply(v, x, train=False))(variables, x)
    assert (logits.shape, found.shape) == ((2, 10), (2, features))


def test_a_judgement_takes_all_images_once_in_order():
    network, images = tiny_teacher(), RNG.integers(0, 256, (5, *tiny_teacher().image_shape), dtype=np.uint8)
    judged = evaluation.judge(network, images, np.arange(5), batch_size=2)
    direct = network.apply_fn(network.variables, network.normalise(images))
    np.testing.assert_allclose(judged.logits, direct, rtol=1e-4, atol=1e-5)
    figures = evaluation.quality_figures(judged, judged)
    assert (figures['frechet_distance'], figures['kernel_distance']) == (0, 0)  # not what rounding leaves of it
    assert figures['spread'] is None  # five classes, an image each
    assert evaluation.quality_figures(judged)['kernel_distance'] is None


def test_too_few_images_are_told():
    network = tiny_teacher()
    one = evaluation.judge(network, np.zeros((1, *network.image_shape), np.uint8), np.zeros(1, int))
    with pytest.raises(DvinvError, match='fewer than two images'):
        evaluation.quality_figures(one)
