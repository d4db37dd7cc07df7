"""Published weights into Flax variables, strictly: every tensor finds its place, every place its tensor."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, listed, say_once
from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.formats import read_tensors
from dvinv.networks.naming import Unwrapped, find_keys, to_flax_layout, unwrapped
from dvinv.networks.registry import shapes_of


class MisfitError(DvinvError):
    """The weights have other names or shapes than the network."""


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a weights file by name.

    Raises:
      DvinvError: the file is missing, damaged, of another kind, or would run code.
    """
    return read_tensors(Path(path))


def import_weights(module: nn.Module, image_shape, state: dict[str, np.ndarray], source: str = 'These weights') -> dict:
    """The variables, float32 numpy arrays, of `module` for images [H, W, C] from PyTorch's, Keras's or Gluon's tensors.

    Submodules' paths spell the keys, as `naming` tells; a `module.aliases` has other names of theirs, and a `module.unused`
    what keys begin with that are left aside. `module.adapt(arrays, image_shape, source)`, where there is one, changes what
    depends on the size of images. What wrappers put before the keys is left out, and said once.

    Args:
      source: what that line calls the weights.

    Raises:
      DvinvError: tensors that are integers, or have values that no trained network has; names them.
      MisfitError: keys that are missing or left over, or shapes that differ; lists them.
    """
    template, state = flatten(shapes_of(module, image_shape)), _without_counters(state)
    found, keys = _matched(module, template, state)
    names = found.names
    _refuse_integers({names[key]: state[names[key]] for key in keys.values() if key in names})
    _refuse_misfits(type(module).__name__, [*state], found, {*keys.values()})
    arrays = {path: to_flax_layout(path, key, state[names[key]], template[path].shape) for path, key in keys.items()}
    if adapt := getattr(module, 'adapt', None):
        arrays = adapt(arrays, image_shape, source)
    _refuse_shapes(type(module).__name__, {names[key]: (arrays[path], template[path]) for path, key in keys.items()}, state)
    with np.errstate(over='ignore'):  # what float32 has no number for is refused below
        arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
    refuse_values({path: names[key] for path, key in keys.items()}, arrays)
    if found.prefix or any(key != name for key, name in names.items()):
        what = repr(found.prefix) if found.prefix else 'What wraps its parts'
        say_once(f'{source}: {what} is left out of the keys.')
    if found.aside:
        say_once(f'{source}: {listed([*found.aside], 3)} are not used.')
    return unflatten(arrays)


def agreement(module: nn.Module, template: dict, state: dict[str, np.ndarray]) -> tuple[float, bool]:
    """Returns how much `state` is like the weights of `module`, a network with one class.

    Args:
      template: {path: shape} of its variables.

    Returns:
      Which share of the network's keys it has; and whether names and shapes are the same but for the number of classes.
    """
    state = _without_counters(state)
    found, keys = _matched(module, template, state)
    names = found.names
    share = len({*keys.values()} & names.keys()) / len(keys)
    if {*keys.values()} != names.keys():
        return share, False
    differing = set()
    for path, key in keys.items():
        shape, wanted = to_flax_layout(path, key, state[names[key]], template[path].shape).shape, template[path].shape
        if shape != wanted:
            differing.add(path.rpartition('/')[0] if shape[:-1] == wanted[:-1] and wanted[-1] == 1 else path)
    return share, len(differing) <= 1 and not differing & keys.keys()  # the head alone


def count_classes(build: Callable[[int], nn.Module], image_shape, state: dict[str, np.ndarray]) -> int:
    """The number of classes of the network that `state` is of; 1 where it has no such head, and so does not fit.

    The head is what changes its shape with `num_classes` in `build(num_classes)`; its outputs are Flax's last axis.
    """
    state, module = _without_counters(state), build(1)
    few, many = (flatten(shapes_of(build(num_classes), image_shape)) for num_classes in (1, 2))
    found, keys = _matched(module, few, state)
    names = found.names
    for path, key in keys.items():
        if few[path].shape != many[path].shape and key in names and np.ndim(state[names[key]]) == few[path].ndim:
            return to_flax_layout(path, key, state[names[key]], few[path].shape).shape[-1]
    return 1


def _matched(module: nn.Module, template, state) -> tuple[Unwrapped, dict[str, str]]:
    """Returns the keys of `state` that are the network's, and {path: key} of its variables, which may be missing there."""

    def find(keys) -> dict[str, str]:
        return find_keys(template.keys(), keys, getattr(module, 'aliases', {}), getattr(module, 'counted', True))

    found, unused = unwrapped(state.keys(), find), getattr(module, 'unused', ())
    names = {key: name for key, name in found.names.items() if not key.startswith(unused)}
    return dataclasses.replace(found, names=names), find(names)


def _without_counters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors but for what counts steps, as BatchNorm's num_batches_tracked does: integers without axes."""
    arrays = {key: np.asarray(value) for key, value in state.items() if not key.endswith('num_batches_tracked')}
    return {key: array for key, array in arrays.items() if array.ndim or jnp.issubdtype(array.dtype, jnp.floating)}


def _refuse_integers(tensors: dict[str, np.ndarray]) -> None:
    wrong = [f'{name} ({array.dtype})' for name, array in tensors.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if wrong:
        raise DvinvError(
            f'These weights are not floating-point numbers: {listed(wrong, 3)}. Are they quantized? Use the float '
            'weights from which they were made.'
        )


def _refuse_misfits(network: str, file: list[str], found: Unwrapped, wanted: set[str]) -> None:
    """Refuse keys that are missing or left over; `file` are all keys of the file."""
    missing, spare = wanted - found.names.keys(), found.names.keys() - wanted
    for problem, unmatched, has in (
        ('lack', [found.prefix + key for key in missing], f' The file has {listed(file, 4)}.'),
        ('have left over', [found.names[key] for key in spare], ''),
    ):
        if unmatched:
            raise MisfitError(
                f'These weights do not fit {network}: they {problem} {listed(sorted(unmatched))}. Is it another depth or '
                f'another network?{has}'
            )


def _refuse_shapes(network: str, arrays: dict[str, tuple], state: dict[str, np.ndarray]) -> None:
    """Refuse arrays with other shapes than expected; {name: (array, what is expected)}, shown as `state` has them."""
    wrong = [f'{name} {state[name].shape}' for name, (array, wanted) in arrays.items() if array.shape != wanted.shape]
    if wrong:
        raise MisfitError(
            f'These weights do not fit {network}: other shapes than expected have {listed(sorted(wrong))}. Is it another '
            'width?'
        )


def refuse_values(names: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    """Refuse numbers that no trained network has; `names` are those in the file, and both go by the variables' paths."""
    for path, array in arrays.items():
        wrong, what = ~np.isfinite(array), 'NaN or infinite'
        if not wrong.any() and path.startswith('batch_stats/') and path.endswith('/var'):
            wrong, what = array < 0, 'negative, though variances'
        if wrong.any():
            raise DvinvError(
                f'Of the {array.size} numbers in {names[path]}, {wrong.sum()} are {what}. Did that training diverge, or is '
                'the file damaged? Use weights from before.'
            )
