"""Convolutions in the form that XLA's CPU backend is fast at, for any network; its results differ by rounding alone.

XLA on CPU has a fast path for plain convolutions, but computes a depthwise one channel by channel: a MobileNet's gradient
with respect to its images took 2.5 s in that form and .4 s as nine shifted multiply-adds, which are fused into one pass
over the image (8 images of 224 px, 2 cores). A 1x1 convolution is a matrix product, and .3 s as one. GPUs and TPUs have
fast kernels for both, and are left alone.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dvinv.runtime.program import rewritten

IMAGES_LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # images and result [B, H, W, C], kernel [H, W, I, O]


def suited_to(platform: str, fn: Callable) -> Callable:
    """`fn`, with convolutions as the backend `platform` likes them; differentiable with respect to images and kernels."""
    return rewritten(fn, {'conv_general_dilated': _rule}) if platform == 'cpu' else fn


def _rule(params: dict) -> Callable | None:
    """What computes the convolution with these parameters faster; None where nothing is known to."""
    images, kernel = params['shapes']
    numbers = params['dimension_numbers']
    dilated = {*params['lhs_dilation'], *params['rhs_dilation']} != {1}
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != IMAGES_LAST or dilated or params['batch_group_count'] > 1:
        return None
    groups, strides, padding = params['feature_group_count'], params['window_strides'], tuple(params['padding'])
    dtype = params['preferred_element_type']  # of sums and result; None: that of images and kernel
    if kernel[:2] == (1, 1) and groups == 1 and not any(itertools.chain(*padding)):
        return functools.partial(pointwise, strides=strides, precision=params['precision'], dtype=dtype)
    if groups == images[3] == kernel[3] > 1 and min(itertools.chain(*padding)) >= 0:
        return lambda x, k: depthwise(x.astype(dtype or x.dtype), k.astype(dtype or k.dtype), strides, padding)
    return None


def pointwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision=None, dtype=None) -> jax.Array:
    """A 1x1 convolution, x [B, H, W, I], kernel [1, 1, I, O], as a matrix product; sums and result of `dtype`."""
    x = x[:, :: strides[0], :: strides[1]]
    return jnp.einsum('bhwi,io->bhwo', x, kernel[0, 0], precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding) -> jax.Array:
    """Each channel by a kernel of its own: x [B, H, W, C], kernel [h, w, 1, C], padding ((before, after), (left, right))."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = _sizes(x, kernel, strides, padding)
    return _sum(kernel[i, j, 0] * _shifted(padded, (i, j), sizes, strides) for i, j in _taps(kernel))


def _forward(x, kernel, strides, padding):
    return depthwise(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, kept, gradient):
    x, kernel = kept
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    sizes = gradient.shape[1:3]
    to_kernel = [(gradient * _shifted(padded, tap, sizes, strides)).sum((0, 1, 2)) for tap in _taps(kernel)]
    return _to_images(gradient, kernel, x.shape, strides, padding), jnp.stack(to_kernel).reshape(kernel.shape)


depthwise.defvjp(_forward, _backward)


def _to_images(gradient, kernel, shape, strides, padding):
    """The gradient with respect to x [B, H, W, C] of this `shape`.

    Pixel h of x meets output o through row i of the kernel where h + before = i + stride o. The pixels that leave one rest
    when divided by the stride meet the same rows, and make an image of their own: a sum of shifted outputs times a tap each.
    These images are interleaved in the end; a stride of 1 has only one.
    """
    batch, *lengths, channels = shape
    counts = [-(-length // stride) for length, stride in zip(lengths, strides, strict=True)]
    parts = []
    for rests in itertools.product(*map(range, strides)):
        terms = []
        for tap in _taps(kernel):
            places = [rest + before - t for rest, (before, _), t in zip(rests, padding, tap, strict=True)]
            if any(place % stride for place, stride in zip(places, strides, strict=True)):
                continue
            starts = [place // stride for place, stride in zip(places, strides, strict=True)]  # output of the first pixel
            edges = [
                (-start, start + count - size, 0)
                for start, count, size in zip(starts, counts, gradient.shape[1:3], strict=True)
            ]
            shifted = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
            terms.append(kernel[(*tap, 0)] * shifted)
        parts.append(_sum(terms) if terms else jnp.zeros((batch, *counts, channels), gradient.dtype))
    image = jnp.stack(parts, -2).reshape(batch, *counts, *strides, channels).transpose(0, 1, 3, 2, 4, 5)
    whole = [count * stride for count, stride in zip(counts, strides, strict=True)]
    return image.reshape(batch, *whole, channels)[:, : lengths[0], : lengths[1]]


def _taps(kernel) -> list[tuple[int, int]]:
    return [*itertools.product(*map(range, kernel.shape[:2]))]


def _sizes(x, kernel, strides, padding) -> list[int]:
    """Height and width of the result."""
    return [
        (length + sum(margins) - size) // stride + 1
        for length, margins, size, stride in zip(x.shape[1:3], padding, kernel.shape[:2], strides, strict=True)
    ]


def _shifted(padded, start, sizes, strides):
    """The pixels of `padded` that one tap of the kernel meets, one for each pixel of the result."""
    ends = [first + (size - 1) * stride + 1 for first, size, stride in zip(start, sizes, strides, strict=True)]
    return jax.lax.slice(padded, (0, *start, 0), (len(padded), *ends, padded.shape[3]), (1, *strides, 1))


def _sum(terms):
    return functools.reduce(jnp.add, terms)
