"""The `Classifier` (a network in eval mode and the normalisation of its images), types of arrays, trees of variables.

`B` images have height `H`, width `W` and `C` channels; a network has `K` classes, and `D` features before its last layer.
Functions take numpy arrays as well as JAX's, and return JAX's. The tests check these annotations at every call, in the
modules that tests/conftest.py names; otherwise nothing is checked. (A shape of one name begins with a space, so that linters
do not take it for the name of a type.)
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8

from dvinv.runtime.errors import DvinvError, listed

AnyArray = jax.Array | np.ndarray

Images = Float[AnyArray, 'B H W C']
Pixels = UInt8[AnyArray, 'B H W C']
Logits = Float[AnyArray, 'B K']
Labels = Integer[AnyArray, ' B']
PerImage = Float[jax.Array, ' B']
PerChannel = Float[AnyArray, ' C']
Scalar = Float[jax.Array, '']
Features = Float[AnyArray, 'B D']
LayerInput = Num[AnyArray, '...']  # of any layer of any network
# A mean or a variance of a layer's input; the layer may be a stack of layers, as nn.scan makes them.
Moment = Float[AnyArray, '*stack channels']


MOMENTS = 'dvinv_moments'  # the collection of recorded moments among a network's variables, see inversion/statistics.py
# Matches the name of a running variance, but not of a log-variance, which may be negative.
VARIANCE = re.compile(r'(?<!log)(?:^|[\W\d_])var(?:iance)?(?:$|[\W\d_])|(?<![lL]og)Var(?:iance)?$')


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A frozen network, its weights, and the shape and normalisation of its input images.

    The weights are a field, and `apply_fn` takes them as an argument: a closure would compile them in as constants.
    """

    apply_fn: Callable  # (variables, x float [B, H, W, C] normalised) -> logits [B, K], in eval mode
    variables: Any  # {'params': ..., 'batch_stats': ...}
    image_shape: tuple[int, int, int]  # H, W, C
    num_classes: int
    mean: tuple[float, ...]  # one number per channel, for pixels in [0, 1]
    std: tuple[float, ...]  # likewise

    def __repr__(self):
        """Returns a one-line description without the weights."""
        pixels = f'image_shape={self.image_shape}, num_classes={self.num_classes}, mean={self.mean}, std={self.std}'
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.variables))
        return f'{type(self).__name__}({pixels}, {count:,} numbers in variables)'

    def normalise(self, images: Num[AnyArray, '*B H W C']) -> Float[AnyArray, '*B H W C']:
        """Normalises pixels, uint8 or float in [0, 1], [..., H, W, C], to the float32 input of the network."""
        pixels = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        # Expanded explicitly, for users who configure JAX to refuse implicit rank promotion.
        mean, std = (jnp.expand_dims(jnp.float32(values), range(pixels.ndim - 1)) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def to_uint8(self, x: Float[AnyArray, '*B H W C']) -> UInt8[np.ndarray, '*B H W C']:
        """Converts normalised float [..., H, W, C] to uint8 pixels, rounded and clipped to the valid range."""
        pixels = np.asarray(x, np.float32) * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)

    @property
    def valid_range(self) -> tuple[Float[np.ndarray, ' C'], Float[np.ndarray, ' C']]:
        """Black and white in normalised space, float32 [C] each."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (0 - mean) / std, (1 - mean) / std

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(int(np.size(leaf)) for leaf in flatten(self.variables['params']).values())

    def digest(self) -> str:
        """Returns the identity of this network: the sha256 of its weights, image shape, class count and normalisation."""
        sha = hashlib.sha256(json.dumps([self.image_shape, self.num_classes, self.mean, self.std]).encode())
        for path, leaf in sorted(flatten(self.variables).items()):
            leaf = np.asarray(leaf)
            sha.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
            sha.update(leaf.tobytes())
        return sha.hexdigest()

    def without_moments(self) -> 'Classifier':
        """Returns the same network without recorded moments among its variables."""
        return dataclasses.replace(self, variables={name: v for name, v in self.variables.items() if name != MOMENTS})


def shapes_by_path(variables) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of arrays, or of shapes and dtypes, in nested dicts."""
    return {path: tuple(np.shape(leaf)) for path, leaf in flatten(variables).items()}


