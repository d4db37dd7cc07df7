"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2): three stages of basic blocks, parameter-free shortcuts.

Semantics and names are those of the published PyTorch weights: the paths of submodules correspond to the keys of the state
dict ('layer1_0/conv1' is `layer1.0.conv1`).
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.networks.residual import BasicBlock, residual_features, small_stem
from dvinv.networks.torch_layers import batch_norm


def option_a(x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
    """Computes the parameter-free shortcut: every `stride`-th pixel, with zero channels added on both sides."""
    missing = channels - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32x32 images. x [B, 32, 32, 3] -> logits [B, K]."""

    num_classes: int
    blocks: int  # per stage: n
    channels: Sequence[int] = (16, 32, 64)  # per stage
    norm: Callable = batch_norm  # (train, name) -> a layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks = (self.blocks,) * len(self.channels)
        x = residual_features(x, train, blocks, self.channels, option_a, BasicBlock, small_stem, self.norm)
        return nn.Dense(self.num_classes, name='linear')(x)
