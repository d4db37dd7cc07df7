"""Sliding windows over images: for each tap of a kernel, the image of all pixels that it is multiplied with.

Shared by convolutions.py and pooling.py. A tap is a position (row, column) in the window.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # (above, below), (left, right), in pixels


def taps(size: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the taps of a window of this (height, width), row by row."""
    return [*itertools.product(*map(range, size))]


def places(shape: Sequence[int], size: Sequence[int], strides: Sequence[int], padding: Padding) -> list[int]:
    """Returns [height, width] of the result for images of (height, width) `shape`."""
    return [
        (length + sum(margins) - extent) // stride + 1
        for length, margins, extent, stride in zip(shape, padding, size, strides, strict=True)
    ]


def padded(x: jax.Array, padding: Padding, value: float = 0.0) -> jax.Array:
    """Pads x [B, H, W, C] with `value`; negative padding crops."""
    margins = ((0, 0, 0), *((int(before), int(after), 0) for before, after in padding), (0, 0, 0))
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), margins)


def shifted(x: jax.Array, tap: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Returns the pixels of x [B, H, W, C], already padded, at one tap: one for each pixel of a result of these `sizes`."""
    ends = [first + (size - 1) * stride + 1 for first, size, stride in zip(tap, sizes, strides, strict=True)]
    return jax.lax.slice(x, (0, *tap, 0), (len(x), *ends, x.shape[3]), (1, *strides, 1))


def total(terms) -> jax.Array:
    """Returns the sum of a few arrays, added in order."""
    return functools.reduce(jnp.add, terms)
