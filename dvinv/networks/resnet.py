"""The ResNets of He et al. (arXiv 1512.03385): those for ImageNet (section 4.1), also with a stem for CIFAR's 32x32 images,
and the narrow ones for CIFAR (section 4.2), with three stages and shortcuts without parameters.

The paths of submodules correspond to the keys of published PyTorch weights ('layer2_0/downsample_0' is
`layer2.0.downsample.0`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.torch_layers import batch_norm, conv


def small_stem(x: jax.Array, channels: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """Applies the stem for CIFAR: one 3x3 convolution; x [B, H, W, C] -> [B, H, W, channels]."""
    return nn.relu(norm(train, 'bn1')(conv(channels, 3, name='conv1')(x)))


def imagenet_stem(x: jax.Array, channels: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """Applies the stem for ImageNet: a 7x7 convolution and a max-pooling that halve the image each.

    x [B, H, W, C] -> [B, ~H / 4, ~W / 4, channels].
    """
    x = nn.relu(norm(train, 'bn1')(conv(channels, 7, 2, name='conv1')(x)))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm; plus the shortcut; ReLU. It returns `channels` channels."""

    channels: int
    stride: int
    shortcut: Callable  # (x, channels, stride, train) -> x, of the block's output shape
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.norm(train, 'bn1')(conv(self.channels, 3, self.stride, name='conv1')(x)))
        y = self.norm(train, 'bn2')(conv(self.channels, 3, name='conv2')(y))
        return nn.relu(y + self.shortcut(x, self.channels, self.stride, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with BatchNorm; plus the shortcut; ReLU. It returns 4 times `channels` channels.

    The 3x3 convolution has the stride, as in torchvision ("v1.5"); the paper gives it to the first 1x1.
    """

    channels: int
    stride: int
    shortcut: Callable  # (x, channels, stride, train) -> x, of the block's output shape
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        outputs = 4 * self.channels
        y = nn.relu(self.norm(train, 'bn1')(conv(self.channels, 1, name='conv1')(x)))
        y = nn.relu(self.norm(train, 'bn2')(conv(self.channels, 3, self.stride, name='conv2')(y)))
        y = self.norm(train, 'bn3')(conv(outputs, 1, name='conv3')(y))
        return nn.relu(y + self.shortcut(x, outputs, self.stride, train))


def residual_features(
    x: jax.Array,
    train: bool,
    blocks: Sequence[int],
    channels: Sequence[int],
    shortcut: Callable,
    block: type[nn.Module] = BasicBlock,
    stem: Callable = small_stem,
    norm: Callable = batch_norm,
) -> jax.Array:
    """Computes features [B, F] of x [B, H, W, C]: the stem, the stages, and the mean over space.

    Every stage but the first halves the image. It must be called in a compact method of a module, and creates the submodules
    'conv1', 'bn1', 'layer1_0' and so on there.

    Args:
      blocks: the number of blocks per stage.
      channels: the number of channels per stage.
      shortcut: (x, channels, stride, train) -> x, as for `block`.
      block: `BasicBlock` or `Bottleneck`.
      stem: (x, channels, train, norm) -> x.
      norm: (train, name) -> a layer.
    """
    x = stem(x, channels[0], train, norm)
    for stage, (count, width) in enumerate(zip(blocks, channels, strict=True), 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = block(width, stride, shortcut, norm, name=f'layer{stage}_{index}')(x, train)
    return x.mean((1, 2))


def projection(x: jax.Array, channels: int, stride: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """Computes the shortcut: x, or if shapes differ a 1x1 convolution of it and BatchNorm, or another `norm`."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    return norm(train, 'downsample_1')(conv(channels, 1, stride, name='downsample_0')(x))


class ResNet(nn.Module):
    """ResNet-18 with (2, 2, 2, 2) blocks, ResNet-34 with (3, 4, 6, 3). x [B, H, W, 3] -> logits [B, K].

    ResNet-50 has (3, 4, 6, 3) bottlenecks, ResNet-101 (3, 4, 23, 3).
    """

    num_classes: int
    blocks: Sequence[int]  # per stage
    channels: Sequence[int] = (64, 128, 256, 512)  # per stage; a bottleneck's output has 4 times as many
    block: type[nn.Module] = BasicBlock  # or Bottleneck
    stem: Callable = small_stem  # or imagenet_stem: (x, channels, train, norm) -> x
    norm: Callable = batch_norm  # (train, name) -> a layer; timm's networks with GroupNorm use the same names

    # {name in torchvision: name in the common CIFAR repositories}.
    aliases: ClassVar[dict[str, str]] = {'downsample': 'shortcut', 'fc': 'linear'}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shortcut = functools.partial(projection, norm=self.norm)
        x = residual_features(x, train, self.blocks, self.channels, shortcut, self.block, self.stem, self.norm)
        return nn.Dense(self.num_classes, name='fc')(x)


def option_a(x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
    """Computes the parameter-free shortcut: every `stride`-th pixel, with zero channels added on both sides."""
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 images. x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: int  # per stage: n
    channels: Sequence[int] = (16, 32, 64)  # per stage
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks = (self.blocks,) * len(self.channels)
        x = residual_features(x, train, blocks, self.channels, option_a, BasicBlock, small_stem, self.norm)
        return nn.Dense(self.num_classes, name='linear')(x)
