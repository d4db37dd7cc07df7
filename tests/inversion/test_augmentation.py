"""What a network is shown: each change of the pictures, and that a split batch is shown the same."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dvinv.config import Stage
from dvinv.inversion.augmentation import (
    Augmentation,
    add_noise,
    average_pool,
    color_jitter_each,
    crop_each,
    cutmix,
    flip,
    flip_each,
    mixup,
    resized_crop_each,
    roll,
    scaled_down,
)
from dvinv.networks.classifier import Classifier
from dvinv.runtime.devices import AXIS, make_mesh

MEAN, STD = np.array([0.4, 0.6], np.float32), np.array([0.2, 0.3], np.float32)
BLACK = -MEAN / STD
NETWORK = Classifier(lambda variables, x: x, {}, (6, 5, 2), 2, (0.4, 0.6), (0.2, 0.3))


def _images(batch=8, height=6, width=5):
    return np.random.default_rng(0).normal(size=(batch, height, width, 2)).astype(np.float32)


def test_pooling_takes_means_of_squares():
    x = _images(2, 6, 4)
    expected = np.stack([[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2)] for i in (0, 2, 4)])
    np.testing.assert_allclose(average_pool(x, 2), np.moveaxis(expected, 2, 0), rtol=1e-6, atol=1e-7)
    assert average_pool(x, 1) is x


@pytest.mark.parametrize('size', [(3, 2), (2, 4), (6, 4), (1, 1)])
def test_sizes_that_divide_are_means_of_squares_or_interpolated(size):
    x = _images(2, 6, 4)
    if 6 / size[0] == 4 / size[1]:
        assert np.array_equal(scaled_down(x, size), average_pool(x, 6 // size[0]))
    else:
        expected = jax.image.resize(x, (2, *size, 2), 'linear', antialias=True)
        np.testing.assert_allclose(scaled_down(x, size), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [(5, 4), (4, 3), (6, 3), (1, 5)])
def test_scaling_down_keeps_one_colour_and_moves_nothing(size):
    """A picture that is the same mirrored stays so; what is scaled has about the old mean, and feels every pixel."""
    plain = np.broadcast_to(np.float32([0.3, -2.0]), (1, 6, 5, 2))
    np.testing.assert_allclose(scaled_down(plain, size), np.broadcast_to(plain[:, :1, :1], (1, *size, 2)), rtol=1e-6)
    x = _images(2, 6, 5)
    np.testing.assert_allclose(scaled_down(x[:, ::-1, ::-1], size), scaled_down(x, size)[:, ::-1, ::-1], atol=1e-6)
    assert abs(scaled_down(x + 5, size).mean() / (x + 5).mean() - 1) < 0.02
    gradient = jax.grad(lambda x: scaled_down(x, size).sum())(x)
    assert gradient.min() > 0
    np.testing.assert_allclose(gradient.sum((1, 2)), size[0] * size[1], rtol=1e-5)


@pytest.mark.parametrize(
    ('resolution', 'image', 'shown'),
    [
        (0, (7, 9), (7, 9)),
        (112, (224, 224), (112, 112)),
        (160, (224, 224), (160, 160)),
        (4, (8, 9), (4, 5)),
        (5, (8, 9), (5, 6)),
        (2, (40, 3), (2, 1)),
        (3, (9, 1), (3, 1)),
    ],
)
def test_a_stage_keeps_the_shape_of_the_images_to_half_a_pixel(resolution, image, shown):
    assert Stage(1, 0.1, resolution=resolution).view_size(*image) == shown


@pytest.mark.slow
def test_roll_wraps_by_one_offset_for_the_batch():
    x, seen = _images(), set()
    shifts = {(i, j): np.roll(x, (i, j), (1, 2)).tobytes() for i in range(-2, 3) for j in range(-2, 3)}
    for key in jax.random.split(jax.random.key(0), 60):
        shown = np.asarray(roll(key, x, 2)).tobytes()
        seen |= {offset for offset, rolled in shifts.items() if rolled == shown} or {'no roll of the whole batch'}
    assert seen <= set(shifts)
    assert {i for i, _ in seen} == {j for _, j in seen} == {-2, -1, 0, 1, 2}


def test_crop_cuts_a_window_of_its_own_from_each_image_and_brings_in_black():
    x, pixels = _images(64), 1
    shown = np.asarray(crop_each(jax.random.key(0), x, pixels, BLACK))
    padded = np.stack([np.pad(x[..., c], ((0, 0), (1, 1), (1, 1)), constant_values=BLACK[c]) for c in (0, 1)], -1)
    offsets = []
    for image, source in zip(shown, padded, strict=True):
        windows = {(i, j): source[i : i + 6, j : j + 5] for i in range(3) for j in range(3)}
        offsets += [at for at, window in windows.items() if np.allclose(image, window, atol=1e-6)]
    assert len(offsets) == 64
    assert len(set(offsets)) == 9


def test_no_shift_leaves_images_as_they_are():
    assert crop_each(jax.random.key(0), _images(), 0, BLACK).tobytes() == _images().tobytes()


def test_flip_is_one_fair_coin_for_the_batch():
    x = _images()
    coins = []
    for key in jax.random.split(jax.random.key(0), 60):
        shown = np.asarray(flip(key, x))
        assert shown.tobytes() in (x.tobytes(), x[:, :, ::-1].tobytes())
        coins.append(shown.tobytes() != x.tobytes())
    assert 0.25 < np.mean(coins) < 0.75


def test_flip_each_is_a_fair_coin_an_image():
    x = _images(200)
    shown = np.asarray(flip_each(jax.random.key(0), x))
    mirrored = (shown == x[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (shown == x).all((1, 2, 3))).all()
    assert 0.35 < mirrored.mean() < 0.65


def test_noise_has_a_deviation_of_its_own_in_each_image_up_to_the_bound():
    x, most = _images(200, 32, 32), np.array([0.5, 0.25], np.float32)
    noise = np.asarray(add_noise(jax.random.key(0), x, most)) - x
    deviations = noise.std((1, 2)) / most  # of 1,024 pixels: within 10% of the true ones
    np.testing.assert_allclose(deviations[:, 0], deviations[:, 1], rtol=0.2)
    assert deviations.max() < 1.1
    assert deviations.min() < 0.05
    np.testing.assert_allclose(np.quantile(deviations, (0.25, 0.5, 0.75)), (0.25, 0.5, 0.75), atol=0.1)
    np.testing.assert_allclose(noise.mean((1, 2)), 0, atol=0.1)


def test_noise_is_given_for_pixels_from_zero_to_one():
    shown = Augmentation(noise=0.1)(jax.random.key(0), np.zeros((200, 32, 32, 2), np.float32), NETWORK)
    deviations = np.asarray(shown).std((1, 2)) * STD
    assert 0.09 < deviations.max() < 0.11


@pytest.mark.parametrize('kind', ['roll', 'crop'])
def test_without_settings_images_are_shown_as_they_are(kind):
    np.testing.assert_array_equal(Augmentation(kind)(jax.random.key(0), _images(), NETWORK), _images())


def _whole_and_split(look, devices):
    key, x = jax.random.key(3), _images(16)
    whole = jax.jit(lambda x: look(key, x, NETWORK))(x)
    split = jax.jit(
        jax.shard_map(lambda x: look(key, x, NETWORK, AXIS), mesh=make_mesh(devices), in_specs=P(AXIS), out_specs=P(AXIS))
    )(x)
    assert np.abs(np.asarray(whole) - x).max() > 0.1
    return np.asarray(whole), np.asarray(split)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['roll', 'crop'])
@pytest.mark.parametrize('devices', [2, 8])
def test_a_split_batch_is_shown_the_same_to_the_bit(kind, devices):
    whole, split = _whole_and_split(Augmentation(kind, shift=2, flip=True), devices)
    assert split.tobytes() == whole.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 8])
def test_a_split_batch_gets_the_same_noise(devices):
    # To the last bit but one: XLA rounds Gaussians differently in loops of different length.
    np.testing.assert_allclose(*_whole_and_split(Augmentation(noise=0.1), devices), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_resized_crop_is_a_scaled_window_of_each_image():
    rows, columns = np.meshgrid(np.arange(24.0), np.arange(20.0), indexing='ij')
    x = np.broadcast_to(np.stack([rows, columns], -1), (64, 24, 20, 2)).astype(np.float32)
    shown = np.asarray(resized_crop_each(jax.random.key(0), x, 0.25))
    assert shown.shape == x.shape
    middle = shown[:, 5:-5, 5:-5]  # away from the edges, where the nearest pixel stands in for those beyond
    height, width = np.diff(middle[..., 0], axis=1), np.diff(middle[..., 1], axis=2)
    for slope in (height, width):  # a share of the image's length, the same all over an image
        np.testing.assert_allclose(slope, np.broadcast_to(slope[:, :1, :1], slope.shape), atol=1e-3)
    height, width = height[:, 0, 0], width[:, 0, 0]
    assert 0.25 < (height * width).min() < 0.5 < (height * width).max() <= 1.01
    assert (height / width).min() > 0.74
    assert (height / width).max() < 1.35
    assert (shown[..., 0].min() >= 0, shown[..., 0].max() <= 23) == (True, True)
    assert len(set(height.round(3))) > len(x) / 2  # a window of its own


def test_color_jitter_changes_mean_contrast_and_tint_of_each_image_but_not_its_pattern():
    x = _images(400)
    shown = np.asarray(color_jitter_each(jax.random.key(0), x, 0.2))
    flat, flat_shown = (a.reshape(400, -1, 2) for a in (x, shown))
    pattern, pattern_shown = (a - a.mean(1, keepdims=True) for a in (flat, flat_shown))
    contrast = (pattern * pattern_shown).sum((1, 2)) / np.square(pattern).sum((1, 2))
    np.testing.assert_allclose(pattern_shown, contrast[:, None, None] * pattern, atol=1e-4)
    assert np.std(np.log(contrast)) == pytest.approx(0.2, rel=0.1)
    mean = x.mean((1, 2, 3), keepdims=True)
    expected = mean + (x - mean) * contrast[:, None, None, None]  # without brightness and tint
    shift = ((shown - expected) / x.std((1, 2, 3), keepdims=True)).mean((1, 2))  # [B, C]
    assert shift.std() == pytest.approx(0.2 * np.sqrt(1 + 1 / 4), rel=0.15)  # deviations .2 and .1 add up
    assert np.std(shift[:, 0] - shift[:, 1]) == pytest.approx(0.1 * np.sqrt(2), rel=0.15)  # a tint for each channel


def test_cutmix_pastes_a_rectangle_of_another_image_at_the_same_place():
    x = np.broadcast_to(np.arange(400.0, dtype=np.float32)[:, None, None, None], (400, 8, 8, 1))
    shown = np.asarray(cutmix(jax.random.key(0), x, 0.5))[..., 0]
    others = np.arange(400)[::-1, None, None]
    pasted = shown == others
    assert (pasted | (shown == np.arange(400)[:, None, None])).all()
    rows, columns = pasted.any(2), pasted.any(1)
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None, :])  # rectangles
    assert 0.4 < pasted.any((1, 2)).mean() < 0.6
    assert 0.1 < pasted.mean() < 0.25


@pytest.mark.slow
def test_mixup_mixes_every_image_with_another_by_one_share():
    x = _images()
    shares = set()
    for key in jax.random.split(jax.random.key(0), 20):
        shown = np.asarray(mixup(key, x, 0.4))
        share = ((shown - x[::-1]) * (x - x[::-1])).sum() / ((x - x[::-1]) ** 2).sum()
        np.testing.assert_allclose(shown, share * x + (1 - share) * x[::-1], atol=1e-5)
        shares.add(round(float(share), 2))
    assert min(shares) < 0.2 < 0.8 < max(shares)


@pytest.mark.slow
def test_both_are_parts_of_an_augmentation():
    x, key = _images(), jax.random.key(0)
    assert not np.allclose(Augmentation(resized_crop=0.3)(key, x, NETWORK), x, atol=0.1)
    assert not np.allclose(Augmentation(mixup=1.0)(key, x, NETWORK), x, atol=0.1)
    np.testing.assert_array_equal(Augmentation()(key, x, NETWORK), x)
