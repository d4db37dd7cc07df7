"""Rewriting of any network to operations that are fast on XLA's CPU backend; results differ only by rounding.

XLA on CPU has a fast path for plain convolutions of images that are not smaller than the kernel, and none for

- depthwise convolutions, computed channel by channel: a MobileNet's gradient with respect to its images took 2.5 s with
  them, and .3 s with nine shifted multiply-adds, which are fused into one pass over the image (8 images of 224 px, 2 cores);
- 1x1 convolutions, which are matrix products;
- images smaller than the kernel, as at the end of a VGG: value and gradient of a 3x3 convolution of 32 images of 2x2 pixels
  and 512 channels took 906 ms, and 18 ms as a matrix product;
- the gradient of max-pooling: 203 ms for the first max-pooling of a ResNet, on 8 images of 112 px and 64 channels, and 28 ms
  here;
- the gradient of a convolution with respect to its kernel, if the images are too many for the caches: that of 64 images of
  32 px and 64 channels took more than ten times as long as the forward pass. A few images at a time take as long as that.

GPUs and TPUs have fast kernels for all of them, and networks stay unchanged there.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dvinv.graph.program import rewritten
from dvinv.networks.classifier import AnyArray

IMAGES_LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # images and result [B, H, W, C], kernel [H, W, I, O]

Inputs = Float[AnyArray, 'B H W I']
Padding = tuple[tuple[int, int], tuple[int, int]]  # (above, below), (left, right), in pixels

CHUNK_BYTES = (
    2**21
)  # most bytes of the windows of a chunk of images, of which the gradient of a kernel is computed at a time
CHUNKED_BYTES = 2**24  # bytes of the windows of a batch, up to which XLA's own gradient is as fast


def suited_to(platform: str, fn: Callable, trained: bool = False) -> Callable:
    """Returns `fn` with operations that are fast on the backend `platform`, still differentiable in the same arguments.

    Args:
      platform: the backend, 'cpu', 'gpu' or 'tpu'.
      fn: a function from arrays, or trees of arrays, to a tree of arrays.
      trained: whether the gradients with respect to kernels matter too. For programs on a single device: on several, their
        images would be gathered.
    """
    if platform != 'cpu':
        return fn
    return rewritten(fn, {'conv_general_dilated': functools.partial(_convolution, trained), 'reduce_window_max': _max})


def _convolution(trained: bool, params: dict) -> Callable | None:
    """Returns a function that computes the convolution with these parameters faster; None if there is none."""
    images, kernel = (aval.shape for aval in params['avals'])
    numbers = params['dimension_numbers']
    dilated = {*params['lhs_dilation'], *params['rhs_dilation']} != {1}
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != IMAGES_LAST or dilated or params['batch_group_count'] > 1:
        return None
    groups, strides, padding = params['feature_group_count'], params['window_strides'], tuple(params['padding'])
    margins = [*itertools.chain(*padding)]
    dtype = params['preferred_element_type']  # dtype of sums and result; None: that of images and kernel
    product = {'strides': strides, 'precision': params['precision'], 'dtype': dtype}
    if groups == 1 and kernel[:2] == (1, 1) and not any(margins):
        return functools.partial(pointwise, **product)
    if groups == 1 and min(margins) >= 0 and (images[1] < kernel[0] or images[2] < kernel[1]):
        return functools.partial(gathered, padding=padding, **product)
    if groups == images[3] == kernel[3] > 1 and min(margins) >= 0:
        return lambda x, k: depthwise(x.astype(dtype or x.dtype), k.astype(dtype or k.dtype), strides, padding)
    dtypes = {*(aval.dtype for aval in params['avals']), np.dtype(dtype or np.float32)}
    if trained and groups == 1 and min(margins) >= 0 and dtypes == {np.dtype(np.float32)}:
        pixels = images[0] * math.prod(places(images[1:3], kernel[:2], strides, padding))
        if 4 * pixels * math.prod(kernel[:3]) > CHUNKED_BYTES:
            return lambda x, k: chunked(x, k, strides, padding, params['precision'])
    return None


def _max(params: dict) -> Callable | None:
    """Returns a function that computes the max-pooling with these parameters faster; None if there is none."""
    (images,) = params['avals']
    size, strides, padding = (params[name] for name in ('window_dimensions', 'window_strides', 'padding'))
    dilated = {*params['base_dilation'], *params['window_dilation']} != {1}
    over_pixels = len(size) == 4 and {size[0], size[3], strides[0], strides[3]} == {1}
    if dilated or not over_pixels or any(padding[0] + padding[3]) or not jnp.issubdtype(images.dtype, jnp.floating):
        return None
    return functools.partial(max_pool, size=size[1:3], strides=strides[1:3], padding=tuple(padding[1:3]))


# The forms: all take images [B, H, W, I] and kernels [h, w, I, O], as Flax does.


def pointwise(
    x: Inputs, kernel: Float[AnyArray, '1 1 I O'], strides: tuple[int, int], precision=None, dtype=None
) -> Float[jax.Array, 'B _ _ O']:
    """Computes a 1x1 convolution, x [B, H, W, I], kernel [1, 1, I, O], as a matrix product; sums and result of `dtype`."""
    x = x[:, :: strides[0], :: strides[1]]
    return jnp.einsum('bhwi,io->bhwo', x, kernel[0, 0], precision=precision, preferred_element_type=dtype)


def gathered(
    x: Inputs, kernel: Float[AnyArray, 'h w I O'], strides: tuple[int, int], padding: Padding, precision=None, dtype=None
) -> Float[jax.Array, 'B _ _ O']:
    """Computes a convolution, x [B, H, W, I], kernel [h, w, I, O], as one matrix product over the pixels of all windows."""
    size = kernel.shape[:2]
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding)
    windows = jnp.concatenate([shifted(x, tap, sizes, strides) for tap in taps(size)], -1)  # [B, H', W', h w I]
    matrix = kernel.reshape(-1, kernel.shape[3])
    return jnp.einsum('bhwi,io->bhwo', windows, matrix, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(
    x: Inputs, kernel: Float[AnyArray, 'h w 1 I'], strides: tuple[int, int], padding: Padding
) -> Float[jax.Array, 'B _ _ I']:
    """Computes a depthwise convolution, x [B, H, W, I], kernel [h, w, 1, I], by shifted multiply-adds."""
    size = kernel.shape[:2]
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding)
    return total(kernel[(*tap, 0)] * shifted(x, tap, sizes, strides) for tap in taps(size))


def _forward(x, kernel, strides, padding):
    return depthwise(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, gradient):
    x, kernel = residuals
    images, sizes = padded(x, padding), gradient.shape[1:3]
    to_kernel = [(gradient * shifted(images, tap, sizes, strides)).sum((0, 1, 2)) for tap in taps(kernel.shape[:2])]
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
    for remainders, tap in itertools.product(taps(strides), taps(kernel.shape[:2])):
        outputs = [remainder + before - t for remainder, (before, _), t in zip(remainders, padding, tap, strict=True)]
        if not any(output % stride for output, stride in zip(outputs, strides, strict=True)):
            starts[remainders, tap] = [output // stride for output, stride in zip(outputs, strides, strict=True)]
    lowest, highest = (np.array([*starts.values()]).min(0), np.array([*starts.values()]).max(0))
    # One padding for all taps: XLA keeps its result, but would recompute the input of nine separate paddings nine times.
    after = highest + counts - gradient.shape[1:3]
    gradients = padded(gradient, tuple(zip(-lowest, after, strict=True)))
    parts = []
    for remainders in taps(strides):
        terms = [
            kernel[(*tap, 0)] * shifted(gradients, start - lowest, counts, (1, 1))
            for (remainders_of_tap, tap), start in starts.items()
            if remainders_of_tap == remainders
        ]
        parts.append(total(terms) if terms else jnp.zeros((batch, *counts, channels), gradient.dtype))
    image = jnp.stack(parts, -2).reshape(batch, *counts, *strides, channels).transpose(0, 1, 3, 2, 4, 5)
    size = [count * stride for count, stride in zip(counts, strides, strict=True)]
    return image.reshape(batch, *size, channels)[:, : lengths[0], : lengths[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def chunked(
    x: Inputs, kernel: Float[AnyArray, 'h w I O'], strides: tuple[int, int], padding: Padding, precision=None
) -> Float[jax.Array, 'B _ _ O']:
    """Computes a convolution, x [B, H, W, I], kernel [h, w, I, O], as XLA does; its gradient for the kernel, in chunks.

    This gradient is the sum over chunks of images of (values of all windows) transposed times (gradient of the result). The
    values of a chunk fit in the caches of a CPU.
    """
    return _by_xla(x, kernel, strides, padding, precision)


def _by_xla(x, kernel, strides, padding, precision):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout, precision=precision)


def _chunked_forward(x, kernel, strides, padding, precision):
    return _by_xla(x, kernel, strides, padding, precision), (x, kernel)


def _chunked_backward(strides, padding, precision, residuals, gradient):
    x, kernel = residuals
    (to_images,) = jax.linear_transpose(lambda x: _by_xla(x, kernel, strides, padding, precision), x)(gradient)
    size, sizes, values = kernel.shape[:2], gradient.shape[1:3], math.prod(kernel.shape[:3])  # `values` of a window
    most = max(1, CHUNK_BYTES // (4 * math.prod(sizes) * values))
    count = max(divisor for divisor in range(1, most + 1) if len(x) % divisor == 0)  # of images in a chunk

    def add(sums, chunk):
        images, gradients = chunk
        windows = jnp.concatenate([shifted(padded(images, padding), tap, sizes, strides) for tap in taps(size)], -1)
        return sums + jnp.einsum('bhwi,bhwo->io', windows, gradients, precision=precision), None

    chunks = [array.reshape(-1, count, *array.shape[1:]) for array in (x, gradient)]
    sums, _ = jax.lax.scan(add, jnp.zeros((values, kernel.shape[3]), kernel.dtype), chunks)
    return to_images, sums.reshape(kernel.shape)


chunked.defvjp(_chunked_forward, _chunked_backward)


def max_pool(x: Inputs, size: Sequence[int], strides: Sequence[int], padding: Padding) -> Float[jax.Array, 'B _ _ I']:
    """Takes the maximum of every window of x [B, H, W, I]; the gradient goes to the first of equal values, as in XLA."""
    sizes, x = places(x.shape[1:3], size, strides, padding), padded(x, padding, -jnp.inf)
    return functools.reduce(_larger, (shifted(x, tap, sizes, strides) for tap in taps(size)))


def _larger(first, second):
    """Returns the elementwise maximum, NaN where one is NaN; jnp.maximum would split the gradient between equal values."""
    return jnp.where((second > first) | jnp.isnan(second), second, first)


# Sliding windows: for each tap of a kernel, a position (row, column), the image of all pixels that it is multiplied with.


def taps(size: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the taps of a window of this (height, width), row by row."""
    height, width = size
    return [*itertools.product(range(height), range(width))]


def places(shape: Sequence[int], size: Sequence[int], strides: Sequence[int], padding: Padding) -> list[int]:
    """Returns [height, width] of the result for images of (height, width) `shape`."""
    return [
        (length + sum(margins) - extent) // stride + 1
        for length, margins, extent, stride in zip(shape, padding, size, strides, strict=True)
    ]


def padded(x: AnyArray, padding: Padding, value: float = 0.0) -> jax.Array:
    """Pads x [B, H, W, C] with `value`; negative padding crops."""
    margins = ((0, 0, 0), *((int(before), int(after), 0) for before, after in padding), (0, 0, 0))
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), margins)


def shifted(x: AnyArray, tap: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Returns the pixels of x [B, H, W, C], already padded, at one tap: one for each pixel of a result of these `sizes`."""
    ends = [first + (size - 1) * stride + 1 for first, size, stride in zip(tap, sizes, strides, strict=True)]
    return jax.lax.slice(x, (0, *tap, 0), (len(x), *ends, x.shape[3]), (1, *strides, 1))


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """Returns the sum of a few arrays, added in order."""
    return functools.reduce(jnp.add, terms)
