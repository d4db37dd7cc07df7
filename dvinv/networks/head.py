"""The head of a network, its last layer with one output per class: how it is found, and how outputs are added to it."""

from collections.abc import Callable

import flax.linen as nn
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.registry import shapes_of


def head_of(build: Callable[[int], nn.Module], image_shape) -> str:
    """Returns the path of the head, for instance 'Dense_1': the layer that changes its shape with `num_classes`.

    Args:
      build: the function of `num_classes` to the Linen module.
      image_shape: H, W, C.
    """
    two_classes, three_classes = (flatten(shapes_of(build(num_classes), image_shape)['params']) for num_classes in (2, 3))
    (layer,) = {path.rpartition('/')[0] for path, leaf in two_classes.items() if leaf.shape != three_classes[path].shape}
    return layer


def grown(variables, smaller) -> dict:
    """Returns `variables` of a network (numpy arrays) with the weights of a network of fewer classes copied into them.

    The outputs of the head are its last axis; the first of them become those of `smaller`, the others stay as they are.

    Args:
      smaller: the variables of the network of fewer classes.

    Raises:
      DvinvError: the networks differ in more than the number of classes; the message names the variables that do not fit.
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
    """Returns whether `beginning` has the shape of `leaf`, except for its last axis, which may be shorter."""
    if leaf is None or beginning is None or leaf.ndim != beginning.ndim:
        return False
    return leaf.shape[:-1] == beginning.shape[:-1] and leaf.shape[-1:] >= beginning.shape[-1:]


def _beginning(leaf: np.ndarray, beginning: np.ndarray) -> np.ndarray:
    leaf[..., : beginning.shape[-1]] = beginning
    return leaf
