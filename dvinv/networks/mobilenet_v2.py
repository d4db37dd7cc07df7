"""The MobileNetV2 of Sandler et al. (arXiv 1801.04381): inverted residuals, ReLU6, and no ReLU at the end of a block.

The paths of submodules correspond to the keys of torchvision's state dicts ('features_2/conv_0_1' is `features.2.conv.0.1`).
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv

BLOCKS, STRIDES = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)  # per stage: blocks, stride of the first block
EXPANSION = 6  # ratio of the channels inside a block to those before it; the very first block has no expansion
LAST = 1280  # minimum number of channels before the head


def in_eighths(channels: float) -> int:
    """Rounds to the nearest multiple of 8, at least 8 and at least 90% of `channels`, as torchvision and timm do."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def timm_names() -> dict[str, str]:
    """Returns {name in torchvision: name in timm}, where blocks are numbered within their stage and layers have names."""
    names = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'classifier.1': 'classifier'}
    first = {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'}
    others = {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'}
    blocks = [(stage, block) for stage, count in enumerate(BLOCKS) for block in range(count)]
    for index, (stage, block) in enumerate(blocks, 1):
        layers = first if index == 1 else others
        names |= {f'features.{index}.conv.{ours}': f'blocks.{stage}.{block}.{theirs}' for ours, theirs in layers.items()}
    return names | {f'features.{len(blocks) + 1}.0': 'conv_head', f'features.{len(blocks) + 1}.1': 'bn2'}


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `inner` channels, a depthwise 3x3 and a 1x1 to `channels`, plus x where shapes allow.

    The first convolution is left out if x has `inner` channels already.
    """

    channels: int
    stride: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y, index = x, 0  # torchvision numbers only the layers that exist
        if self.inner != x.shape[-1]:
            y = nn.relu6(batch_norm(train, 'conv_0_1')(conv(self.inner, 1, name='conv_0_0')(y)))
            index = 1
        depthwise = conv(self.inner, 3, self.stride, groups=self.inner, name=f'conv_{index}_0')
        y = nn.relu6(batch_norm(train, f'conv_{index}_1')(depthwise(y)))
        y = batch_norm(train, f'conv_{index + 2}')(conv(self.channels, 1, name=f'conv_{index + 1}')(y))
        return x + y if self.stride == 1 and x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K]; images of other sizes work too, because the head gets the mean over space."""

    num_classes: int
    channels: Sequence[int] = (32, 16, 24, 32, 64, 96, 160, 320)  # of the stem, then per stage
    last: int = LAST  # smaller values are raised to LAST: as published, a narrow network keeps all of these channels

    aliases: ClassVar[dict[str, str]] = timm_names()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(x, index: int, channels: int, size: int, stride: int):
            x = conv(channels, size, stride, name=f'features_{index}_0')(x)
            return nn.relu6(batch_norm(train, f'features_{index}_1')(x))

        stem, *stages = self.channels
        x, index = layer(x, 0, stem, 3, 2), 1
        for channels, count, stride in zip(stages, BLOCKS, STRIDES, strict=True):
            for block in range(count):
                inner = x.shape[-1] * (1 if index == 1 else EXPANSION)
                x = InvertedResidual(channels, 1 if block else stride, inner, name=f'features_{index}')(x, train)
                index += 1
        x = layer(x, index, max(LAST, self.last), 1, 1).mean((1, 2))
        return nn.Dense(self.num_classes, name='classifier_1')(nn.Dropout(0.2, deterministic=not train)(x))
