"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929; DeiT, arXiv 2012.12877): pre-norm blocks, learned positions.

Submodules' paths spell the keys of timm's state dicts ('blocks_0/attn/qkv' is `blocks.0.attn.qkv`). torchvision has the same
network under other names. Published ones classify by an additional token, the small ones here by the mean over the patches.
The tokens then stay in the places of an image, [B, h, w, C], as a stage that can be compared with that of another network.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, say_once
from dvinv.networks.torch_layers import Mlp, layer_norm


def torchvision_names(depth: int, first: str = 'mlp.0', second: str = 'mlp.3') -> dict[str, str]:
    """Returns {a submodule or variable in timm: in torchvision}; `first` and `second` are the layers of a block's MLP."""
    inside = {
        'norm1': 'ln_1',
        'norm2': 'ln_2',
        'attn.proj': 'self_attention.out_proj',
        'mlp.fc1': first,
        'mlp.fc2': second,
        **{f'attn.qkv.{leaf}': f'self_attention.in_proj_{leaf}' for leaf in ('weight', 'bias')},
    }
    outside = {'cls_token': 'class_token', 'pos_embed': 'encoder.pos_embedding', 'patch_embed.proj': 'conv_proj'}
    outside |= {'norm': 'encoder.ln', 'head': 'heads.head'}
    return outside | {
        f'blocks.{block}.{name}': f'encoder.layers.encoder_layer_{block}.{other}'
        for block in range(depth)
        for name, other in inside.items()
    }


def in_heads(head: int) -> Callable[[float], int]:
    """Returns the rounding of a width to whole attention heads of so many channels, at least one."""
    return lambda channels: head * max(1, round(channels / head))


class PatchEmbed(nn.Module):
    """A convolution that takes every patch to a token: x [B, H, W, C] -> [B, H / patch, W / patch, channels]."""

    channels: int
    patch: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(self.channels, (self.patch,) * 2, (self.patch,) * 2, 'VALID', name='proj')(x)


class Attention(nn.Module):
    """Self-attention among all tokens of an image, x [B, ..., C] -> the same shape; heads have `head` channels each.

    The outputs of 'qkv' are all queries, then all keys, then all values; within each, head after head.
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
    """x + attention(norm(x)), then the same with an MLP of 4 times the channels."""

    head: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Attention(self.head, name='attn')(layer_norm('norm1')(x))
        return x + Mlp(4 * x.shape[-1], name='mlp')(layer_norm('norm2')(x))


class VisionTransformer(nn.Module):
    """x [B, H, W, C] -> logits [B, K]; H and W are multiples of `patch`, and those that the positions were learned for."""

    num_classes: int
    channels: int = 768  # of a token, a multiple of `head`
    depth: int = 12  # blocks
    patch: int = 16  # pixels, height and width
    head: int = 64  # channels of an attention head
    spread: float = 0.02  # deviation of the positions before training
    token: bool = True  # an additional token, put before those of the patches, is classified; else the mean of these

    @property
    def aliases(self) -> tuple[dict[str, str], ...]:
        """Returns what two versions of torchvision call its parts: published weights have the names of the older one."""
        return torchvision_names(self.depth), torchvision_names(self.depth, 'mlp.linear_1', 'mlp.linear_2')

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes logits; raises DvinvError for images that patches do not fill, or of another size than the positions."""
        grid, prefix = self._grid(x.shape[1:3]), int(self.token)
        shape = 1, prefix + math.prod(grid), self.channels
        x = PatchEmbed(self.channels, self.patch, name='patch_embed')(x)
        if prefix:
            first = self.param('cls_token', nn.initializers.zeros, (1, 1, self.channels))
            x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x.reshape(len(x), -1, self.channels)], axis=1)
        learned = self.get_variable('params', 'pos_embed')
        if learned is not None and learned.shape[1] != shape[1]:
            raise DvinvError(
                f'These positions of a vision transformer are of {learned.shape[1] - prefix} patches, and images of '
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
        """Returns the variables by path, with the positions resampled where they are of another square number of patches.

        As timm does it: bicubic, smoothed where there are fewer than before. The token that is no patch keeps its own.

        Args:
          source: what the line that says so calls the weights.
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
        """Returns the rows and columns of patches in images of this size; raises DvinvError if patches do not fill it."""
        height, width = size
        if height % self.patch or width % self.patch or not height * width:
            raise DvinvError(
                f'A vision transformer with patches of {self.patch}x{self.patch} pixels takes images that they fill, not '
                f'{height}x{width}.'
            )
        return height // self.patch, width // self.patch
