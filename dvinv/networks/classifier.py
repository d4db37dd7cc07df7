"""A Classifier: a trained network in eval mode, with what it takes to show it pixels."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A frozen network and its contract with images.

    Weights are a field, but functions take them as an argument: a closure would compile them in as constants.
    """

    apply_fn: Callable  # (variables, x float [B, H, W, C] normalised) -> logits [B, K], in eval mode
    variables: Any  # {'params': ..., 'batch_stats': ...}
    image_shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    mean: tuple[float, ...]  # a channel, for pixels in [0, 1]
    std: tuple[float, ...]

    def normalise(self, images):
        """Pixels, uint8 or float in [0, 1], [..., H, W, C], to the float32 that the network takes."""
        pixels = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def to_uint8(self, x) -> np.ndarray:
        """Normalised float [..., H, W, C] to pixels uint8, rounded and cut to the valid range."""
        pixels = np.asarray(x, np.float32) * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)

    @property
    def valid_range(self) -> tuple[np.ndarray, np.ndarray]:
        """Black and white in normalised space, float32 [C] each."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (0 - mean) / std, (1 - mean) / std

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return sum(int(np.size(leaf)) for leaf in flatten(self.variables['params']).values())

    def digest(self) -> str:
        """sha256 of the weights and of how images are normalised: the identity of this network."""
        sha = hashlib.sha256(json.dumps([self.image_shape, self.num_classes, self.mean, self.std]).encode())
        for path, leaf in sorted(flatten(self.variables).items()):
            leaf = np.asarray(leaf)
            sha.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
            sha.update(leaf.tobytes())
        return sha.hexdigest()


def apply_fn_of(module) -> Callable:
    """`(variables, x) -> logits` of a Linen module that takes x and `train`, in eval mode."""
    return lambda variables, x: module.apply(variables, x, train=False)


def cast_floats(tree, dtype):
    """Returns `tree` with its floating-point arrays in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def flatten(tree) -> dict[str, Any]:
    """{'params/Conv_0/kernel': leaf} of nested dicts."""
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep='/')


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(flat, sep='/')
