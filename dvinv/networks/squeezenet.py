"""SqueezeNet 1.1 of Iandola et al. (arXiv 1602.07360): fire modules, no BatchNorm.

The convolutions are numbered as in Gluon: 'conv0' is `squeezenet0_conv0_weight` and `squeezenet0_conv0_bias`; in the state
dict of torchvision it is `features.0.weight` and `features.0.bias`.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.torch_layers import conv, refuse_small_images

POOLED = (0, 2, 4)  # the fire modules with a max-pooling before them
SMALLEST = 31  # height and width that the stem and three poolings reduce to one pixel
FIRES = (3, 4, 6, 7, 9, 10, 11, 12)  # indices of the fire modules in torchvision's list of layers


def torchvision_names() -> dict[str, str]:
    """Returns {name of a submodule here: name in torchvision}."""
    parts = ('squeeze', 'expand1x1', 'expand3x3')
    fires = [f'features.{place}.{part}' for place in FIRES for part in parts]
    names = ['features.0', *fires, 'classifier.1']
    return {f'conv{index}': name for index, name in enumerate(names)}


def max_pool(x: jax.Array) -> jax.Array:
    """Halves x [B, H, W, C] by 3x3 max-pooling; a last partial window counts, as in Gluon and torchvision."""
    margins = [(0, (length - 3) % 2) for length in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), margins)


class SqueezeNet(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K], none below 0; other images from 31x31 up work too."""

    num_classes: int
    channels: Sequence[int] = (64, 16, 16, 32, 32, 48, 48, 64, 64)  # of the stem, then of each fire module's squeeze layer

    aliases: ClassVar[dict[str, str]] = torchvision_names()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError for images that are too small to be pooled three times."""
        refuse_small_images('A SqueezeNet', x, SMALLEST)

        def layer(x, index: int, channels: int, size: int):
            return nn.relu(conv(channels, size, bias=True, name=f'conv{index}')(x))

        stem, *squeezed = self.channels
        x = nn.relu(nn.Conv(stem, (3, 3), (2, 2), 'VALID', name='conv0')(x))
        for fire, channels in enumerate(squeezed):
            if fire in POOLED:
                x = max_pool(x)
            index = 3 * fire + 1
            x = layer(x, index, channels, 1)
            x = jnp.concatenate([layer(x, index + 1, 4 * channels, 1), layer(x, index + 2, 4 * channels, 3)], axis=-1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return layer(x, 3 * len(squeezed) + 1, self.num_classes, 1).mean((1, 2))
