"""Numbers of few bits: rounding weights and activations, and a dense stream of bits for a file.

Weights are symmetric, a step a channel: w = step q with |q| <= 2^(b-1) - 1. Activations are affine, a step a layer:
x = step (q - zero) with 0 <= q <= 2^b - 1, so that 0 (padding, what a ReLU cuts off) is met exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Shares of the largest magnitude among which the step of least squared error is searched.
SHARES = np.linspace(0.3, 1.0, 36)


def largest(bits: int) -> int:
    """The largest magnitude of a weight of so many bits."""
    return 2 ** (bits - 1) - 1


@jax.custom_jvp
def rounded(x):
    """To the nearest whole number; its gradient is passed on as it is (Bengio et al., arXiv 1308.3432)."""
    return jnp.round(x)


rounded.defjvp(lambda x, dx: (jnp.round(x[0]), dx[0]))


def round_weights(weights, step, top):
    """`weights` on the grid of `step` (broadcast), at most `top` steps from 0; as whole numbers of steps.

    Differentiable in both; the gradient with respect to `step` is that of LSQ (Esser et al., arXiv 1902.08153, eq. 3).
    """
    return jnp.clip(rounded(weights / step), -top, top)


def whole_weights(kernel: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    """The same in NumPy, for good."""
    return np.clip(np.rint(kernel / step), -largest(bits), largest(bits))


def round_inputs(x, step, zero, top):
    """Activations on a grid of `top` + 1 values, `zero` of them below 0; float, differentiable as `round_weights`."""
    return (jnp.clip(rounded(x / step) + zero, 0, top) - zero) * step


def weight_steps(kernel: np.ndarray, bits: int, contracted: tuple[int, ...]) -> np.ndarray:
    """The step of each output channel, with the least squared error; float32, 1 along the `contracted` axes."""
    top = largest(bits)
    magnitude = np.abs(kernel).max(contracted, keepdims=True)
    magnitude = np.where(magnitude > 0, magnitude, 1.0)
    best, least = None, None
    for share in SHARES:
        step = share * magnitude / top
        error = ((np.clip(np.rint(kernel / step), -top, top) * step - kernel) ** 2).sum(contracted, keepdims=True)
        if best is None:
            best, least = step, error
        best, least = np.where(error < least, step, best), np.minimum(error, least)
    return best.astype(np.float32)


def packed(whole: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers as a dense stream of so many bits each, uint8; two a byte at 4 bits."""
    unsigned = (whole.ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, -bits:].ravel())


def unpacked(stream, bits: int, shape):
    """The whole numbers of such a stream, float32 of `shape`; also within a compiled function."""
    digits = (stream[:, None] >> np.arange(7, -1, -1, dtype=np.uint8)) & 1
    count = int(np.prod(shape))
    digits = digits.reshape(-1)[: count * bits].reshape(count, bits)
    powers = 2.0 ** np.arange(bits - 1, -1, -1, dtype=np.float32)
    return (digits.astype(jnp.float32) * powers).sum(1).reshape(shape) - 2.0 ** (bits - 1)
