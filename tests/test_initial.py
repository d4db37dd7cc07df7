"""Where inversions start: unit variance, two spectra, the same bits however the batch is made."""

import jax
import numpy as np
import pytest

from dvinv.inversion.initial import initial_images

SHAPE = (32, 24, 3)


def draw(kind, seed=0, batch_size=512):
    images, step_key = initial_images(jax.random.key(seed), batch_size, SHAPE, kind)
    assert images.dtype == np.float32
    assert images.shape == (batch_size, *SHAPE)
    return np.asarray(images), step_key


@pytest.mark.parametrize('kind', ['white', 'natural'])
def test_the_noise_has_mean_zero_and_unit_variance(kind):
    images, _ = draw(kind)
    assert abs(images.mean()) < 0.08
    assert images.var() == pytest.approx(1, abs=0.1)


def test_white_noise_is_the_papers():
    image_key, step_key = jax.random.split(jax.random.key(0))
    images, key = draw('white')
    np.testing.assert_array_equal(images, jax.random.normal(image_key, images.shape))
    assert key == step_key == draw('natural')[1]


def test_amplitudes_of_natural_noise_fall_as_one_over_frequency():
    images, _ = draw('natural')
    power = (np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2).mean((0, 3))
    assert power[0, 2] / power[0, 8] == pytest.approx(16, rel=0.2)
    assert power[4, 0] / power[8, 0] == pytest.approx(4, rel=0.2)
    white = (np.abs(np.fft.fft2(draw('white')[0], axes=(1, 2))) ** 2).mean((0, 3))
    assert white[0, 2] / white[0, 8] == pytest.approx(1, rel=0.2)


def test_natural_images_are_dark_or_bright_as_a_whole_and_their_colours_go_together():
    means = {kind: draw(kind)[0].mean((1, 2)) for kind in ('white', 'natural')}
    assert means['natural'].std() > 10 * means['white'].std()
    assert np.corrcoef(means['natural'].T)[0, 1] == pytest.approx(0.85, abs=0.05)
    assert abs(np.corrcoef(means['white'].T)[0, 1]) < 0.2


def test_grey_pictures_have_unit_variance_too():
    images, _ = initial_images(jax.random.key(0), 512, (8, 8, 1), 'natural')
    assert np.var(images) == pytest.approx(1, abs=0.15)
