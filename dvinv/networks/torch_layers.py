"""Layers with PyTorch's semantics, for networks with published PyTorch weights."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.runtime.errors import DvinvError


def conv(channels: int, size: int, stride: int = 1, *, groups: int = 1, bias: bool = False, name: str) -> nn.Conv:
    """Returns a square convolution with equal padding on all sides (Flax's SAME would pad stride 2 on one side only)."""
    margin = (size // 2, size // 2)
    return nn.Conv(
        channels, (size, size), (stride, stride), (margin, margin), feature_group_count=groups, use_bias=bias, name=name
    )


def batch_norm(train: bool, name: str | None = None, epsilon: float = 1e-5) -> nn.BatchNorm:
    """Returns BatchNorm with PyTorch's epsilon and momentum (its .1 is Flax's .9)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=epsilon, name=name)


def group_norm(train: bool, name: str, groups: int = 32):
    """Returns GroupNorm, a function x -> x, with PyTorch's epsilon and gcd(groups, channels) groups."""

    def normalise(x: jax.Array) -> jax.Array:
        num_groups = math.gcd(groups, x.shape[-1])
        return nn.GroupNorm(num_groups=num_groups, epsilon=1e-5, use_fast_variance=False, name=name)(x)

    return normalise


def layer_norm(name: str) -> nn.LayerNorm:
    """Returns LayerNorm over the channels with the epsilon of vision transformers and ConvNeXts."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class Mlp(nn.Module):
    """A dense layer of `inner` channels, the exact GELU, a dense layer back to the channels of x [B, ..., C]."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial = nn.initializers.xavier_uniform()
        y = nn.gelu(nn.Dense(self.inner, kernel_init=initial, name='fc1')(x), approximate=False)
        return nn.Dense(x.shape[-1], kernel_init=initial, name='fc2')(y)


def refuse_small_images(network: str, x: jax.Array, smallest: int) -> None:
    """Raises DvinvError if the images x [B, H, W, C] of a network, such as 'A VGG', are smaller than `smallest` pixels."""
    height, width = x.shape[1:3]
    if min(height, width) < smallest:
        raise DvinvError(f'{network} takes images of {smallest}x{smallest} or larger, not {height}x{width}.')


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """Averages x [B, H, W, C] to [B, size, size, C] for any H and W, as PyTorch's AdaptiveAvgPool2d does.

    Along an axis of n inputs, output i is the mean of those from floor(i n / size) up to, but not including,
    ceil((i + 1) n / size).
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_windows(length, size), x.dtype) for length in x.shape[1:3])
    return jnp.einsum('ih,jw,bhwc->bijc', rows, columns, x)


def _windows(length: int, size: int) -> np.ndarray:
    """Returns the matrix [size, length] that computes the means of `adaptive_mean` along one axis."""
    inputs, outputs = np.arange(length), np.arange(size)[:, None]
    inside = (inputs >= outputs * length // size) & (inputs < -(-(outputs + 1) * length // size))
    return inside / inside.sum(1, keepdims=True)
