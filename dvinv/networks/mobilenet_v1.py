"""The MobileNet of Howard et al. (arXiv 1704.04861): a 3x3 stem, then pairs of a depthwise and a pointwise convolution.

`MobileNetV1` has the semantics and names of Keras: the paths of submodules correspond to the keys ('conv_dw_1_bn' is
`conv_dw_1_bn/gamma` and so on). timm's network has the same layers with other padding and another epsilon, and so is a
separate class.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv

STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the stem, then of the depthwise convolutions


class MobileNetV1(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K]; images of other sizes work too, because the head gets the mean over space."""

    num_classes: int
    channels: Sequence[int] = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)  # of the stem, then per pair
    strides: Sequence[int] = STRIDES

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
