"""What a network is shown: images scaled down, cut, shifted, mirrored, with noise, mixed.

The paper rolls the whole batch by one random offset and flips it by one coin. The alternative, `crop`, pads each image
with black and cuts a random window of its own: running statistics describe the *augmented* training set, so a
teacher that was trained on padded random crops is best shown the same.

Random numbers are drawn for the whole batch from a key that no device index enters; a device that holds a part of the
batch takes its slice of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.config import Stage, TrainingSettings
from dvinv.networks.classifier import Classifier


def average_pool(x: jax.Array, factor: int) -> jax.Array:
    """Means of `factor` x `factor` pixels; [B, H, W, C] -> [B, H/factor, W/factor, C]."""
    if factor == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def scaled_down(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """x [B, H, W, C] at the (height, width) `size`, which is nowhere larger; -> [B, *size, C].

    Where `size` divides, means of squares. Elsewhere a pixel is the mean of those around its place under a triangle that
    ends at the neighbours' places (linear interpolation with antialiasing): a matrix an axis.
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
    """Weights float32 [old, new] of the pixels of a line in those that it is scaled down to; each of these has the sum 1."""
    step = old / new
    places = (np.arange(new) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[:, None] - places) / step)
    return (weights / weights.sum(0)).astype(np.float32)


def roll(key: jax.Array, x: jax.Array, pixels: int) -> jax.Array:
    """Roll the whole batch by one offset, uniform in [-pixels, pixels] an axis; what leaves on one side returns."""
    offset = jax.random.randint(key, (2,), -pixels, pixels + 1)
    return jnp.roll(x, offset, (1, 2))


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirror the whole batch left to right, by one fair coin."""
    return jnp.where(jax.random.bernoulli(key), x[:, :, ::-1], x)


def per_image(draw, local: int, axis: str | None):
    """The `local` rows of `draw(batch)` that belong to this device's images; `draw` makes them for a whole batch."""
    if axis is None:
        return draw(local)
    rows = draw(local * jax.lax.axis_size(axis))
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis) * local, local)


def crop_each(key: jax.Array, x: jax.Array, pixels: int, fill: jax.Array, axis: str | None = None) -> jax.Array:
    """Pad each image by `pixels` on all sides with the colour `fill` [C] and cut a random window of its old size."""
    if pixels == 0:
        return x
    offsets = per_image(lambda n: jax.random.randint(key, (n, 2), 0, 2 * pixels + 1), x.shape[0], axis)
    fill = fill[None, None, None]  # expanded, as everywhere: users may let JAX refuse implicit rank promotion
    # Padding is done around zero, so that any colour (black in normalised space is not 0) serves.
    padded = jnp.pad(x - fill, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    window = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))
    return window(padded, offsets) + fill


def flip_each(key: jax.Array, x: jax.Array, axis: str | None = None) -> jax.Array:
    """Mirror each image left to right by a coin of its own."""
    coins = per_image(lambda n: jax.random.bernoulli(key, shape=(n, 1, 1, 1)), x.shape[0], axis)
    return jnp.where(coins, x[:, :, ::-1], x)


def add_noise(key: jax.Array, x: jax.Array, most: jax.Array, axis: str | None = None) -> jax.Array:
    """Add Gaussian noise; each image's deviation is drawn from [0, `most`], `most` [C] in normalised space."""
    deviation_key, noise_key = jax.random.split(key)
    deviations = per_image(lambda n: jax.random.uniform(deviation_key, (n, 1, 1, 1)), x.shape[0], axis)
    noise = per_image(lambda n: jax.random.normal(noise_key, (n, *x.shape[1:])), x.shape[0], axis)
    # XLA folds `most` into the constants of the draw, or not, depending on the number of devices: the bits must not.
    deviations, noise = jax.lax.optimization_barrier((deviations, noise))
    return x + most[None, None, None] * deviations * noise


def resized_crop_each(key: jax.Array, x: jax.Array, least: float, axis: str | None = None) -> jax.Array:
    """Cut a window of at least the share `least` of its area from each image, and scale it to the image's size.

    Its area is uniform in [`least`, 1] of the image's, its shape log-uniform in [3/4, 4/3] (Szegedy et al., arXiv 1409.4842,
    section 6), its place uniform; a window that would stick out is narrowed.
    """
    draws = per_image(lambda n: jax.random.uniform(key, (n, 4)), x.shape[0], axis)
    area, shape = least + (1 - least) * draws[:, 0], jnp.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
    sizes = jnp.minimum(1.0, jnp.sqrt(area[:, None] * jnp.stack([1 / shape, shape], 1)))  # of the image's height and width
    scales, pixels = 1 / sizes, jnp.asarray([x.shape[1:3]], jnp.float32)
    offsets = draws[:, 2:] * (1 - sizes) * pixels

    def cut(image, scale, offset):
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -offset * scale, 'linear')

    return jax.vmap(cut)(x, scales, offsets)


