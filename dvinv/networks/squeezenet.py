"""SqueezeNet 1.1 of Iandola et al. (arXiv 1602.07360): fire modules, no BatchNorm.

Submodules count the convolutions as Gluon does: 'conv0' is `squeezenet0_conv0_weight` and `squeezenet0_conv0_bias`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.errors import DvinvError
from dvinv.networks.torch_layers import conv

POOLED = (0, 2, 4)  # the fire modules with a max-pooling before them
SMALLEST = 31  # height and width that the stem and three poolings leave one pixel of


class SqueezeNet(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K], none below 0; of other pictures too, from 31x31 up."""

    num_classes: int
    channels: Sequence[int] = (64, 16, 16, 32, 32, 48, 48, 64, 64)  # of the stem, then what a fire module squeezes to

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Raises DvinvError for a picture that is too small to be pooled three times."""
        height, width = x.shape[1:3]
        if min(height, width) < SMALLEST:
            raise DvinvError(f'A SqueezeNet takes images of {SMALLEST}x{SMALLEST} or larger, not {height}x{width}.')

        def layer(x, index: int, channels: int, size: int):
            return nn.relu(conv(channels, size, bias=True, name=f'conv{index}')(x))

        stem, *squeezed = self.channels
        x = nn.relu(nn.Conv(stem, (3, 3), (2, 2), 'VALID', name='conv0')(x))
        for fire, channels in enumerate(squeezed):
            if fire in POOLED:
                x = nn.max_pool(x, (3, 3), (2, 2))
            index = 3 * fire + 1
            x = layer(x, index, channels, 1)
            x = jnp.concatenate([layer(x, index + 1, 4 * channels, 1), layer(x, index + 2, 4 * channels, 3)], axis=-1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return layer(x, 3 * len(squeezed) + 1, self.num_classes, 1).mean((1, 2))
