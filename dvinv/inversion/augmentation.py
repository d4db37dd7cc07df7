"""Augmentation of the images that a network takes: scaling, cropping, shifting, mirroring, noise and mixing.

The paper rolls the whole batch by one random offset and flips it by one coin. The alternative, `crop`, pads each image
with black and cuts a random window that differs from image to image: running statistics describe the *augmented*
training set, so that a teacher trained on padded random crops should be given such crops here, too.

Random numbers are drawn for the whole batch, from a key that does not depend on the device; a device that holds a part of
the batch takes its slice of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dvinv.config import Stage, TrainingSettings
from dvinv.networks.classifier import AnyArray, Classifier, Images, PerChannel


def average_pool(x: Images, factor: int) -> Float[AnyArray, 'B H//{factor} W//{factor} C']:
    """Computes the means of `factor` x `factor` pixels: [B, H, W, C] -> [B, H/factor, W/factor, C]."""
    if factor == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def scaled_down(x: Images, size: tuple[int, int]) -> Float[AnyArray, 'B {size[0]} {size[1]} C']:
    """Scales images down to a smaller size.

    If one factor takes both height and width to `size`, a new pixel is the mean of a square of pixels. Otherwise it is the
    weighted mean of the pixels around its position, under a triangle that ends at the positions of the neighbouring new
    pixels (linear interpolation with antialiasing): one matrix product per axis.

    Args:
      x: [B, H, W, C].
      size: The new (height, width), neither larger than the old one.

    Returns:
      [B, *size, C].
    """
    height, width = x.shape[1:3]
    factor = height // size[0]
    if (factor * size[0], factor * size[1]) == (height, width):
        return average_pool(x, factor)
    for axis, (old, new) in enumerate(zip((height, width), size, strict=True), 1):
        if new != old:
            x = jnp.moveaxis(jnp.tensordot(x, _triangles(old, new), (axis, 0), precision='highest'), -1, axis)
    return x


def _triangles(old: int, new: int) -> np.ndarray:
    """Returns float32 [old, new], the weights of the pixels of a line in those of the scaled line; each column sums to 1."""
    step = old / new
    places = (np.arange(new) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[:, None] - places) / step)
    return (weights / weights.sum(0)).astype(np.float32)


def roll(key: jax.Array, x: Images, pixels: int) -> Images:
    """Rolls the whole batch by one offset, uniform in [-pixels, pixels] per axis; pixels wrap around at the border."""
    offset = jax.random.randint(key, (2,), -pixels, pixels + 1)
    return jnp.roll(x, offset, (1, 2))


def flip(key: jax.Array, x: Images) -> Images:
    """Mirrors the whole batch left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), x[:, :, ::-1], x)


def per_image(draw, local: int, axis: str | None):
    """Returns the rows of `draw(batch size)` for this device's images.

    Args:
      draw: A function from the number of images in the whole batch to random numbers, with one row per image.
      local: The number of images on this device.
      axis: The mesh axis over which the batch is split, or None.
    """
    if axis is None:
        return draw(local)
    rows = draw(local * jax.lax.axis_size(axis))
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis) * local, local)


def crop_each(key: jax.Array, x: Images, pixels: int, fill: PerChannel, axis: str | None = None) -> Images:
    """Pads each image by `pixels` on all sides with the colour `fill` [C] and cuts a random window of its old size."""
    if pixels == 0:
        return x
    offsets = per_image(lambda n: jax.random.randint(key, (n, 2), 0, 2 * pixels + 1), x.shape[0], axis)
    fill = fill[None, None, None]  # expanded, because users may let JAX refuse implicit rank promotion
    # The fill is subtracted first, so that padding with zeros pads with any colour (black in normalised space is not 0).
    padded = jnp.pad(x - fill, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    window = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))
    return window(padded, offsets) + fill


def flip_each(key: jax.Array, x: Images, axis: str | None = None) -> Images:
    """Mirrors each image left to right with probability 1/2, independently of the others."""
    coins = per_image(lambda n: jax.random.bernoulli(key, shape=(n, 1, 1, 1)), x.shape[0], axis)
    return jnp.where(coins, x[:, :, ::-1], x)


