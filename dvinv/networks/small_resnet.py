"""x."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm


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
