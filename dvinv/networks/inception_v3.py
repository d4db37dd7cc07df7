"""The Inception-v3 of Szegedy et al. (arXiv 1512.00567) as in torchvision and timm, without its auxiliary head.

Submodules have exactly the names of those state dicts ('Mixed_5b/branch5x5_1/conv' is `Mixed_5b.branch5x5_1.conv`).
Published weights take pixels in [-1, 1], mean and std .5: torchvision's `transform_input` converts ImageNet's normalisation
to that. This is not the TensorFlow graph of 2015 behind published FIDs, which has 1,008 classes and other poolings.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.torch_layers import batch_norm, refuse_small_images

SMALLEST = 75  # height and width that stem, poolings and strides reduce to one pixel


class Convolution(nn.Module):
    """A convolution with a kernel of (height, width) `size` and no bias, BatchNorm with epsilon .001, and ReLU."""

    channels: int
    size: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.channels, self.size, (self.stride,) * 2, self.padding, use_bias=False, name='conv')(x)
        return nn.relu(batch_norm(train, 'bn', epsilon=1e-3)(x))


def layers(base_channels: int, train: bool) -> Callable:
    """Returns `layer(x, name, channels, size, stride, padding)`, which applies a `Convolution`.

    Channel counts are multiplied by `base_channels` / 16. By default, a layer with a stride has no padding, and the others
    keep the image size. Each becomes a submodule of the calling module.
    """

    def layer(x, name: str, channels: int, size=(1, 1), stride: int = 1, padding: str = ''):
        padding = padding or ('SAME' if stride == 1 else 'VALID')
        return Convolution(channels * base_channels // 16, size, stride, padding, name=name)(x, train)

    return layer


# The blocks: (x [B, H, W, C], layer) -> the outputs of their branches, to be concatenated along the channels.


def block_a(x, layer, pooled: int):
    """Computes the branches 1x1, 5x5, two 3x3, and mean-pooling with `pooled` channels."""
    five = layer(layer(x, 'branch5x5_1', 48), 'branch5x5_2', 64, (5, 5))
    double = layer(layer(x, 'branch3x3dbl_1', 64), 'branch3x3dbl_2', 96, (3, 3))
    double = layer(double, 'branch3x3dbl_3', 96, (3, 3))
    return layer(x, 'branch1x1', 64), five, double, layer(mean_pool(x), 'branch_pool', pooled)


def block_b(x, layer):
    """Computes branches that halve the image: 3x3, two 3x3, and max-pooling."""
    double = layer(layer(x, 'branch3x3dbl_1', 64), 'branch3x3dbl_2', 96, (3, 3))
    double = layer(double, 'branch3x3dbl_3', 96, (3, 3), 2)
    return layer(x, 'branch3x3', 384, (3, 3), 2), double, max_pool(x)


def block_c(x, layer, inner: int):
    """Computes the branches 1x1, one 7x7, two 7x7, and mean-pooling.

    Each 7x7 is a 1x7 and a 7x1 convolution with `inner` channels between them.
    """
    row, column = (1, 7), (7, 1)
    once = layer(layer(x, 'branch7x7_1', inner), 'branch7x7_2', inner, row)
    once = layer(once, 'branch7x7_3', 192, column)
    twice = layer(layer(x, 'branch7x7dbl_1', inner), 'branch7x7dbl_2', inner, column)
    twice = layer(layer(twice, 'branch7x7dbl_3', inner, row), 'branch7x7dbl_4', inner, column)
    twice = layer(twice, 'branch7x7dbl_5', 192, row)
    return layer(x, 'branch1x1', 192), once, twice, layer(mean_pool(x), 'branch_pool', 192)


def block_d(x, layer):
    """Computes branches that halve the image: 3x3, 7x7 followed by 3x3, and max-pooling."""
    three = layer(layer(x, 'branch3x3_1', 192), 'branch3x3_2', 320, (3, 3), 2)
    seven = layer(layer(x, 'branch7x7x3_1', 192), 'branch7x7x3_2', 192, (1, 7))
    seven = layer(layer(seven, 'branch7x7x3_3', 192, (7, 1)), 'branch7x7x3_4', 192, (3, 3), 2)
    return three, seven, max_pool(x)


def block_e(x, layer):
    """Computes the branches 1x1, one 3x3, two 3x3, and mean-pooling.

    The last 3x3 of a branch is a 1x3 and a 3x1 convolution side by side.
    """
    once = layer(x, 'branch3x3_1', 384)
    twice = layer(layer(x, 'branch3x3dbl_1', 448), 'branch3x3dbl_2', 384, (3, 3))
    once = [layer(once, f'branch3x3_2{end}', 384, size) for end, size in (('a', (1, 3)), ('b', (3, 1)))]
    twice = [layer(twice, f'branch3x3dbl_3{end}', 384, size) for end, size in (('a', (1, 3)), ('b', (3, 1)))]
    return layer(x, 'branch1x1', 320), *once, *twice, layer(mean_pool(x), 'branch_pool', 192)


def mean_pool(x: jax.Array) -> jax.Array:
    """Averages the 3x3 pixels around each pixel; the size stays the same, and pixels outside the image count as 0."""
    return nn.avg_pool(x, (3, 3), padding='SAME')


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum over windows of 3x3 pixels, with stride 2 and no padding."""
    return nn.max_pool(x, (3, 3), (2, 2))


POOLED, INNER = {'b': 32, 'c': 64, 'd': 64}, {'b': 128, 'c': 160, 'd': 160, 'e': 192}
BLOCKS: dict[str, Callable] = {
    **{f'Mixed_5{letter}': functools.partial(block_a, pooled=pooled) for letter, pooled in POOLED.items()},
    'Mixed_6a': block_b,
    **{f'Mixed_6{letter}': functools.partial(block_c, inner=inner) for letter, inner in INNER.items()},
    'Mixed_7a': block_d,
    'Mixed_7b': block_e,
    'Mixed_7c': block_e,
}


class Mixed(nn.Module):
    """A block: its branches, concatenated along the channels."""

    branches: Callable  # (x, layer) -> outputs of the branches
    base_channels: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return jnp.concatenate(self.branches(x, layers(self.base_channels, train)), axis=-1)


class InceptionV3(nn.Module):
    """x [B, 299, 299, 3] -> logits [B, K]; other images from 75x75 up work too: the head gets the mean over space."""

    num_classes: int
    base_channels: int = 16  # channels where the published network has 16; all its channel counts are multiples of 16

    counted: ClassVar[bool] = False  # 'branch5x5_1' is not an item of a list
    unused: ClassVar[tuple[str, ...]] = ('AuxLogits.',)  # the auxiliary head, which is used in training only

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError for images that are too small."""
        refuse_small_images('An Inception-v3', x, SMALLEST)
        layer = layers(self.base_channels, train)
        x = layer(x, 'Conv2d_1a_3x3', 32, (3, 3), 2)
        x = layer(x, 'Conv2d_2a_3x3', 32, (3, 3), padding='VALID')
        x = max_pool(layer(x, 'Conv2d_2b_3x3', 64, (3, 3)))
        x = layer(x, 'Conv2d_3b_1x1', 80)
        x = max_pool(layer(x, 'Conv2d_4a_3x3', 192, (3, 3), padding='VALID'))
        for name, branches in BLOCKS.items():
            x = Mixed(branches, self.base_channels, name=name)(x, train)
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name='fc')(x)
