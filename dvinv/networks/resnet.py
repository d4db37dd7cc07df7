"""Residual networks: the ResNets, the Wide ResNets, and a small one for small images.

The ResNets of He et al. (arXiv 1512.03385) are those for ImageNet (section 4.1), also with a stem for CIFAR's 32x32 images,
and the narrow ones for CIFAR (section 4.2), with three stages and shortcuts without parameters. The paths of submodules
correspond to the keys of published PyTorch weights ('layer2_0/downsample_0' is `layer2.0.downsample.0`).

The Wide ResNets of Zagoruyko and Komodakis (arXiv 1605.07146) have pre-activation blocks, few layers and many channels.
The paths of submodules correspond to the keys of the usual PyTorch port ('block1/layer_0/conv1' is `block1.layer.0.conv1`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.torch_layers import batch_norm, conv


def cifar_stem(x: jax.Array, channels: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
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
    stem: Callable = cifar_stem,
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
    stem: Callable = cifar_stem  # or imagenet_stem: (x, channels, train, norm) -> x
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
        x = residual_features(x, train, blocks, self.channels, option_a, BasicBlock, cifar_stem, self.norm)
        return nn.Dense(self.num_classes, name='linear')(x)


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU, conv, BatchNorm, ReLU, conv; plus x, or if shapes differ plus a 1x1 convolution of relu(bn1(x))."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        active = nn.relu(batch_norm(train, 'bn1')(x))
        y = conv(self.channels, 3, self.stride, name='conv1')(active)
        y = conv(self.channels, 3, name='conv2')(nn.relu(batch_norm(train, 'bn2')(y)))
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = conv(self.channels, 1, self.stride, name='convShortcut')(active)
        return x + y


class WideStage(nn.Module):
    """Blocks with the same number of channels; the first one has the stride."""

    blocks: int
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for block in range(self.blocks):
            x = PreActivationBlock(self.channels, 1 if block else self.stride, name=f'layer_{block}')(x, train)
        return x


class WideResNet(nn.Module):
    """WRN-(6n + 4)-k for 32x32 images. x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: int  # per stage: n
    channels: Sequence[int]  # of the stem, then per stage: 16, 16k, 32k, 64k

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem, *stages = self.channels
        x = conv(stem, 3, name='conv1')(x)
        for stage, channels in enumerate(stages, 1):
            x = WideStage(self.blocks, channels, 1 if stage == 1 else 2, name=f'block{stage}')(x, train)
        x = nn.relu(batch_norm(train, 'bn1')(x))
        return nn.Dense(self.num_classes, name='fc')(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and a shortcut (1x1 convolution and BatchNorm where shapes differ)."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        y = nn.Conv(self.channels, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(batch_norm(train)(y))
        y = batch_norm(train)(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = batch_norm(train)(nn.Conv(self.channels, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class SmallResNet(nn.Module):
    """A 3x3 stem, one residual block per stage (all but the first halve the image), and a dense layer with BatchNorm.

    x [B, H, W, C] -> logits [B, K].
    """

    num_classes: int
    channels: Sequence[int] = (32, 64)  # per stage
    hidden: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(batch_norm(train)(nn.Conv(self.channels[0], (3, 3), use_bias=False)(x)))
        for stage, channels in enumerate(self.channels):
            x = ResidualBlock(channels, 2 if stage else 1)(x, train)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(batch_norm(train)(nn.Dense(self.hidden, use_bias=False)(x.reshape(x.shape[0], -1))))
        return nn.Dense(self.num_classes)(x)
