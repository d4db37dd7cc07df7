"""Parameterizations of the images: what Adam moves, and how images are decoded from it.

'pixels' (paper): the parameters are the images, in normalised space, white noise at first. The normalised space is the
network's own; that of a network that takes pixels as they are, from 0 to 255 say, would make first noise nearly black and
steps of Adam invisible, so there, and with `pixel_scale = 'common'` everywhere, it is one for all networks (see
`pixel_scale_of`).

'fourier': the parameters are white noise too. To decode an image, every frequency is given the amplitude that it has in
natural pictures, 1/frequency (Field, 1987), the colours are mixed as they are there, and a sigmoid keeps the pixels between
black and white. Adam moves every parameter by steps of about one size: on pixels that is a step of one size for every
frequency, which ends in fine patterns that only the teacher understands; here coarse shapes move far and fine ones little,
and brightness and colour vary from image to image as in real ones. No data is needed for that. (Preconditioning by frequency
is known from feature visualization: Olah, Mordvintsev and Schubert, 2017.)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import Classifier

COMMON = 0.5, 0.25  # mean and std of pixels in [0, 1]
NORMALISED = 0.02, 0.6  # least and largest std of normalised pixels, in [0, 1]; of raw ones it is 1/255 or 1
SHARED = 0.85  # the part of the variance that the channels have in common


@functools.partial(jax.jit, static_argnums=(1, 2))
def initial_parameters(key: jax.Array, batch_size: int, image_shape) -> tuple[jax.Array, jax.Array]:
    """Returns (parameters ~ N(0, 1), [B, H, W, C] float32, the key that the iterations draw from)."""
    parameters_key, step_key = jax.random.split(key)
    return jax.random.normal(parameters_key, (batch_size, *image_shape), jnp.float32), step_key


def pixel_scale_of(kind: str, classifier: Classifier) -> Classifier:
    """Returns `classifier` with the mean and std that 'pixels' and priors are measured in.

    Args:
      kind: 'network' or 'common', see `InversionConfig.pixel_scale`.
    """
    least, most = NORMALISED
    if kind == 'network' and all(least <= deviation <= most for deviation in classifier.std):
        return classifier
    mean, std = ((value,) * classifier.image_shape[-1] for value in COMMON)
    return dataclasses.replace(classifier, mean=mean, std=std)


def rescaled(x: jax.Array, old: Classifier, new: Classifier) -> jax.Array:
    """Returns images [B, H, W, C] that are normalised for `old`, normalised for `new`; the same array where these agree."""
    if (old.mean, old.std) == (new.mean, new.std):
        return x
    (old_mean, old_std), (new_mean, new_std) = (np.asarray((c.mean, c.std), np.float64) for c in (old, new))
    scale, shift = old_std / new_std, (old_mean - new_mean) / new_std
    # Expanded, for users who let JAX refuse implicit rank promotion.
    return x * scale.astype(np.float32)[None, None, None] + shift.astype(np.float32)[None, None, None]


def make_decode(kind: str, contrast: float, classifier: Classifier, scale: Classifier | None = None) -> Callable:
    """Returns `parameters -> images`, both [B, H, W, C] float32, the images normalised.

    Args:
      kind: 'pixels' or 'fourier'.
      contrast: of the first images of 'fourier': the standard deviation of what the sigmoid takes.
      classifier: tells the images' shape, and how pixels in [0, 1] are normalised.
      scale: tells how those of 'pixels' are, see `pixel_scale_of`; None: in the same way.
    """
    if kind == 'pixels':
        return lambda parameters: rescaled(parameters, scale or classifier, classifier)
    height, width, channels = classifier.image_shape
    # One constant array: XLA folds products of constants differently for one and for several devices.
    amplitudes = np.float32(contrast) * _amplitudes(height, width)[None, ..., None]
    colours = np.linalg.cholesky(SHARED * np.ones((channels, channels)) + (1 - SHARED) * np.eye(channels)).astype(np.float32)

    def decode(parameters):
        spectrum = jnp.fft.rfft2(parameters, axes=(1, 2)) * amplitudes
        picture = jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
        return classifier.normalise(jax.nn.sigmoid(jnp.einsum('bhwc,dc->bhwd', picture, colours, precision='highest')))

    return decode


def _amplitudes(height: int, width: int) -> np.ndarray:
    """1/frequency, float32 [H, W // 2 + 1], such that unit white noise keeps its variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))  # the mean: as the lowest frequency
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return amplitude[:, : width // 2 + 1].astype(np.float32)
