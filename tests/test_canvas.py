"""What Adam moves, and what it is painted as: two spectra, pixels within range, the same bits as ever for the paper's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvinv.inversion import PRESETS, InversionConfig, Stage, Weights, invert
from dvinv.inversion.canvas import blank_canvas, make_paint
from dvinv.networks import Classifier

SHAPE = (32, 24, 3)


def pixels(shape):
    """A classifier that takes pixels as they are."""
    return Classifier(None, None, shape, 10, (0.0,) * shape[-1], (1.0,) * shape[-1])


def drawn(kind, contrast=0.6, batch_size=512, shape=SHAPE):
    canvas, _ = blank_canvas(jax.random.key(0), batch_size, shape)
    images = make_paint(kind, contrast, pixels(shape))(canvas)
    assert images.dtype == np.float32
    assert images.shape == (batch_size, *shape)
    return np.asarray(images)


def squashed(images):
    """What the sigmoid took."""
    return np.log(images / (1 - images))


def test_the_canvas_is_the_papers_white_noise_and_pixels_are_the_canvas():
    canvas_key, step_key = jax.random.split(jax.random.key(0))
    canvas, key = blank_canvas(jax.random.key(0), 512, SHAPE)
    np.testing.assert_array_equal(canvas, jax.random.normal(canvas_key, canvas.shape))
    np.testing.assert_array_equal(drawn('pixels'), canvas)
    assert key == step_key


@pytest.mark.parametrize('contrast', [0.3, 0.6])
def test_a_spectrum_starts_grey_on_average_with_the_asked_contrast_and_keeps_pixels_in_range(contrast):
    images = drawn('spectrum', contrast)
    assert images.min() > 0
    assert images.max() < 1
    assert images.mean() == pytest.approx(0.5, abs=0.02)
    assert squashed(images).std() == pytest.approx(contrast, rel=0.05)


def test_amplitudes_fall_as_one_over_frequency():
    power = (np.abs(np.fft.fft2(squashed(drawn('spectrum')), axes=(1, 2))) ** 2).mean((0, 3))
    assert power[0, 2] / power[0, 8] == pytest.approx(16, rel=0.2)
    assert power[4, 0] / power[8, 0] == pytest.approx(4, rel=0.2)
    white = (np.abs(np.fft.fft2(drawn('pixels'), axes=(1, 2))) ** 2).mean((0, 3))
    assert white[0, 2] / white[0, 8] == pytest.approx(1, rel=0.2)


def test_images_are_dark_or_bright_as_a_whole_and_their_colours_go_together():
    means = squashed(drawn('spectrum')).mean((1, 2))
    assert means.std() > 0.1  # of white noise with that contrast: 0.02
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(0.85, abs=0.05)


@pytest.mark.parametrize('shape', [(8, 8, 1), (7, 5, 3), (9, 4, 4)])
def test_any_shape_and_any_number_of_channels(shape):
    assert squashed(drawn('spectrum', 0.5, shape=shape)).std() == pytest.approx(0.5, rel=0.15)


def test_one_image_does_not_depend_on_the_others_of_its_batch():
    canvas, _ = blank_canvas(jax.random.key(0), 4, SHAPE)
    paint = make_paint('spectrum', 0.6, pixels(SHAPE))
    np.testing.assert_allclose(paint(canvas)[1:2], paint(canvas[1:2]), atol=1e-6)


def test_a_step_on_the_canvas_moves_coarse_shapes_further_than_fine_ones():
    paint = make_paint('spectrum', 0.6, pixels((32, 32, 1)))
    column = jnp.arange(32)

    def moved(frequency):
        wave = jnp.broadcast_to(jnp.cos(2 * jnp.pi * frequency * column / 32)[None, :, None], (1, 32, 32, 1))
        return float(jnp.abs(paint(0.01 * wave) - paint(0 * wave)).max())

    assert moved(1) / moved(8) == pytest.approx(8, rel=0.05)


def test_an_inversion_through_the_spectrum_ends_in_pixels_that_the_teacher_takes(teacher):
    config = InversionConfig(
        (Stage(40, 0.2, jitter=1),), Weights(feature=0.3, total_variation=0.0), canvas='spectrum', prior_on='image'
    )
    labels = np.arange(12, dtype=np.int32) % teacher.num_classes
    result = invert(teacher, labels, config, jax.random.key(0))
    low, high = teacher.valid_range
    assert (result.images >= low).all()
    assert (result.images <= high).all()
    for term in ('cross_entropy', 'feature'):
        assert result.metrics[term][-1] < result.metrics[term][0]
    white = invert(teacher, labels, dataclasses.replace(config, canvas='pixels'), jax.random.key(0))
    assert np.abs(white.images - result.images).max() > 0.1


def test_the_presets_say_which():
    assert PRESETS['cifar10_crop'].canvas == 'spectrum'
    assert PRESETS['cifar10_paper'].canvas == PRESETS['digits'].canvas == 'pixels'
