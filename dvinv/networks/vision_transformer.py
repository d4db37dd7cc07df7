"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929; DeiT, arXiv 2012.12877): pre-norm blocks, learned positions.

The paths of submodules correspond to the keys of timm's state dicts ('blocks_0/attn/qkv' is `blocks.0.attn.qkv`). The same
network has other names in torchvision. Published networks classify an additional token, and the small ones here the mean
over the patches. In the latter, tokens keep the spatial layout [B, h, w, C], so that they form a stage that can be compared
with that of another network.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.naming import nested_names
from dvinv.networks.torch_layers import Mlp, layer_norm
from dvinv.runtime.errors import DvinvError, say_once


def torchvision_names(depth: int, first: str = 'mlp.0', second: str = 'mlp.3') -> dict[str, str]:
    """Returns {name in timm: name in torchvision} of submodules and variables.

    Args:
      depth: the number of blocks.
      first, second: torchvision's names of the layers of a block's MLP.
    """
    parts = {
        'norm1': 'ln_1',
        'norm2': 'ln_2',
        'attn.proj': 'self_attention.out_proj',
        'mlp.fc1': first,
        'mlp.fc2': second,
        **{f'attn.qkv.{leaf}': f'self_attention.in_proj_{leaf}' for leaf in ('weight', 'bias')},
    }
    return {
        'cls_token': 'class_token',
        'pos_embed': 'encoder.pos_embedding',
        'patch_embed.proj': 'conv_proj',
        'norm': 'encoder.ln',
        'head': 'heads.head',
        **nested_names([(f'blocks.{block}', f'encoder.layers.encoder_layer_{block}') for block in range(depth)], parts),
    }


def in_heads(head: int) -> Callable[[float], int]:
    """Returns a function that rounds a channel count to whole attention heads of `head` channels, at least one."""
    return lambda channels: head * max(1, round(channels / head))


class PatchEmbed(nn.Module):
    """A convolution that maps every patch to a token: x [B, H, W, C] -> [B, H / patch, W / patch, channels]."""

    channels: int
    patch: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(self.channels, (self.patch,) * 2, (self.patch,) * 2, 'VALID', name='proj')(x)


class Attention(nn.Module):
    """Self-attention among all tokens of an image, x [B, ..., C] -> the same shape; heads have `head` channels each.

    The outputs of 'qkv' are all queries, then all keys, then all values; each is ordered by head.
    """

    head: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        joined = nn.Dense(3 * channels, kernel_init=nn.initializers.xavier_uniform(), name='qkv')(x)
        queries, keys, values = jnp.moveaxis(joined.reshape(len(x), -1, 3, channels // self.head, self.head), 2, 0)
        scores = jnp.einsum('bqhc,bkhc->bhqk', queries / math.sqrt(self.head), keys)
        mixed = jnp.einsum('bhqk,bkhc->bqhc', nn.softmax(scores), values)
        return nn.Dense(channels, kernel_init=nn.initializers.xavier_uniform(), name='proj')(mixed.reshape(x.shape))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then the same with an MLP of 4 times the channels in place of attention."""

    head: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Attention(self.head, name='attn')(layer_norm('norm1')(x))
        return x + Mlp(4 * x.shape[-1], name='mlp')(layer_norm('norm2')(x))


class VisionTransformer(nn.Module):
    """x [B, H, W, C] -> logits [B, K]; H and W are multiples of `patch`, and those that the positions were trained for."""

    num_classes: int
    channels: int = 768  # of a token, a multiple of `head`
    depth: int = 12  # blocks
    patch: int = 16  # height and width of a patch in pixels
    head: int = 64  # channels of an attention head
    spread: float = 0.02  # standard deviation of the initial positions
    token: bool = True  # classify an additional token, placed before those of the patches; else the mean over the patches

    @property
    def aliases(self) -> tuple[dict[str, str], ...]:
        """The names in two versions of torchvision; published weights have the names of the older one."""
        return torchvision_names(self.depth), torchvision_names(self.depth, 'mlp.linear_1', 'mlp.linear_2')

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError if the image size is no multiple of `patch` or does not fit the positions."""
        grid, prefix = self._grid(x.shape[1:3]), int(self.token)
        shape = 1, prefix + math.prod(grid), self.channels
        x = PatchEmbed(self.channels, self.patch, name='patch_embed')(x)
        if prefix:
            first = self.param('cls_token', nn.initializers.zeros, (1, 1, self.channels))
            x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x.reshape(len(x), -1, self.channels)], axis=1)
        trained: Any = self.get_variable('params', 'pos_embed')
        if trained is not None and trained.shape[1] != shape[1]:
            raise DvinvError(
                f'These positions of a vision transformer are of {trained.shape[1] - prefix} patches, and images of '
                f'{grid[0] * self.patch}x{grid[1] * self.patch} have {math.prod(grid)}; give it images of the size that it '
                'was trained with, or read its weights for this size (image_shape), which resamples them.'
            )
        positions = self.param('pos_embed', nn.initializers.truncated_normal(self.spread), shape)
        x = x + (positions if prefix else positions.reshape(1, *grid, self.channels))
        for block in range(self.depth):
            x = Block(self.head, name=f'blocks_{block}')(x)
        x = layer_norm('norm')(x)
        return nn.Dense(self.num_classes, name='head')(x[:, 0] if prefix else x.mean((1, 2)))

    def adapt(self, arrays: dict[str, np.ndarray], image_shape, source: str) -> dict[str, np.ndarray]:
        """Returns the variables with positions resampled if they are for another square number of patches.

        As in timm, resampling is bicubic, with antialiasing when it reduces the number of patches. The additional token
        keeps its position.

        Args:
          arrays: the variables by path.
          image_shape: H, W, C of the images.
          source: the name of the weights in the message about resampling.
        """
        path, prefix, grid = 'params/pos_embed', int(self.token), self._grid(image_shape[:2])
        positions = arrays[path]
        count = positions.shape[1] - prefix if positions.ndim == 3 and len(positions) == 1 else 0
        before = math.isqrt(max(0, count))
        if count < 1 or before**2 != count or count == math.prod(grid):
            return arrays
        channels = positions.shape[2]
        square = positions[0, prefix:].reshape(before, before, channels).astype(np.float32)
        resampled = np.asarray(jax.image.resize(square, (*grid, channels), 'cubic')).reshape(1, -1, channels)
        say_once(f'{source}: the positions, of {before}x{before} patches, are resampled to {grid[0]}x{grid[1]}.')
        return arrays | {path: np.concatenate([positions[:, :prefix], resampled], axis=1)}

    def _grid(self, size) -> tuple[int, int]:
        """Returns the rows and columns of patches in an image; raises DvinvError if its size is no multiple of `patch`."""
        height, width = size
        if height % self.patch or width % self.patch or not height * width:
            raise DvinvError(
                f'A vision transformer with patches of {self.patch}x{self.patch} pixels takes images that they fill, not '
                f'{height}x{width}.'
            )
        return height // self.patch, width // self.patch
