"""The ConvNeXt of Liu et al. (arXiv 2201.03545): depthwise 7x7 convolutions, LayerNorm, GELU, layer scale.

The paths of submodules correspond to the keys of timm's state dicts ('stages_0/blocks_0/conv_dw' is
`stages.0.blocks.0.conv_dw`); torchvision and the authors have the same network under other names.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from dvinv.networks.naming import nested_names
from dvinv.networks.torch_layers import Mlp, conv, layer_norm, refuse_small_images

SMALLEST = 32  # height and width that the stem and three strides reduce to one pixel


def torchvision_names(blocks: Sequence[int]) -> dict[str, str]:
    """Returns {name in timm: name in torchvision}, where stem, stages and downsampling layers alternate in one list.

    Args:
      blocks: the number of blocks per stage.
    """
    parts = {'conv_dw': 'block.0', 'norm': 'block.2', 'mlp.fc1': 'block.3', 'mlp.fc2': 'block.5', 'gamma': 'layer_scale'}
    stages = [(f'stages.{stage}.downsample', f'features.{2 * stage}') for stage in range(len(blocks))]
    return {
        'stem.0': 'features.0.0',
        'stem.1': 'features.0.1',
        'head.norm': 'classifier.0',
        'head.fc': 'classifier.2',
        **nested_names(stages, {'0': '0', '1': '1'}),
        **nested_names(_blocks(blocks, lambda stage, block: f'features.{2 * stage + 1}.{block}'), parts),
    }


def authors_names(blocks: Sequence[int]) -> dict[str, str]:
    """Returns {name in timm: name in the authors' repository}; `blocks` is the number of blocks per stage."""
    parts = {'conv_dw': 'dwconv', 'norm': 'norm', 'mlp.fc1': 'pwconv1', 'mlp.fc2': 'pwconv2', 'gamma': 'gamma'}
    stages = [(f'stages.{stage}.downsample', f'downsample_layers.{stage}') for stage in range(len(blocks))]
    return {
        **nested_names([('stem', 'downsample_layers.0'), *stages], {'0': '0', '1': '1'}),
        'head.norm': 'norm',
        'head.fc': 'head',
        **nested_names(_blocks(blocks, lambda stage, block: f'stages.{stage}.{block}'), parts),
    }


def _blocks(blocks: Sequence[int], name: Callable[[int, int], str]) -> list[tuple[str, str]]:
    """Returns [(name of a block in timm, its `name(stage, block)` elsewhere)]."""
    numbers = [(stage, block) for stage, count in enumerate(blocks) for block in range(count)]
    return [(f'stages.{stage}.blocks.{block}', name(stage, block)) for stage, block in numbers]


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, an MLP of 4 times the channels, a scale per channel; plus x.

    In training, the branch is dropped for random images, with probability `drop` (stochastic depth).
    """

    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        y = layer_norm('norm')(conv(channels, 7, groups=channels, bias=True, name='conv_dw')(x))
        y = Mlp(4 * channels, name='mlp')(y) * self.param('gamma', nn.initializers.constant(1e-6), (channels,))
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class Stage(nn.Module):
    """A sequence of blocks; if `halves`, LayerNorm and a convolution that halves the image come before them."""

    channels: int
    drops: Sequence[float]  # per block
    halves: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.halves:
            x = nn.Conv(self.channels, (2, 2), (2, 2), 'VALID', name='downsample_1')(layer_norm('downsample_0')(x))
        for block, drop in enumerate(self.drops):
            x = Block(drop, name=f'blocks_{block}')(x, train)
        return x


class Head(nn.Module):
    """LayerNorm and a dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, name='fc')(layer_norm('norm')(x))


class ConvNeXt(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K]; other images from 32x32 up work too: the head gets the mean over space."""

    num_classes: int
    blocks: Sequence[int] = (3, 3, 9, 3)  # per stage
    channels: Sequence[int] = (96, 192, 384, 768)  # per stage
    drop: float = 0.1  # probability of dropping the last block's branch; it rises linearly from 0 in the first block

    @property
    def aliases(self) -> tuple[dict[str, str], ...]:
        """The names in torchvision and in the authors' repository."""
        return torchvision_names(self.blocks), authors_names(self.blocks)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError for images that are too small."""
        refuse_small_images('A ConvNeXt', x, SMALLEST)
        x = layer_norm('stem_1')(nn.Conv(self.channels[0], (4, 4), (4, 4), 'VALID', name='stem_0')(x))
        before, last = 0, max(1, sum(self.blocks) - 1)
        for stage, (count, channels) in enumerate(zip(self.blocks, self.channels, strict=True)):
            drops = tuple(self.drop * (before + block) / last for block in range(count))
            x = Stage(channels, drops, stage > 0, name=f'stages_{stage}')(x, train)
            before += count
        return Head(self.num_classes, name='head')(x.mean((1, 2)))
