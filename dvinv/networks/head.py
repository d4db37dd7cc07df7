"""The head of a network, its last layer, which has an output a class: where it is, and how it gets more of them."""

from collections.abc import Callable

import flax.linen as nn
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.registry import shapes_of


def head_of(build: Callable[[int], nn.Module], image_shape) -> str:
    """The path of the head, 'Dense_1' for instance: the layer whose shape follows `num_classes` in `build(num_classes)`.

    Args:
      image_shape: H, W, C.
    """
    few, many = (flatten(shapes_of(build(num_classes), image_shape)['params']) for num_classes in (2, 3))
    (path,) = {path.rpartition('/')[0] for path in few if few[path].shape != many[path].shape}
    return path


def grown(variables, smaller) -> dict:
    """`variables` of a network (numpy arrays), with all that a network of fewer classes has learned.

    The outputs of the head are its last axis; the first of them are those of `smaller`, the others stay as they are.

    Raises:
      DvinvError: they differ in more than the number of classes. Names what does not fit.
    """
    new, old = flatten(variables), flatten(smaller)
    wrong = {path for path in {*new, *old} if not _fits(new.get(path), old.get(path))}
    growing = {path for path in {*new} - wrong if new[path].shape != old[path].shape}
    if wrong or len({path.rpartition('/')[0] for path in growing}) > 1:
        raise DvinvError(
            f'A network cannot go on from one that is built otherwise: {listed(sorted(wrong | growing), 3)} differ. Is it '
            'another width?'
        )
    return unflatten({path: _beginning(np.array(leaf), np.asarray(old[path])) for path, leaf in new.items()})


def _fits(leaf, beginning) -> bool:
    """Whether `beginning` is `leaf` but for its last axis, which may be shorter."""
    if leaf is None or beginning is None or leaf.ndim != beginning.ndim:
        return False
    return leaf.shape[:-1] == beginning.shape[:-1] and leaf.shape[-1:] >= beginning.shape[-1:]


def _beginning(leaf: np.ndarray, beginning: np.ndarray) -> np.ndarray:
    leaf[..., : beginning.shape[-1]] = beginning
    return leaf
