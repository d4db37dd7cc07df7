"""A Classifier: a trained network in eval mode, with what it takes to show it pixels."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, listed

MOMENTS = 'dvinv_moments'  # the collection of recorded moments among a network's variables, see inversion/moments.py
# In the name of a running variance; its logarithm may be negative.
VARIANCE = re.compile(r'(?<!log)(?:^|[\W\d_])var(?:iance)?(?:$|[\W\d_])|(?<![lL]og)Var(?:iance)?$')


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

    def __repr__(self):
        """Says what it is in one line, without its weights."""
        pixels = f'image_shape={self.image_shape}, num_classes={self.num_classes}, mean={self.mean}, std={self.std}'
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.variables))
        return f'{type(self).__name__}({pixels}, {count:,} numbers in variables)'

    def normalise(self, images):
        """Pixels, uint8 or float in [0, 1], [..., H, W, C], to the float32 that the network takes."""
        pixels = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        # Expanded, for users who let JAX refuse implicit rank promotion.
        mean, std = (jnp.expand_dims(jnp.float32(values), range(pixels.ndim - 1)) for values in (self.mean, self.std))
        return (pixels - mean) / std

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


def name_of(module) -> str:
    """What sentences call a module: its class, or that of the user's within."""
    return getattr(module, 'label', type(module).__name__)


def cast_floats(tree, dtype):
    """Returns `tree` with its floating-point arrays in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def join_names(names: Iterable) -> str:
    """Returns the path of names; a slash inside a name becomes %2F, a percent sign %25."""
    return '/'.join(str(name).replace('%', '%25').replace('/', '%2F') for name in names)


def flatten(tree) -> dict[str, Any]:
    """Returns {'params/Conv_0/kernel': leaf} of nested dicts; see `join_names`."""
    leaves = flax.traverse_util.flatten_dict(flax.core.unfreeze(tree)).items()
    return {join_names(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    names = {path: tuple(name.replace('%2F', '/').replace('%25', '%') for name in path.split('/')) for path in flat}
    return flax.traverse_util.unflatten_dict({names[path]: leaf for path, leaf in flat.items()})


def check_finite(variables, name: str) -> None:
    """Refuses numbers that no trained network has: not finite, or a negative running variance.

    A constant (neither in `params` nor in `batch_stats`) may be -inf, as masks of classes are.

    Args:
      variables: nested dicts of arrays; shapes are passed over.
      name: what the sentence calls the network, or the file that it came from.

    Raises:
      DvinvError: names the tensors and what is wrong with them.
    """
    problems = {}
    for path, leaf in ((path, leaf) for path, node in flatten(variables).items() for leaf in jax.tree.leaves(node)):
        if isinstance(leaf, jax.ShapeDtypeStruct) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        values, (collection, _, rest) = np.asarray(leaf), path.partition('/')
        trained = collection in ('params', 'batch_stats')
        if np.isnan(values).any():
            problems[path] = 'NaN'
        elif np.isinf(values if trained else values[values > 0]).any():
            problems[path] = 'infinite numbers'
        elif collection != 'params' and VARIANCE.search(rest.rpartition('/')[2]) and (values < 0).any():
            problems[path] = 'negative variances'
    if problems:
        raise DvinvError(
            f'The weights of {name} cannot be those of a trained network: '
            f'{listed([f"{path} has {problem}" for path, problem in problems.items()])}; load or train them again.'
        )


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], prefix: str = '') -> None:
    """Refuses a mean or standard deviation that is not for pixels in [0, 1].

    Args:
      mean, std: one number a channel.
      prefix: what the sentence puts before 'mean' and 'std', for instance 'verifier.'.

    Raises:
      DvinvError: names the value; offers it divided by 255 where it is for pixels in 0..255.
    """
    # Of networks that take pixels in 0..255 less a mean, std is 1.
    also = f', and std as well: {tuple(round(value / 255, 6) for value in std)}' if min(std, default=0) >= 1 else ''
    for name, values, most in (('mean', mean, 1), ('std', std, 10)):
        if not np.isfinite(values).all():
            raise DvinvError(f'{prefix}{name} is {values}; every number of it must be finite.')
        if np.max(np.abs(values), initial=0) > most:
            raise DvinvError(
                f'{prefix}{name} is {values}, but pixels are in [0, 1]; numbers for pixels in 0..255 must be divided by '
                f'255: {tuple(round(value / 255, 6) for value in values)}{also if name == "mean" else ""}.'
            )
    if min(std, default=1) <= 0:
        raise DvinvError(f'{prefix}std is {std}; every standard deviation must be above 0.')
