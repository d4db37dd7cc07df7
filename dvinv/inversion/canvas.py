"""What the optimiser moves, and the images that it stands for.

'pixels' (paper): the canvas is the image, in normalised space, white noise at first. The normalised space is the network's
own; that of a network that takes pixels as they are, from 0 to 255 say, would make first noise nearly black and steps of
Adam invisible, so there, and with `pixel_scale = 'common'` everywhere, it is one for all networks (see `in_scale`).

'spectrum': the canvas is white noise too, but it is painted: every frequency gets the amplitude that it has in natural
pictures, 1/frequency (Field, 1987), the colours are mixed as they are there, and a sigmoid keeps the pixels between black
and white. Adam moves every value of a canvas by steps of about one size: on pixels that is a step of one size for every
frequency, which ends in fine patterns that only the teacher understands; through the spectrum coarse shapes move far and
fine ones little, and brightness and colour vary from image to image as in real ones. No data is needed for that.
(Preconditioning by frequency is known from feature visualization: Olah, Mordvintsev and Schubert, 2017.)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import Classifier

KINDS = ('pixels', 'spectrum')
SCALES = ('network', 'common')
COMMON = 0.5, 0.25  # mean and std of pixels in [0, 1]
NORMALISED = 0.02, 0.6  # least and largest std of normalised pixels, in [0, 1]; of raw ones it is 1/255 or 1
SHARED = 0.85  # the part of the variance that the channels have in common


@functools.partial(jax.jit, static_argnums=(1, 2))
def blank_canvas(key: jax.Array, batch_size: int, image_shape) -> tuple[jax.Array, jax.Array]:
    """(canvas ~ N(0, 1), [B, H, W, C] float32, the key that the iterations draw from)."""
    canvas_key, step_key = jax.random.split(key)
    return jax.random.normal(canvas_key, (batch_size, *image_shape), jnp.float32), step_key


def in_scale(kind: str, classifier: Classifier) -> Classifier:
    """Returns `classifier` with the mean and std that canvases of 'pixels' and priors are in, by `kind`, one of `SCALES`."""
    least, most = NORMALISED
    if kind == 'network' and all(least <= deviation <= most for deviation in classifier.std):
        return classifier
    mean, std = ((value,) * classifier.image_shape[-1] for value in COMMON)
    return dataclasses.replace(classifier, mean=mean, std=std)


def rescaled(x: jax.Array, old: Classifier, new: Classifier) -> jax.Array:
    """Images [B, H, W, C] that are normalised for `old`, normalised for `new`; the same array where these are alike."""
    if (old.mean, old.std) == (new.mean, new.std):
        return x
    (old_mean, old_std), (new_mean, new_std) = (np.asarray((c.mean, c.std), np.float64) for c in (old, new))
    scale, shift = old_std / new_std, (old_mean - new_mean) / new_std
    # Expanded, for users who let JAX refuse implicit rank promotion.
    return x * scale.astype(np.float32)[None, None, None] + shift.astype(np.float32)[None, None, None]


def make_paint(kind: str, contrast: float, classifier: Classifier, scale: Classifier | None = None) -> Callable:
    """`canvas -> images`, both [B, H, W, C] float32, the images normalised.

    Args:
      kind: one of `KINDS`.
      contrast: of the first images of 'spectrum': the deviation of what the sigmoid takes.
      classifier: tells the images' shape, and how pixels in [0, 1] are normalised.
      scale: tells how those of a canvas of 'pixels' are, see `in_scale`; None: in the same way.
    """
    if kind == 'pixels':
        return lambda canvas: rescaled(canvas, scale or classifier, classifier)
    height, width, channels = classifier.image_shape
    # One constant array: XLA folds products of constants differently for one and for several devices.
    amplitudes = np.float32(contrast) * _amplitudes(height, width)[None, ..., None]
    colours = np.linalg.cholesky(SHARED * np.ones((channels, channels)) + (1 - SHARED) * np.eye(channels)).astype(np.float32)

    def paint(canvas):
        spectrum = jnp.fft.rfft2(canvas, axes=(1, 2)) * amplitudes
        picture = jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
        return classifier.normalise(jax.nn.sigmoid(jnp.einsum('bhwc,dc->bhwd', picture, colours, precision='highest')))

    return paint


def _amplitudes(height: int, width: int) -> np.ndarray:
    """1/frequency, float32 [H, W // 2 + 1], such that unit white noise keeps its variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))  # the mean: as the lowest frequency
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return amplitude[:, : width // 2 + 1].astype(np.float32)
