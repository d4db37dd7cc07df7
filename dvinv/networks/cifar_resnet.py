"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2): three stages of basic blocks, parameter-free shortcuts.

Semantics and names are those of the published PyTorch weights: submodules' paths spell the state dict's keys
('layer1_0/conv1' is `layer1.0.conv1`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.torch_layers import batch_norm, conv


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
        y = nn.relu(batch_norm(train, 'bn1')(conv(self.channels, 3, self.stride, name='conv1')(x)))
        y = batch_norm(train, 'bn2')(conv(self.channels, 3, name='conv2')(y))
        return nn.relu(y + option_a(x, self.channels, self.stride))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 pictures. x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: int  # a stage: n
    channels: Sequence[int] = (16, 32, 64)  # a stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(batch_norm(train, 'bn1')(conv(self.channels[0], 3, name='conv1')(x)))
        for stage, channels in enumerate(self.channels, 1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(channels, stride, name=f'layer{stage}_{block}')(x, train)
        return nn.Dense(self.num_classes, name='linear')(x.mean((1, 2)))