def color_shift_each(key: jax.Array, x: jax.Array, strength: float, axis: str | None = None) -> jax.Array:
    """Scales and shifts each channel of each image, normalised [B, H, W, C]: the ColorShift of arXiv 2201.12961.

    x' = exp(v) x - u,   u, v uniform in [-strength, strength], a channel and image
    """
    shape = (1, 1, x.shape[-1])
    draws = per_image(lambda n: jax.random.uniform(key, (n, 2, *shape), minval=-1, maxval=1), x.shape[0], axis) * strength
    return jnp.exp(draws[:, 1]) * x - draws[:, 0]


def centred(x: jax.Array, share: float) -> jax.Array:
    """The middle of images [B, H, W, C], so much of their height and width, scaled up to their size.

    Inversions that begin there, and see more from stage to stage, put their things into the middle of the picture (the
    centring and zoom of Plug-In Inversion, arXiv 2201.12961, section 3).
    """
    if share >= 1:
        return x
    height, width = (max(1, round(share * length)) for length in x.shape[1:3])
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return jax.image.resize(x[:, top : top + height, left : left + width], x.shape, 'linear')


def color_jitter_each(key: jax.Array, x: jax.Array, strength: float, axis: str | None = None) -> jax.Array:
    """Changes contrast, brightness and tint of each image [H, W, C]; -> [B, H, W, C].

        x' = m + (x - m) exp(s a) + d s (b + c / 2)

    m and d are the image's mean and standard deviation over pixels and channels, s is `strength`, a and b are one standard
    normal number an image, c one an image and channel.
    """
    draws = per_image(lambda n: jax.random.normal(key, (n, 1, 1, 2 + x.shape[-1])), x.shape[0], axis)
    contrast, shift = jnp.exp(strength * draws[..., :1]), strength * (draws[..., 1:2] + draws[..., 2:] / 2)
    mean, deviation = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    return mean + (x - mean) * contrast + deviation * shift


def cutmix(key: jax.Array, x: jax.Array, probability: float) -> jax.Array:
    """Pastes a rectangle of its neighbour in reversed order into each image, with `probability` (arXiv 1905.04899).

    The rectangle has the shape of the image and a share of its area that is uniform in [0, 1]; its centre is uniform in the
    image, and what would stick out is cut off. Both images keep their places: the rectangle shows the same part of each.
    """
    n, *size = x.shape[:3]
    draws = jax.random.uniform(key, (n, 4))
    side = jnp.sqrt(draws[:, :1])
    inside = [
        jnp.abs((jnp.arange(length) + 0.5) / length - draws[:, at, None]) < side / 2 for at, length in enumerate(size, 1)
    ]
    box = inside[0][:, :, None, None] & inside[1][:, None, :, None] & (draws[:, 3] < probability)[:, None, None, None]
    return jnp.where(box, x[::-1], x)


def mixup(key: jax.Array, x: jax.Array, alpha: float) -> jax.Array:
    """Every image and its neighbour in reversed order, mixed by one share ~ Beta(alpha, alpha) (arXiv 1710.09412)."""
    share = jax.random.beta(key, alpha, alpha)
    return share * x + (1 - share) * x[::-1]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How images are changed before a network sees them."""

    kind: str = 'crop'  # 'roll' (the paper: one offset, one coin a batch) or 'crop' (one an image; black comes in)
    shift: int = 0  # pixels, up to
    flip: bool = False  # mirror left to right, by a coin
    noise: float = 0.0  # deviation of Gaussian noise, up to, for pixels in [0, 1]
    resized_crop: float = 0.0  # least share of the image in a random window that is scaled up; 0: no such window
    color_jitter: float = 0.0  # strength of random contrast, brightness and tint; 0: none
    cutmix: float = 0.0  # probability that an image gets a rectangle of another. Of whole batches, not split ones
    mixup: float = 0.0  # alpha of the share of another image that is mixed in; 0: none. Of whole batches, not split ones

    color_shift: float = 0.0  # strength of random scales and shifts of each channel, see `color_shift_each`; 0: none

    def __call__(self, key: jax.Array, x: jax.Array, network: Classifier, axis: str | None = None) -> jax.Array:
        """The view x' of images x [B, H, W, C] normalised for `network`; `key` is the same on every device of `axis`."""
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
            # Divided here, not in the program: XLA folds that quotient differently on one device and on several.
            x = add_noise(noise_key, x, (self.noise / np.asarray(network.std)).astype(np.float32), axis)
        if self.color_shift:
            x = color_shift_each(jax.random.fold_in(key, 7), x, self.color_shift, axis)
        if self.color_jitter:
            x = color_jitter_each(jax.random.fold_in(key, 5), x, self.color_jitter, axis)
        if self.cutmix:
            x = cutmix(jax.random.fold_in(key, 6), x, self.cutmix)
        return (mixup(jax.random.fold_in(key, 4), x, self.mixup) if self.mixup else x).astype(dtype)


def augmentation_of(settings: Stage | TrainingSettings) -> Augmentation:
    """Returns how a stage of an inversion, or a training, changes images before the network sees them."""
    if isinstance(settings, Stage):
        shift = settings.color_shift
        return Augmentation(settings.augmentation, settings.jitter, settings.flip, settings.noise, color_shift=shift)
    names = ('shift', 'flip', 'noise', 'resized_crop', 'color_jitter', 'cutmix', 'mixup')
    return Augmentation('crop', **{name: getattr(settings, name) for name in names})
