"""What the residual families share: a convolution, stages of basic blocks (arXiv 1512.03385, figure 5), the mean."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm, conv


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm; plus the shortcut; ReLU."""

    channels: int
    stride: int
    shortcut: Callable  # (x, channels, stride, train) -> x, of the block's output shape

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(batch_norm(train, 'bn1')(conv(self.channels, 3, self.stride, name='conv1')(x)))
        y = batch_norm(train, 'bn2')(conv(self.channels, 3, name='conv2')(y))
        return nn.relu(y + self.shortcut(x, self.channels, self.stride, train))


def residual_features(
    x: jax.Array, train: bool, blocks: Sequence[int], channels: Sequence[int], shortcut: Callable
) -> jax.Array:
    """[B, channels[-1]] of x [B, H, W, C]: a convolution, so many blocks a stage, each but the first halving the size.

    To be called in a module's compact method: submodules 'conv1', 'bn1', 'layer1_0', ... become its own.
    """
    x = nn.relu(batch_norm(train, 'bn1')(conv(channels[0], 3, name='conv1')(x)))
    for stage, (count, width) in enumerate(zip(blocks, channels, strict=True), 1):
        for block in range(count):
            stride = 2 if stage > 1 and block == 0 else 1
            x = BasicBlock(width, stride, shortcut, name=f'layer{stage}_{block}')(x, train)
    return x.mean((1, 2))
