"""What the optimiser moves, and the images that it stands for.

'pixels' (paper): the canvas is the image, in normalised space, white noise at first.

'spectrum': the canvas is white noise too, but it is painted: every frequency gets the amplitude that it has in natural
pictures, 1/frequency (Field, 1987), the colours are mixed as they are there, and a sigmoid keeps the pixels between black
and white. Adam moves every value of a canvas by steps of about one size: on pixels that is a step of one size for every
frequency, which ends in fine patterns that only the teacher understands; through the spectrum coarse shapes move far and
fine ones little, and brightness and colour vary from image to image as in real ones. No data is needed for that.
(Preconditioning by frequency is known from feature visualization: Olah, Mordvintsev and Schubert, 2017.)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import Classifier

KINDS = ('pixels', 'spectrum')
SHARED = 0.85  # the part of the variance that the channels have in common


@functools.partial(jax.jit, static_argnums=(1, 2))
def blank_canvas(key: jax.Array, batch_size: int, image_shape) -> tuple[jax.Array, jax.Array]:
    """(canvas ~ N(0, 1), [B, H, W, C] float32, the key that the iterations draw from)."""
    canvas_key, step_key = jax.random.split(key)
    return jax.random.normal(canvas_key, (batch_size, *image_shape), jnp.float32), step_key


def make_paint(kind: str, contrast: float, classifier: Classifier) -> Callable:
    """`canvas -> images`, both [B, H, W, C] float32, the images normalised.

    Args:
      kind: one of `KINDS`.
      contrast: of the first images of 'spectrum': the deviation of what the sigmoid takes.
      classifier: tells the images' shape, and how pixels in [0, 1] are normalised.
    """
    if kind == 'pixels':
        return lambda canvas: canvas
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
