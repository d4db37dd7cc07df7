"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2): three stages of basic blocks, parameter-free shortcuts.

Semantics and names are those of the published PyTorch weights: symmetric padding, BatchNorm epsilon 1e-5, and submodules
whose paths spell the state dict's keys ('layer1_0/conv1' is `layer1.0.conv1`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5


def conv3x3(channels: int, stride: int, name: str) -> nn.Conv:
    """3x3 convolution with one pixel of padding on every side (Flax's SAME would pad stride 2 on one side only)."""
    return nn.Conv(channels, (3, 3), (stride, stride), ((1, 1), (1, 1)), use_bias=False, name=name)


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """BatchNorm with PyTorch's epsilon and momentum (its .1 is Flax's .9)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=EPSILON, name=name)


def option_a(x: jax.Array, channels: int, stride: int) -> jax.Array:
    """The parameter-free shortcut: every `stride`-th pixel, zero channels added on both sides."""
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm; plus the shortcut; ReLU."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(batch_norm(train, 'bn1')(conv3x3(self.channels, self.stride, 'conv1')(x)))
        y = batch_norm(train, 'bn2')(conv3x3(self.channels, 1, 'conv2')(y))
        return nn.relu(y + option_a(x, self.channels, self.stride))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 pictures. x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: int  # a stage: n
    channels: Sequence[int] = (16, 32, 64)  # a stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(batch_norm(train, 'bn1')(conv3x3(self.channels[0], 1, 'conv1')(x)))
        for stage, channels in enumerate(self.channels, 1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(channels, stride, name=f'layer{stage}_{block}')(x, train)
        return nn.Dense(self.num_classes, name='linear')(x.mean((1, 2)))
