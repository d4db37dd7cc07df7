"""Parts that the residual families share: stems, blocks (arXiv 1512.03385, figure 5), stages, and the mean over space."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv


def small_stem(x: jax.Array, channels: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """Applies the stem for CIFAR: one 3x3 convolution; x [B, H, W, C] -> [B, H, W, channels]."""
    return nn.relu(norm(train, 'bn1')(conv(channels, 3, name='conv1')(x)))


def imagenet_stem(x: jax.Array, channels: int, train: bool, norm: Callable = batch_norm) -> jax.Array:
    """Applies the stem for ImageNet: a 7x7 convolution and a max-pooling that halve the image each.

    x [B, H, W, C] -> [B, ~H / 4, ~W / 4, channels].
    """
    x = nn.relu(norm(train, 'bn1')(conv(channels, 7, 2, name='conv1')(x)))
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm; plus the shortcut; ReLU. It returns `channels` channels."""

    channels: int
    stride: int
    shortcut: Callable  # (x, channels, stride, train) -> x, of the block's output shape
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.norm(train, 'bn1')(conv(self.channels, 3, self.stride, name='conv1')(x)))
        y = self.norm(train, 'bn2')(conv(self.channels, 3, name='conv2')(y))
        return nn.relu(y + self.shortcut(x, self.channels, self.stride, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with BatchNorm; plus the shortcut; ReLU. It returns 4 times `channels` channels.

    The 3x3 convolution has the stride, as in torchvision ("v1.5"); the paper gives it to the first 1x1.
    """

    channels: int
    stride: int
    shortcut: Callable  # (x, channels, stride, train) -> x, of the block's output shape
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        outputs = 4 * self.channels
        y = nn.relu(self.norm(train, 'bn1')(conv(self.channels, 1, name='conv1')(x)))
        y = nn.relu(self.norm(train, 'bn2')(conv(self.channels, 3, self.stride, name='conv2')(y)))
        y = self.norm(train, 'bn3')(conv(outputs, 1, name='conv3')(y))
        return nn.relu(y + self.shortcut(x, outputs, self.stride, train))


def residual_features(
    x: jax.Array,
    train: bool,
    blocks: Sequence[int],
    channels: Sequence[int],
    shortcut: Callable,
    block: type[nn.Module] = BasicBlock,
    stem: Callable = small_stem,
    norm: Callable = batch_norm,
) -> jax.Array:
    """Computes features [B, F] of x [B, H, W, C]: the stem, the stages, and the mean over space.

    Every stage but the first halves the image. It must be called in a compact method of a module, and creates the submodules
    'conv1', 'bn1', 'layer1_0' and so on there.

    Args:
      blocks: the number of blocks per stage.
      channels: the number of channels per stage.
      shortcut: (x, channels, stride, train) -> x, as for `block`.
      block: `BasicBlock` or `Bottleneck`.
      stem: (x, channels, train, norm) -> x.
      norm: (train, name) -> a layer.
    """
    x = stem(x, channels[0], train, norm)
    for stage, (count, width) in enumerate(zip(blocks, channels, strict=True), 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = block(width, stride, shortcut, norm, name=f'layer{stage}_{index}')(x, train)
    return x.mean((1, 2))