def add_noise(key: jax.Array, x: Images, most: PerChannel, axis: str | None = None) -> Images:
    """Adds Gaussian noise to each image, with a deviation uniform in [0, `most`]; `most` [C] is in normalised space."""
    deviation_key, noise_key = jax.random.split(key)
    deviations = per_image(lambda n: jax.random.uniform(deviation_key, (n, 1, 1, 1)), x.shape[0], axis)
    noise = per_image(lambda n: jax.random.normal(noise_key, (n, *x.shape[1:])), x.shape[0], axis)
    # XLA may or may not fold `most` into the constants of the draw, depending on the number of devices; the barrier makes
    # the result independent of it.
    deviations, noise = jax.lax.optimization_barrier((deviations, noise))
    return x + most[None, None, None] * deviations * noise


def resized_crop_each(key: jax.Array, x: Images, least: float, axis: str | None = None) -> Images:
    """Cuts a random window from each image and scales it to the image's size.

    The area of the window is uniform in [`least`, 1] of the image's area, its aspect ratio log-uniform in [3/4, 4/3]
    (Szegedy et al., arXiv 1409.4842, section 6), and its position uniform. A window that exceeds the image is narrowed.
    """
    draws = per_image(lambda n: jax.random.uniform(key, (n, 4)), x.shape[0], axis)
    area, shape = least + (1 - least) * draws[:, 0], jnp.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
    sizes = jnp.minimum(1.0, jnp.sqrt(area[:, None] * jnp.stack([1 / shape, shape], 1)))  # of the image's height and width
    scales, pixels = 1 / sizes, jnp.asarray([x.shape[1:3]], jnp.float32)
    offsets = draws[:, 2:] * (1 - sizes) * pixels

    def cut(image, scale, offset):
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -offset * scale, 'linear')

    return jax.vmap(cut)(x, scales, offsets)


def color_shift_each(key: jax.Array, x: Images, strength: float, axis: str | None = None) -> Images:
    """Scales and shifts each channel of each normalised image [B, H, W, C]: the ColorShift of arXiv 2201.12961.

    x' = exp(v) x - u,   u, v uniform in [-strength, strength] for each channel and image
    """
    shape = (1, 1, x.shape[-1])
    draws = per_image(lambda n: jax.random.uniform(key, (n, 2, *shape), minval=-1, maxval=1), x.shape[0], axis) * strength
    return jnp.exp(draws[:, 1]) * x - draws[:, 0]


def centred(x: Images, share: float) -> Images:
    """Crops the central `share` of the height and width of images [B, H, W, C] and scales it up to their size.

    An inversion that begins with the centre, and shows the network more from stage to stage, places objects in the middle
    of the image (the centring and zoom of Plug-In Inversion, arXiv 2201.12961, section 3).
    """
    if share >= 1:
        return x
    height, width = (max(1, round(share * length)) for length in x.shape[1:3])
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return jax.image.resize(x[:, top : top + height, left : left + width], x.shape, 'linear')


def color_jitter_each(key: jax.Array, x: Images, strength: float, axis: str | None = None) -> Images:
    """Changes contrast, brightness and tint of each image of a batch [B, H, W, C].

        x' = m + (x - m) exp(s a) + d s (b + c / 2)

    Here m and d are the image's mean and standard deviation over pixels and channels, and s is `strength`. a and b are
    standard normal numbers, one per image; c is one per image and channel.
    """
    draws = per_image(lambda n: jax.random.normal(key, (n, 1, 1, 2 + x.shape[-1])), x.shape[0], axis)
    contrast, shift = jnp.exp(strength * draws[..., :1]), strength * (draws[..., 1:2] + draws[..., 2:] / 2)
    mean, deviation = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    return mean + (x - mean) * contrast + deviation * shift


