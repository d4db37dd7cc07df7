"""The ImageNet ResNets of He et al. (arXiv 1512.03385, section 4.1), and the same with the stem that CIFAR's 32x32 pictures
get: one 3x3 convolution, no pooling.

Submodules' paths spell the keys of torchvision's state dicts ('layer2_0/downsample_0' is `layer2.0.downsample.0`), which
timm's have too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.networks.residual import BasicBlock, residual_features, small_stem
from dvinv.networks.torch_layers import batch_norm, conv


def projection(x: jax.Array, channels: int, stride: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """The shortcut where shapes differ: a 1x1 convolution and BatchNorm, or another `norm`."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    return norm(train, 'downsample_1')(conv(channels, 1, stride, name='downsample_0')(x))


class ResNet(nn.Module):
    """ResNet-18 with (2, 2, 2, 2) blocks, ResNet-34 with (3, 4, 6, 3). x [B, H, W, 3] -> logits [B, K].

    ResNet-50 with (3, 4, 6, 3) bottlenecks, ResNet-101 with (3, 4, 23, 3).
    """

    num_classes: int
    blocks: Sequence[int]  # a stage
    channels: Sequence[int] = (64, 128, 256, 512)  # a stage; a bottleneck's output has 4 times as many
    block: type[nn.Module] = BasicBlock  # or Bottleneck
    stem: Callable = small_stem  # or imagenet_stem: (x, channels, train, norm) -> x
    norm: Callable = batch_norm  # (train, name) -> a layer; those of timm's networks with GroupNorm keep their names, too

    # What the common CIFAR repositories call the parts that torchvision has by these names.
    aliases: ClassVar[dict[str, str]] = {'downsample': 'shortcut', 'fc': 'linear'}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shortcut = functools.partial(projection, norm=self.norm)
        x = residual_features(x, train, self.blocks, self.channels, shortcut, self.block, self.stem, self.norm)
        return nn.Dense(self.num_classes, name='fc')(x)
