"""Rewriting of any network to operations that are fast on XLA's CPU backend; results differ only by rounding.

XLA on CPU has a fast path for plain convolutions of images that are not smaller than the kernel, and none for

- depthwise convolutions, computed channel by channel: a MobileNet's gradient with respect to its images took 2.5 s with
  them, and .3 s with nine shifted multiply-adds, which are fused into one pass over the image (8 images of 224 px, 2 cores);
- 1x1 convolutions, which are matrix products;
- images smaller than the kernel, as at the end of a VGG: value and gradient of a 3x3 convolution of 32 images of 2x2 pixels
  and 512 channels took 906 ms, and 18 ms as a matrix product;
- the gradient of max-pooling: 203 ms for the first max-pooling of a ResNet, on 8 images of 112 px and 64 channels, and 28 ms
  here.

GPUs and TPUs have fast kernels for all of them, and networks stay unchanged there.
"""

import functools
import itertools
from collections.abc import Callable

import jax.numpy as jnp

from dvinv.graph.rewriting import rewritten
from dvinv.networks.convolutions import depthwise, gathered, pointwise
from dvinv.networks.pooling import max_pool

IMAGES_LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # images and result [B, H, W, C], kernel [H, W, I, O]


def suited_to(platform: str, fn: Callable) -> Callable:
    """Returns `fn` with operations that are fast on the backend `platform`, still differentiable in the same arguments."""
    return rewritten(fn, {'conv_general_dilated': _convolution, 'reduce_window_max': _max}) if platform == 'cpu' else fn


def _convolution(params: dict) -> Callable | None:
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
    return None


def _max(params: dict) -> Callable | None:
    """Returns a function that computes the max-pooling with these parameters faster; None if there is none."""
    (images,) = params['avals']
    size, strides, padding = (params[name] for name in ('window_dimensions', 'window_strides', 'padding'))
    dilated = {*params['base_dilation'], *params['window_dilation']} != {1}
    over_pixels = len(size) == 4 and {(one[0], one[3]) for one in (size, strides)} == {(1, 1)}
    if dilated or not over_pixels or any(padding[0] + padding[3]) or not jnp.issubdtype(images.dtype, jnp.floating):
        return None
    return functools.partial(max_pool, size=size[1:3], strides=strides[1:3], padding=tuple(padding[1:3]))
