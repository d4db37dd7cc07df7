"""Convolutions written so that XLA's CPU backend computes them fast; suited.py decides when they are used.

All take images [B, H, W, I] and kernels [h, w, I, O], as Flax does.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.windows import Padding, padded, places, shifted, taps, total


def pointwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision=None, dtype=None) -> jax.Array:
    """Computes a 1x1 convolution, x [B, H, W, I], kernel [1, 1, I, O], as a matrix product; sums and result of `dtype`."""
    x = x[:, :: strides[0], :: strides[1]]
    return jnp.einsum('bhwi,io->bhwo', x, kernel[0, 0], precision=precision, preferred_element_type=dtype)


def gathered(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, precision=None, dtype=None
) -> jax.Array:
    """Computes a convolution, x [B, H, W, I], kernel [h, w, I, O], as one matrix product over the pixels of all windows."""
    size = kernel.shape[:2]
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding)
    windows = jnp.concatenate([shifted(x, tap, sizes, strides) for tap in taps(size)], -1)  # [B, H', W', h w I]
    matrix = kernel.reshape(-1, kernel.shape[3])
    return jnp.einsum('bhwi,io->bhwo', windows, matrix, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Computes a depthwise convolution, x [B, H, W, C], kernel [h, w, 1, C], by shifted multiply-adds."""
    size = kernel.shape[:2]
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding)
    return total(kernel[(*tap, 0)] * shifted(x, tap, sizes, strides) for tap in taps(size))


def _forward(x, kernel, strides, padding):
    return depthwise(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, kept, gradient):
    x, kernel = kept
    whole, sizes = padded(x, padding), gradient.shape[1:3]
    to_kernel = [(gradient * shifted(whole, tap, sizes, strides)).sum((0, 1, 2)) for tap in taps(kernel.shape[:2])]
    return _to_images(gradient, kernel, x.shape, strides, padding), jnp.stack(to_kernel).reshape(kernel.shape)


depthwise.defvjp(_forward, _backward)


def _to_images(gradient, kernel, shape, strides, padding):
    """Computes the gradient with respect to x [B, H, W, C] of this `shape`.

    Pixel h of x contributes to output o through row i of the kernel if h + before = i + stride o. All pixels with the same
    remainder modulo the stride use the same rows, and form an image of their own: a sum of shifted outputs, each multiplied
    by a tap. These images are interleaved in the end; a stride of 1 has only one.
    """
    batch, *lengths, channels = shape
    counts = [-(-length // stride) for length, stride in zip(lengths, strides, strict=True)]  # pixels of one remainder
    starts = {}  # {(remainders, tap): the first pixel's output}
    for rests, tap in itertools.product(itertools.product(*map(range, strides)), taps(kernel.shape[:2])):
        outputs = [rest + before - t for rest, (before, _), t in zip(rests, padding, tap, strict=True)]
        if not any(output % stride for output, stride in zip(outputs, strides, strict=True)):
            starts[rests, tap] = [output // stride for output, stride in zip(outputs, strides, strict=True)]
    lowest, highest = (np.array([*starts.values()]).min(0), np.array([*starts.values()]).max(0))
    # One padding for all taps: XLA keeps its result, but would recompute the input of nine separate paddings nine times.
    after = highest + counts - gradient.shape[1:3]
    whole = padded(gradient, tuple(zip(-lowest, after, strict=True)))
    parts = []
    for rests in itertools.product(*map(range, strides)):
        terms = [
            kernel[(*tap, 0)] * shifted(whole, start - lowest, counts, (1, 1))
            for (mine, tap), start in starts.items()
            if mine == rests
        ]
        parts.append(total(terms) if terms else jnp.zeros((batch, *counts, channels), gradient.dtype))
    image = jnp.stack(parts, -2).reshape(batch, *counts, *strides, channels).transpose(0, 1, 3, 2, 4, 5)
    size = [count * stride for count, stride in zip(counts, strides, strict=True)]
    return image.reshape(batch, *size, channels)[:, : lengths[0], : lengths[1]]
