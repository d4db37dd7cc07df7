"""Networks for small devices: the MobileNets, and SqueezeNet.

MobileNet V1 of Howard et al. (arXiv 1704.04861) has pairs of a depthwise and a pointwise convolution, V2 of Sandler et al.
(arXiv 1801.04381) inverted residuals without a ReLU at the end of a block.

`MobileNetV1` has the semantics and names of Keras: the paths of submodules correspond to the keys ('conv_dw_1_bn' is
`conv_dw_1_bn/gamma` and so on). timm's network has the same layers with other padding and another epsilon, and so is a
separate class. The paths in `MobileNetV2` correspond to the keys of torchvision's state dicts ('features_2/conv_0_1' is
`features.2.conv.0.1`).

SqueezeNet 1.1 of Iandola et al. (arXiv 1602.07360) has fire modules and no BatchNorm. Its convolutions are numbered as in
Gluon: 'conv0' is `squeezenet0_conv0_weight` and `squeezenet0_conv0_bias`; in the state dict of torchvision it is
`features.0.weight` and `features.0.bias`.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.naming import nested_names
from dvinv.networks.torch_layers import batch_norm, conv, refuse_small_images

V1_STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the stem, then of the depthwise convolutions
V2_BLOCKS, V2_STRIDES = (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1)  # per stage: blocks, stride of the first block
EXPANSION = 6  # ratio of the channels inside a block of V2 to those before it; the very first block has no expansion
V2_LAST = 1280  # minimum number of channels before the head of V2
SQUEEZENET_POOLED = (0, 2, 4)  # the fire modules with a max-pooling before them
SQUEEZENET_SMALLEST = 31  # height and width that the stem and three poolings reduce to one pixel
SQUEEZENET_FIRES = (3, 4, 6, 7, 9, 10, 11, 12)  # indices of the fire modules in torchvision's list of layers


class MobileNetV1(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K]; images of other sizes work too, because the head gets the mean over space."""

    num_classes: int
    channels: Sequence[int] = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)  # of the stem, then per pair
    strides: Sequence[int] = V1_STRIDES

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(x, name: str, channels: int, size: int, stride: int = 1, groups: int = 1):
            # TensorFlow pads like Flax's SAME: with stride 2, images of even size are padded only at the bottom and right.
            x = nn.Conv(channels, (size, size), (stride, stride), use_bias=False, feature_group_count=groups, name=name)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3, name=f'{name}_bn')
            return nn.relu6(norm(x))

        stem, *pairs = self.channels
        x = layer(x, 'conv1', stem, 3, self.strides[0])
        for pair, (channels, stride) in enumerate(zip(pairs, self.strides[1:], strict=True), 1):
            x = layer(x, f'conv_dw_{pair}', x.shape[-1], 3, stride, groups=x.shape[-1])
            x = layer(x, f'conv_pw_{pair}', channels, 1)
        # The head of Keras is a convolution, so its kernel is [1, 1, C, K].
        return nn.Conv(self.num_classes, (1, 1), name='conv_preds')(x.mean((1, 2), keepdims=True))[:, 0, 0]


class Separable(nn.Module):
    """A depthwise 3x3 convolution and a 1x1 convolution to `channels`, each with BatchNorm and ReLU6."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        depthwise = conv(x.shape[-1], 3, self.stride, groups=x.shape[-1], name='conv_dw')
        x = nn.relu6(batch_norm(train, 'bn1')(depthwise(x)))
        return nn.relu6(batch_norm(train, 'bn2')(conv(self.channels, 1, name='conv_pw')(x)))


class TimmMobileNetV1(nn.Module):
    """timm's mobilenetv1_100, with PyTorch's padding and epsilon. x [B, H, W, 3] -> logits [B, K].

    The paths of submodules correspond to the keys ('blocks_1_0/conv_dw' is `blocks.1.0.conv_dw`).
    """

    num_classes: int
    channels: Sequence[int] = (32, 64, 128, 256, 512, 1024)  # of the stem, then per stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem, *stages = self.channels
        x = nn.relu6(batch_norm(train, 'bn1')(conv(stem, 3, 2, name='conv_stem')(x)))
        for stage, (channels, blocks) in enumerate(zip(stages, (1, 2, 2, 6, 2), strict=True)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Separable(channels, stride, name=f'blocks_{stage}_{block}')(x, train)
        return nn.Dense(self.num_classes, name='classifier')(x.mean((1, 2)))


def in_eighths(channels: float) -> int:
    """Rounds to the nearest multiple of 8, at least 8 and at least 90% of `channels`, as torchvision and timm do."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def v2_timm_names() -> dict[str, str]:
    """Returns {name in torchvision: name in timm} for V2; in timm blocks are numbered within their stage."""
    blocks = [f'blocks.{stage}.{block}' for stage, count in enumerate(V2_BLOCKS) for block in range(count)]
    first, *later = [(f'features.{index}.conv', block) for index, block in enumerate(blocks, 1)]
    head = f'features.{len(blocks) + 1}'
    return {
        'features.0.0': 'conv_stem',
        'features.0.1': 'bn1',
        f'{head}.0': 'conv_head',
        f'{head}.1': 'bn2',
        'classifier.1': 'classifier',
        **nested_names([first], {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'}),
        **nested_names(later, {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'}),
    }


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
    last: int = V2_LAST  # smaller values are raised to V2_LAST: as published, a narrow network keeps all of these channels

    aliases: ClassVar[dict[str, str]] = v2_timm_names()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(x, index: int, channels: int, size: int, stride: int):
            x = conv(channels, size, stride, name=f'features_{index}_0')(x)
            return nn.relu6(batch_norm(train, f'features_{index}_1')(x))

        stem, *stages = self.channels
        x, index = layer(x, 0, stem, 3, 2), 1
        for channels, count, stride in zip(stages, V2_BLOCKS, V2_STRIDES, strict=True):
            for block in range(count):
                inner = x.shape[-1] * (1 if index == 1 else EXPANSION)
                x = InvertedResidual(channels, 1 if block else stride, inner, name=f'features_{index}')(x, train)
                index += 1
        x = layer(x, index, max(V2_LAST, self.last), 1, 1).mean((1, 2))
        return nn.Dense(self.num_classes, name='classifier_1')(nn.Dropout(0.2, deterministic=not train)(x))


def squeezenet_torchvision_names() -> dict[str, str]:
    """Returns {name of a submodule here: name in torchvision}."""
    parts = ('squeeze', 'expand1x1', 'expand3x3')
    fires = [f'features.{place}.{part}' for place in SQUEEZENET_FIRES for part in parts]
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

    aliases: ClassVar[dict[str, str]] = squeezenet_torchvision_names()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError for images that are too small to be pooled three times."""
        refuse_small_images('A SqueezeNet', x, SQUEEZENET_SMALLEST)

        def layer(x, index: int, channels: int, size: int):
            return nn.relu(conv(channels, size, bias=True, name=f'conv{index}')(x))

        stem, *squeezed = self.channels
        x = nn.relu(nn.Conv(stem, (3, 3), (2, 2), 'VALID', name='conv0')(x))
        for fire, channels in enumerate(squeezed):
            if fire in SQUEEZENET_POOLED:
                x = max_pool(x)
            index = 3 * fire + 1
            x = layer(x, index, channels, 1)
            x = jnp.concatenate([layer(x, index + 1, 4 * channels, 1), layer(x, index + 2, 4 * channels, 3)], axis=-1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return layer(x, 3 * len(squeezed) + 1, self.num_classes, 1).mean((1, 2))
