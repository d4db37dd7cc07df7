"""Rounding of weights and activations to a few bits, and their storage as a dense stream of bits.

Weights are symmetric, with one step per channel: w = step q with |q| <= 2^(b-1) - 1. Activations are affine, with one step
per layer or per token: x = step (q - zero point) with 0 <= q <= 2^b - 1, so that 0 (padding, the negative side of a ReLU) is
represented exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num, UInt8

from dvinv.networks.arrays import AnyArray

# Fractions of the largest magnitude that are tried in the search for the step of least squared error.
SHARES = np.linspace(0.3, 1.0, 36)


def largest(bits: int) -> int:
    """Returns the largest magnitude, in steps, of a weight of `bits` bits."""
    return 2 ** (bits - 1) - 1


@jax.custom_jvp
def rounded(x: Float[AnyArray, '*S']) -> Float[jax.Array, '*S']:
    """Rounds to the nearest integer, with a straight-through gradient (Bengio et al., arXiv 1308.3432)."""
    return jnp.round(x)


rounded.defjvp(lambda x, dx: (jnp.round(x[0]), dx[0]))


def round_weights(weights: Float[AnyArray, '*S'], step, top) -> Float[jax.Array, '*S']:
    """Rounds `weights` to whole numbers of `step` (broadcast), of a magnitude of at most `top`.

    Differentiable in both; the gradient with respect to `step` is that of LSQ (Esser et al., arXiv 1902.08153, eq. 3).
    """
    return jnp.clip(rounded(weights / step), -top, top)


def integer_weights(kernel: Float[np.ndarray, '*S'], step: np.ndarray, bits: int) -> Float[np.ndarray, '*S']:
    """Computes the same as `round_weights` in NumPy, for `bits` bits and without a gradient."""
    return np.clip(np.rint(kernel / step), -largest(bits), largest(bits))


def round_inputs(x: Float[AnyArray, '*S'], step, zero_point, top) -> Float[jax.Array, '*S']:
    """Rounds activations to `top` + 1 values, `zero_point` of them below 0; float, differentiable as `round_weights`."""
    return (jnp.clip(rounded(x / step) + zero_point, 0, top) - zero_point) * step


def round_tokens(x: Float[AnyArray, '*S'], axis: int, top) -> Float[jax.Array, '*S']:
    """Rounds each token of activations to `top` + 1 values between its own extremes; float, differentiable in `x`.

    The range is computed in the call (dynamic quantization), so that it needs no calibration, and a token of large values
    does not make the steps of all others coarse.

    Args:
      x: activations, [..., C, ...].
      axis: the axis of the channels of a token.
      top: the number of steps, 2^b - 1.
    """
    fixed = jax.lax.stop_gradient(x)
    low, high = jnp.minimum(fixed.min(axis, keepdims=True), 0), jnp.maximum(fixed.max(axis, keepdims=True), 0)
    step = jnp.where(high > low, (high - low) / top, 1.0)
    return round_inputs(x, step, jnp.round(-low / step), top)


def weight_steps(kernel: Float[np.ndarray, '...'], bits: int, contracted: tuple[int, ...]) -> Float[np.ndarray, '...']:
    """Returns the step of least squared error for each output channel; float32, of length 1 along the `contracted` axes."""
    top = largest(bits)
    magnitude = np.abs(kernel).max(contracted, keepdims=True)
    magnitude = np.where(magnitude > 0, magnitude, 1.0)
    best, least_error = SHARES[0] * magnitude / top, np.full(magnitude.shape, np.inf)
    for share in SHARES:
        step = share * magnitude / top
        error = ((np.clip(np.rint(kernel / step), -top, top) * step - kernel) ** 2).sum(contracted, keepdims=True)
        best, least_error = np.where(error < least_error, step, best), np.minimum(error, least_error)
    return best.astype(np.float32)


def packed(integers: Num[np.ndarray, '...'], bits: int) -> UInt8[np.ndarray, 'bytes']:
    """Packs integers into a dense stream of `bits` bits each, uint8; two per byte at 4 bits."""
    unsigned = (integers.ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, -bits:].ravel())


def unpacked(stream: UInt8[AnyArray, 'bytes'], bits: int, shape) -> Float[AnyArray, '...']:
    """Unpacks the integers of such a stream, float32 of `shape`; also usable within a compiled function."""
    digits = (stream[:, None] >> np.arange(7, -1, -1, dtype=np.uint8)) & 1
    count = int(np.prod(shape))
    digits = digits.reshape(-1)[: count * bits].reshape(count, bits)
    powers = 2.0 ** np.arange(bits - 1, -1, -1, dtype=np.float32)
    return (digits.astype(jnp.float32) * powers).sum(1).reshape(shape) - 2.0 ** (bits - 1)