def cutmix(key: jax.Array, x: Images, probability: float) -> Images:
    """Pastes a rectangle of another image into each image with `probability` (CutMix, arXiv 1905.04899).

    Image i gets a rectangle of image B - 1 - i, at the same position in both. The rectangle has the aspect ratio of the
    image, a share of its area that is uniform in [0, 1], and a centre that is uniform in the image; parts outside of the
    image are cut off.
    """
    n, *size = x.shape[:3]
    draws = jax.random.uniform(key, (n, 4))
    side = jnp.sqrt(draws[:, :1])
    inside = [
        jnp.abs((jnp.arange(length) + 0.5) / length - draws[:, at, None]) < side / 2 for at, length in enumerate(size, 1)
    ]
    box = inside[0][:, :, None, None] & inside[1][:, None, :, None] & (draws[:, 3] < probability)[:, None, None, None]
    return jnp.where(box, x[::-1], x)


def mixup(key: jax.Array, x: Images, alpha: float) -> Images:
    """Mixes image i with image B - 1 - i by one share ~ Beta(alpha, alpha) for the whole batch (arXiv 1710.09412)."""
    share = jax.random.beta(key, alpha, alpha)
    return share * x + (1 - share) * x[::-1]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The settings of the random changes to images before a network takes them, applied by calling the object."""

    kind: str = 'crop'  # 'roll' (the paper: one offset and one coin per batch) or 'crop' (one per image, padded with black)
    shift: int = 0  # largest shift in pixels
    flip: bool = False  # mirror left to right with probability 1/2
    noise: float = 0.0  # largest deviation of Gaussian noise, for pixels in [0, 1]
    resized_crop: float = 0.0  # least share of the image's area in a random window that is scaled up; 0: no such window
    color_jitter: float = 0.0  # strength of random contrast, brightness and tint; 0: none
    cutmix: float = 0.0  # probability that an image gets a rectangle of another; only for batches that are not split
    mixup: float = 0.0  # alpha of the share of another image that is mixed in; 0: none; only for batches that are not split

    color_shift: float = 0.0  # strength of random scales and shifts of each channel, see `color_shift_each`; 0: none

    def __call__(self, key: jax.Array, x: Images, network: Classifier, axis: str | None = None) -> Images:
        """Returns augmented images x' [B, H, W, C].

        Args:
          key: A random key, the same on every device of `axis`.
          x: [B, H, W, C], normalised for `network`.
          network: The network that takes the images; defines black and the scale of noise.
          axis: The mesh axis over which the batch is split, or None.
        """
        dtype = x.dtype  # random numbers may be float64, where JAX is allowed to
        shift_key, flip_key, noise_key = jax.random.split(key, 3)
        if self.resized_crop:
            x = resized_crop_each(jax.random.fold_in(key, 3), x, self.resized_crop, axis)
        if self.shift:
            x = (
                roll(shift_key, x, self.shift)
                if self.kind == 'roll'
                else crop_each(shift_key, x, self.shift, jnp.asarray(network.valid_range[0]), axis)
            )
        if self.flip:
            x = flip(flip_key, x) if self.kind == 'roll' else flip_each(flip_key, x, axis)
        if self.noise:
            # Divided on the host and not in the program, because XLA folds this quotient differently on one device and on
            # several.
            x = add_noise(noise_key, x, (self.noise / np.asarray(network.std)).astype(np.float32), axis)
        if self.color_shift:
            x = color_shift_each(jax.random.fold_in(key, 7), x, self.color_shift, axis)
        if self.color_jitter:
            x = color_jitter_each(jax.random.fold_in(key, 5), x, self.color_jitter, axis)
        if self.cutmix:
            x = cutmix(jax.random.fold_in(key, 6), x, self.cutmix)
        return (mixup(jax.random.fold_in(key, 4), x, self.mixup) if self.mixup else x).astype(dtype)


def augmentation_of(settings: Stage | TrainingSettings) -> Augmentation:
    """Returns the `Augmentation` of a stage of an inversion, or of a training."""
    if isinstance(settings, Stage):
        shift = settings.color_shift
        return Augmentation(settings.augmentation, settings.jitter, settings.flip, settings.noise, color_shift=shift)
    names = ('shift', 'flip', 'noise', 'resized_crop', 'color_jitter', 'cutmix', 'mixup')
    return Augmentation('crop', **{name: getattr(settings, name) for name in names})
