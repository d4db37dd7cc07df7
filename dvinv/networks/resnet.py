"""The ImageNet ResNets of He et al. (arXiv 1512.03385, section 4.1), and the same networks with a stem for CIFAR's 32x32
images: one 3x3 convolution, no pooling.

The paths of submodules correspond to the keys of torchvision's and timm's state dicts ('layer2_0/downsample_0' is
`layer2.0.downsample.0`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.networks.residual import BasicBlock, residual_features, small_stem
from dvinv.networks.torch_layers import batch_norm, conv


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
