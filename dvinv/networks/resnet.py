"""The ImageNet ResNets of He et al. (arXiv 1512.03385, section 4.1), with the stem that CIFAR's 32x32 pictures get: one
3x3 convolution, no pooling.

Submodules' paths spell the keys of torchvision's state dicts ('layer2_0/downsample_0' is `layer2.0.downsample.0`).
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm; plus x, through a 1x1 convolution and BatchNorm where shapes differ; ReLU."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(batch_norm(train, 'bn1')(conv(self.channels, 3, self.stride, name='conv1')(x)))
        y = batch_norm(train, 'bn2')(conv(self.channels, 3, name='conv2')(y))
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = conv(self.channels, 1, self.stride, name='downsample_0')(x)
            x = batch_norm(train, 'downsample_1')(x)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """ResNet-18 with (2, 2, 2, 2) blocks, ResNet-34 with (3, 4, 6, 3). x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: Sequence[int]  # a stage
    channels: Sequence[int] = (64, 128, 256, 512)  # a stage

    # What the common CIFAR repositories call the parts that torchvision has by these names.
    aliases: ClassVar[dict[str, str]] = {'downsample': 'shortcut', 'fc': 'linear'}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(batch_norm(train, 'bn1')(conv(self.channels[0], 3, name='conv1')(x)))
        for stage, (blocks, channels) in enumerate(zip(self.blocks, self.channels, strict=True), 1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = BasicBlock(channels, stride, name=f'layer{stage}_{block}')(x, train)
        return nn.Dense(self.num_classes, name='fc')(x.mean((1, 2)))
