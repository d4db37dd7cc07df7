"""What Adam moves, and what it is painted as: two spectra, pixels within range, the same bits as ever for the paper's."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, pixels_only, trained_variables

from dvinv.config import PRESETS, InversionConfig, Stage, Weights
from dvinv.inversion import feature_loss, invert
from dvinv.inversion.step import InversionState, initial_parameters, make_decode, make_step, pixel_scale_of, rescaled
from dvinv.inversion.teacher import trusted_linen
from dvinv.runtime.errors import DvinvError

SHAPE = (32, 24, 3)


def pixels(shape):
    """A classifier that takes pixels as they are."""
    return pixels_only(shape, 10, (0.0,) * shape[-1], (1.0,) * shape[-1])


def drawn(kind, contrast=0.6, batch_size=512, shape=SHAPE):
    parameters, _ = initial_parameters(jax.random.key(0), batch_size, shape)
    images = make_decode(kind, contrast, pixels(shape))(parameters)
    assert images.dtype == np.float32
    assert images.shape == (batch_size, *shape)
    return np.asarray(images)


def squashed(images):
    """What the sigmoid took."""
    return np.log(images / (1 - images))


@pytest.mark.slow
def test_the_canvas_is_the_papers_white_noise_and_pixels_are_the_canvas():
    parameters_key, step_key = jax.random.split(jax.random.key(0))
    parameters, key = initial_parameters(jax.random.key(0), 512, SHAPE)
    np.testing.assert_array_equal(parameters, jax.random.normal(parameters_key, parameters.shape))
    np.testing.assert_array_equal(drawn('pixels'), parameters)
    assert key == step_key


@pytest.mark.parametrize('contrast', [0.3, 0.6])
def test_a_spectrum_starts_grey_on_average_with_the_asked_contrast_and_keeps_pixels_in_range(contrast):
    images = drawn('fourier', contrast)
    assert images.min() > 0
    assert images.max() < 1
    assert images.mean() == pytest.approx(0.5, abs=0.02)
    assert squashed(images).std() == pytest.approx(contrast, rel=0.05)


def test_amplitudes_fall_as_one_over_frequency():
    power = (np.abs(np.fft.fft2(squashed(drawn('fourier')), axes=(1, 2))) ** 2).mean((0, 3))
    assert power[0, 2] / power[0, 8] == pytest.approx(16, rel=0.2)
    assert power[4, 0] / power[8, 0] == pytest.approx(4, rel=0.2)
    white = (np.abs(np.fft.fft2(drawn('pixels'), axes=(1, 2))) ** 2).mean((0, 3))
    assert white[0, 2] / white[0, 8] == pytest.approx(1, rel=0.2)


def test_images_are_dark_or_bright_as_a_whole_and_their_colours_go_together():
    means = squashed(drawn('fourier')).mean((1, 2))
    assert means.std() > 0.1  # of white noise with that contrast: 0.02
    assert np.corrcoef(means.T)[0, 1] == pytest.approx(0.85, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(8, 8, 1), (7, 5, 3), (9, 4, 4)])
def test_any_shape_and_any_number_of_channels(shape):
    assert squashed(drawn('fourier', 0.5, shape=shape)).std() == pytest.approx(0.5, rel=0.15)


def test_one_image_does_not_depend_on_the_others_of_its_batch():
    parameters, _ = initial_parameters(jax.random.key(0), 4, SHAPE)
    decode = make_decode('fourier', 0.6, pixels(SHAPE))
    np.testing.assert_allclose(decode(parameters)[1:2], decode(parameters[1:2]), atol=1e-6)


def test_a_step_on_the_canvas_moves_coarse_shapes_further_than_fine_ones():
    decode = make_decode('fourier', 0.6, pixels((32, 32, 1)))
    column = jnp.arange(32)

    def moved(frequency):
        wave = jnp.broadcast_to(jnp.cos(2 * jnp.pi * frequency * column / 32)[None, :, None], (1, 32, 32, 1))
        return float(jnp.abs(decode(0.01 * wave) - decode(0 * wave)).max())

    assert moved(1) / moved(8) == pytest.approx(8, rel=0.05)


@pytest.mark.slow
def test_an_inversion_through_the_spectrum_ends_in_pixels_that_the_teacher_takes(teacher):
    config = InversionConfig(
        (Stage(40, 0.2, jitter=1),), Weights(feature=0.3, total_variation=0.0), parameterization='fourier', prior_on='image'
    )
    labels = np.arange(12, dtype=np.int32) % teacher.num_classes
    result = invert(teacher, labels, config, jax.random.key(0))
    low, high = teacher.valid_range
    assert (result.images >= low).all()
    assert (result.images <= high).all()
    for term in ('cross_entropy', 'feature'):
        assert result.metrics[term][-1] < result.metrics[term][0]
    white = invert(teacher, labels, dataclasses.replace(config, parameterization='pixels'), jax.random.key(0))
    assert np.abs(white.images - result.images).max() > 0.1


def test_the_presets_say_which():
    assert PRESETS['cifar10_crop'].parameterization == 'fourier'
    assert PRESETS['cifar10_paper'].parameterization == PRESETS['digits'].parameterization == 'pixels'


class Twin(TinyNet):
    """A TinyNet for pixels of another scale: it takes `std` times what a TinyNet takes, plus `mean`."""

    mean: tuple = ()
    std: tuple = ()

    @nn.compact
    def __call__(self, x):
        return super().__call__((x - jnp.array(self.mean)) / jnp.array(self.std))


def twin(mean, std):
    """A teacher that answers as `tiny_teacher` does, for pixels that are normalised by `mean` and `std`."""
    old, new = (np.float64(values) for values in ((MEAN, STD), (mean, std)))
    module = Twin(mean=tuple((old[0] - new[0]) / new[1]), std=tuple(old[1] / new[1]))
    return trusted_linen(module, trained_variables(TinyNet()), image_shape=IMAGE_SHAPE, mean=mean, std=std)


@pytest.mark.slow
@pytest.mark.parametrize('parameterization', ['pixels', 'fourier'])
def test_networks_for_pixels_of_any_scale_give_the_same_images(teacher, parameterization):
    weights = Weights(feature=0.3, first_bn_multiplier=2.0, total_variation=1e-2, l2=1e-2)
    stage = Stage(4, 0.2, augmentation='crop', jitter=1, noise=0.1)
    config, labels = (
        InversionConfig((stage,), weights, parameterization=parameterization),
        np.arange(6, dtype=np.int32) % teacher.num_classes,
    )

    def begun(teacher):
        parameters, key = initial_parameters(jax.random.key(3), 6, IMAGE_SHAPE)
        state = InversionState(parameters, stage.make_optimizer().init(parameters), jnp.zeros((), jnp.int32), key)
        step = jax.jit(make_step(teacher, config, stage), compiler_options={'xla_backend_optimization_level': 0})
        for _ in range(2):
            state, terms = step(state, labels, teacher.variables, None)
        decode = make_decode(config.parameterization, config.contrast, teacher, pixel_scale_of(config.pixel_scale, teacher))
        return np.asarray(decode(state.parameters)) * np.float32(teacher.std) + np.float32(teacher.mean), terms

    images, terms = begun(teacher)
    other, others = begun(twin((0, 0.1), (1 / 255, 2.0)))
    np.testing.assert_allclose(other, images, atol=1e-3)
    for term, value in terms.items():
        np.testing.assert_allclose(others[term], value, rtol=1e-3, err_msg=term)


def test_normalised_pixels_keep_their_scale_in_the_published_presets_and_raw_ones_do_not(teacher):
    assert pixel_scale_of('network', teacher) is teacher
    raw = dataclasses.replace(teacher, mean=(0.0, 0.0), std=(1 / 255,) * 2)
    assert (
        pixel_scale_of('network', raw)
        == pixel_scale_of('common', raw)
        == pixel_scale_of('common', dataclasses.replace(raw, std=(1.0, 1.0)))
    )
    x = np.random.default_rng(0).normal(size=(2, *IMAGE_SHAPE)).astype(np.float32)
    scale = pixel_scale_of('common', teacher)
    pixels = x * np.float32(STD) + np.float32(MEAN)
    np.testing.assert_allclose(rescaled(x, teacher, scale), (pixels - 0.5) / 0.25, rtol=1e-4, atol=1e-5)
    assert rescaled(x, teacher, teacher) is x


@pytest.mark.slow
def test_the_settings_and_the_key_may_be_left_out(teacher, monkeypatch):
    monkeypatch.setitem(PRESETS, '8px', dataclasses.replace(PRESETS['8px'], stages=(Stage(1, 0.1),)))
    first = invert(teacher, [0, 1, 2])
    np.testing.assert_array_equal(first.images, invert(teacher, [0, 1, 2], '8px', jax.random.key(0)).images)
    pixels = teacher.to_uint8(first.images)
    loss = feature_loss(teacher, pixels)
    assert loss == pytest.approx(first.metrics['feature'][0], rel=0.3)
    with pytest.raises(DvinvError, match=r'shape \(3, 8, 8\); the network takes \[B, 8, 8, 2\]'):
        feature_loss(teacher, pixels[..., 0])
    with pytest.raises(DvinvError, match=r'float32 with values from .* to 255, .* Pixels from 0 to 255 must be uint8'):
        feature_loss(teacher, np.maximum(pixels, 255 * (pixels == pixels.max())).astype(np.float32))
    assert np.isfinite(feature_loss(teacher, 3 * first.images))  # beyond black and white, as without clip
