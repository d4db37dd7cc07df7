"""Parameterizations of the images: the parameters that Adam updates, and how images are decoded from them.

'pixels' (paper): the parameters are the images in normalised space, initialised with white noise. The normalised space is
that of the network. If the network takes unnormalised pixels, for instance from 0 to 255, the initial noise would be nearly
black in its space and the steps of Adam invisible. Therefore such networks, and with `pixel_scale = 'common'` all networks,
use one common space (see `pixel_scale_of`).

'fourier': the parameters are initialised with white noise as well. Decoding gives every frequency the amplitude that it has
in natural images, 1/frequency (Field, 1987), mixes the colour channels so that they correlate as in natural images, and
applies a sigmoid that keeps the pixels between black and white. Adam updates all parameters by steps of about the same size.
On pixels this is a step of the same size for every frequency, which leads to fine patterns that only the teacher recognises.
Here coarse shapes change a lot and fine ones little, and brightness and colour vary from image to image as in real ones. No
data is needed for that. (Preconditioning by frequency is known from feature visualization: Olah, Mordvintsev and Schubert,
2017.)
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.arrays import Images
from dvinv.networks.classifier import Classifier

COMMON = 0.5, 0.25  # mean and std of the common space, for pixels in [0, 1]
NORMALISED = 0.02, 0.6  # least and largest std of networks that normalise pixels in [0, 1]; otherwise it is 1/255 or 1
SHARED = 0.85  # the share of the variance that the channels have in common


@functools.partial(jax.jit, static_argnums=(1, 2))
def initial_parameters(key: jax.Array, batch_size: int, image_shape) -> tuple[Images, jax.Array]:
    """Returns (parameters ~ N(0, 1), [B, H, W, C] float32, and the key from which the iterations draw)."""
    parameters_key, step_key = jax.random.split(key)
    return jax.random.normal(parameters_key, (batch_size, *image_shape), jnp.float32), step_key


def pixel_scale_of(kind: str, classifier: Classifier) -> Classifier:
    """Returns `classifier` with the mean and std that define the space of 'pixels' and of the image priors.

    Args:
      kind: 'network' or 'common', see `InversionConfig.pixel_scale`.
      classifier: The network; its mean and std are used with 'network' if it takes normalised pixels.
    """
    least, most = NORMALISED
    if kind == 'network' and all(least <= deviation <= most for deviation in classifier.std):
        return classifier
    mean, std = ((value,) * classifier.image_shape[-1] for value in COMMON)
    return dataclasses.replace(classifier, mean=mean, std=std)


def rescaled(x: Images, old: Classifier, new: Classifier) -> Images:
    """Converts images [B, H, W, C] from the normalisation of `old` to that of `new`; returns `x` itself if they agree."""
    if (old.mean, old.std) == (new.mean, new.std):
        return x
    (old_mean, old_std), (new_mean, new_std) = (np.asarray((c.mean, c.std), np.float64) for c in (old, new))
    scale, shift = old_std / new_std, (old_mean - new_mean) / new_std
    # Expanded, because users may let JAX refuse implicit rank promotion.
    return x * scale.astype(np.float32)[None, None, None] + shift.astype(np.float32)[None, None, None]


def make_decode(kind: str, contrast: float, classifier: Classifier, scale: Classifier | None = None) -> Callable:
    """Returns the function `parameters -> images`, both [B, H, W, C] float32, the images normalised.

    Args:
      kind: 'pixels' or 'fourier'.
      contrast: The contrast of the first images of 'fourier': the standard deviation of the input of the sigmoid.
      classifier: The network; defines the images' shape and the normalisation of the decoded images.
      scale: The classifier with the normalisation of the parameters of 'pixels', see `pixel_scale_of`; None for the same
        normalisation.
    """
    if kind == 'pixels':
        return lambda parameters: rescaled(parameters, scale or classifier, classifier)
    height, width, channels = classifier.image_shape
    # One constant array, because XLA folds products of constants differently for one device and for several.
    amplitudes = np.float32(contrast) * _amplitudes(height, width)[None, ..., None]
    colours = np.linalg.cholesky(SHARED * np.ones((channels, channels)) + (1 - SHARED) * np.eye(channels)).astype(np.float32)

    def decode(parameters):
        spectrum = jnp.fft.rfft2(parameters, axes=(1, 2)) * amplitudes
        picture = jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
        return classifier.normalise(jax.nn.sigmoid(jnp.einsum('bhwc,dc->bhwd', picture, colours, precision='highest')))

    return decode


def _amplitudes(height: int, width: int) -> np.ndarray:
    """Returns 1/frequency, float32 [H, W // 2 + 1], scaled so that white noise of variance 1 keeps its variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))  # frequency 0 as the lowest one
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return amplitude[:, : width // 2 + 1].astype(np.float32)
