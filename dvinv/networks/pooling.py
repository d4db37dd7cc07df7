"""Max-pooling written so that XLA's CPU backend computes its gradient fast; see suited.py."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dvinv.networks.windows import Padding, padded, places, shifted, taps


def max_pool(x: jax.Array, size: Sequence[int], strides: Sequence[int], padding: Padding) -> jax.Array:
    """Takes the maximum of every window of x [B, H, W, C]; the gradient goes to the first of equal values, as in XLA."""
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding, -jnp.inf)
    return functools.reduce(_larger, (shifted(x, tap, sizes, strides) for tap in taps(size)))


def _larger(first, second):
    """Returns the elementwise maximum, NaN where one is NaN; jnp.maximum would split the gradient between equal values."""
    return jnp.where((second > first) | jnp.isnan(second), second, first)