def differing_shapes(expected, found) -> list[str]:
    """Returns the paths, sorted, at which two trees of variables differ: one has none there, or another shape."""
    expected, found = shapes_by_path(expected), shapes_by_path(found)
    return sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))


def apply_fn_of(module) -> Callable:
    """Returns `(variables, x) -> logits`, in eval mode, for a Linen module that takes x and `train`."""
    return lambda variables, x: module.apply(variables, x, train=False)


def name_of(module) -> str:
    """Returns the name of a module in messages: its `label` where it has one, else the name of its class."""
    return getattr(module, 'label', type(module).__name__)


def cast_floats(tree, dtype):
    """Returns `tree` with its floating-point arrays cast to `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def join_names(names: Iterable) -> str:
    """Joins names to a path with slashes; a slash inside a name becomes %2F, a percent sign %25."""
    return '/'.join(str(name).replace('%', '%25').replace('/', '%2F') for name in names)


def flatten(tree) -> dict[str, Any]:
    """Flattens nested dicts to {'params/Conv_0/kernel': leaf}; see `join_names`."""
    leaves = flax.traverse_util.flatten_dict(flax.core.unfreeze(tree)).items()
    return {join_names(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict:
    """Inverts `flatten`."""
    names = {path: tuple(name.replace('%2F', '/').replace('%25', '%') for name in path.split('/')) for path in flat}
    return flax.traverse_util.unflatten_dict({names[path]: leaf for path, leaf in flat.items()})


def check_finite(variables, name: str) -> None:
    """Refuses values that no trained network has: non-finite numbers and negative running variances.

    A constant (neither in `params` nor in `batch_stats`) may be -inf, as class masks are.

    Args:
      variables: nested dicts of arrays; `jax.ShapeDtypeStruct` leaves are skipped.
      name: the name of the network, or of its file, in the error message.

    Raises:
      DvinvError: a tensor has such values; the message names the tensors and what is wrong with them.
    """
    problems = {}
    for path, leaf in ((path, leaf) for path, node in flatten(variables).items() for leaf in jax.tree.leaves(node)):
        if isinstance(leaf, jax.ShapeDtypeStruct) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        values, (collection, _, within) = np.asarray(leaf), path.partition('/')
        trained = collection in ('params', 'batch_stats')
        if np.isnan(values).any():
            problems[path] = 'NaN'
        elif np.isinf(values if trained else values[values > 0]).any():
            problems[path] = 'infinite numbers'
        elif collection != 'params' and VARIANCE.search(within.rpartition('/')[2]) and (values < 0).any():
            problems[path] = 'negative variances'
    if problems:
        raise DvinvError(
            f'The weights of {name} cannot be those of a trained network: '
            f'{listed([f"{path} has {problem}" for path, problem in problems.items()])}; load or train them again.'
        )


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], prefix: str = '') -> None:
    """Refuses a mean or standard deviation that is not for pixels in [0, 1].

    Args:
      mean, std: one number per channel.
      prefix: prepended to 'mean' and 'std' in the error message, for instance 'verifier.'.

    Raises:
      DvinvError: a value is not finite, out of range, or a standard deviation that is not positive. The message names the
        value, and for pixels in 0..255 also gives it divided by 255.
    """
    # A network that takes pixels in 0..255 minus a mean has a std of 1.
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


def shapes_of(module, image_shape) -> dict:
    """Returns the shapes of the variables of a Linen module for images [H, W, C]."""
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), image)


def initialise(module, key: jax.Array, image_shape) -> dict:
    """Returns randomly initialised variables of a Linen module for images [H, W, C]."""
    # Run once, so not worth optimising: XLA spends 8 s on the random numbers of a small network, and 0.7 s without it.
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(lambda k: module.init(k, np.zeros((1, *image_shape), np.float32), train=False), compiler_options=options)(
        key
    )
