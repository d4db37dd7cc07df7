"""Where an inversion starts: white noise, as in the paper, or noise with the spectrum of natural pictures.

Gradients of a network hardly reach the lowest frequencies: images that start from white noise stay grey on average, while
real ones are dark or bright as a whole. In natural pictures the amplitude falls as 1/frequency (Field, 1987), and colours
vary together. Noise drawn like that brings the missing variety along, without any data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SHARED = 0.85  # the part of the variance that the channels have in common
BRIGHTNESS = 3.0  # what falls below the lowest frequency of the picture goes into its mean


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def initial_images(key: jax.Array, batch_size: int, image_shape, kind: str = 'white') -> tuple[jax.Array, jax.Array]:
    """(images [B, H, W, C] float32 of mean 0 and variance 1 in normalised space, the key that the iterations draw from).

    Args:
      kind: 'white' (each value alone ~ N(0, 1)) or 'natural' (amplitudes fall as 1/frequency).
    """
    image_key, step_key = jax.random.split(key)
    if kind == 'white':
        return jax.random.normal(image_key, (batch_size, *image_shape)), step_key
    height, width, channels = image_shape
    shared_key, own_key = jax.random.split(image_key)
    shared = jax.random.normal(shared_key, (batch_size, height, width, 1))
    own = jax.random.normal(own_key, (batch_size, *image_shape))
    white = (
        shared if channels == 1 else np.sqrt(SHARED, dtype=np.float32) * shared + np.sqrt(1 - SHARED, dtype=np.float32) * own
    )
    spectrum = jnp.fft.rfft2(white, axes=(1, 2)) * _amplitudes(height, width)[..., None]
    return jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2)), step_key


def _amplitudes(height: int, width: int) -> np.ndarray:
    """1/frequency, float32 [H, W // 2 + 1], such that unit white noise keeps its variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    lowest = 1 / max(height, width)
    amplitude = 1 / np.maximum(frequency, lowest)
    amplitude[0, 0] *= BRIGHTNESS
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return amplitude[:, : width // 2 + 1].astype(np.float32)
