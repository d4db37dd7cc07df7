"""The Wide ResNets of Zagoruyko and Komodakis (arXiv 1605.07146): pre-activation blocks, few layers, many channels.

The paths of submodules correspond to the keys of the usual PyTorch port ('block1/layer_0/conv1' is `block1.layer.0.conv1`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv


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


class Stage(nn.Module):
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
            x = Stage(self.blocks, channels, 1 if stage == 1 else 2, name=f'block{stage}')(x, train)
        x = nn.relu(batch_norm(train, 'bn1')(x))
        return nn.Dense(self.num_classes, name='fc')(x.mean((1, 2)))
