"""The MobileNet of Howard et al. (arXiv 1704.04861): a 3x3 stem, then pairs of a depthwise and a pointwise convolution.

Semantics and names are Keras's: submodules' paths spell the keys ('conv_dw_1_bn' is `conv_dw_1_bn/gamma` and so on).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

STRIDES = (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the stem, then of the depthwise convolutions


class MobileNetV1(nn.Module):
    """x [B, 224, 224, 3] -> logits [B, K]; of pictures of any other size too, as the head gets the mean over space."""

    num_classes: int
    channels: Sequence[int] = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)  # of the stem, then a pair
    strides: Sequence[int] = STRIDES

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(x, name: str, channels: int, size: int, stride: int = 1, groups: int = 1):
            # TensorFlow's padding, as Flax's SAME: with stride 2 an even picture is padded at the bottom and right alone.
            x = nn.Conv(channels, (size, size), (stride, stride), use_bias=False, feature_group_count=groups, name=name)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3, name=f'{name}_bn')
            return nn.relu6(norm(x))

        stem, *pairs = self.channels
        x = layer(x, 'conv1', stem, 3, self.strides[0])
        for pair, (channels, stride) in enumerate(zip(pairs, self.strides[1:], strict=True), 1):
            x = layer(x, f'conv_dw_{pair}', x.shape[-1], 3, stride, groups=x.shape[-1])
            x = layer(x, f'conv_pw_{pair}', channels, 1)
        # Keras's head is a convolution, so its kernel is [1, 1, C, K].
        return nn.Conv(self.num_classes, (1, 1), name='conv_preds')(x.mean((1, 2), keepdims=True))[:, 0, 0]
