"""Strict conversion of published weights to Flax variables: every variable needs a tensor, and every tensor a variable."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, listed, say_once
from dvinv.networks.classifier import flatten, shapes_of, unflatten
from dvinv.networks.formats import read_tensors
from dvinv.networks.naming import Unwrapped, find_keys, to_flax_layout, unwrapped


class MisfitError(DvinvError):
    """The names or shapes of the weights do not fit the network."""


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a weights file by name.

    Raises:
      DvinvError: the file is missing, damaged, in an unsupported format, or would run code.
    """
    return read_tensors(Path(path))


def import_weights(module: nn.Module, image_shape, state: dict[str, np.ndarray], source: str = 'These weights') -> dict:
    """Converts PyTorch, Keras or Gluon tensors to the variables of `module` for images [H, W, C], as float32 numpy arrays.

    The keys are derived from the paths of the submodules, see `naming`. Optional attributes of the module change this:
    `module.aliases` gives alternative names of submodules, `module.unused` the prefixes of keys to ignore, and
    `module.adapt(arrays, image_shape, source)` changes arrays that depend on the image size. Prefixes that wrappers put
    before the keys are removed, and a message says so once.

    Args:
      source: the name of the weights in that message.

    Raises:
      DvinvError: tensors are integers, or have values that no trained network has; the message names them.
      MisfitError: keys are missing or left over, or shapes differ; the message lists them.
    """
    template, state = flatten(shapes_of(module, image_shape)), _without_counters(state)
    matched, keys = _matched(module, template, state)
    names = matched.names
    _refuse_integers({names[key]: state[names[key]] for key in keys.values() if key in names})
    _refuse_misfits(type(module).__name__, [*state], matched, {*keys.values()})
    arrays = {path: to_flax_layout(path, key, state[names[key]], template[path].shape) for path, key in keys.items()}
    if adapt := getattr(module, 'adapt', None):
        arrays = adapt(arrays, image_shape, source)
    _refuse_shapes(type(module).__name__, {names[key]: (arrays[path], template[path]) for path, key in keys.items()}, state)
    with np.errstate(over='ignore'):  # values that overflow float32 are refused below
        arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
    refuse_values({path: names[key] for path, key in keys.items()}, arrays)
    if matched.prefix or any(key != name for key, name in names.items()):
        removed = repr(matched.prefix) if matched.prefix else 'What wraps its parts'
        say_once(f'{source}: {removed} is left out of the keys.')
    if matched.unused:
        say_once(f'{source}: {listed([*matched.unused], 3)} are not used.')
    return unflatten(arrays)


def agreement(module: nn.Module, template: dict, state: dict[str, np.ndarray]) -> tuple[float, bool]:
    """Compares `state` with the weights of `module`, a network with one class.

    Args:
      template: {path: shape} of the variables of `module`.

    Returns:
      The share of the network's keys that are in `state`, and whether names and shapes agree except for the number of
      classes.
    """
    state = _without_counters(state)
    matched, keys = _matched(module, template, state)
    names = matched.names
    share = len({*keys.values()} & names.keys()) / len(keys)
    if {*keys.values()} != names.keys():
        return share, False
    differing = set()
    for path, key in keys.items():
        expected = template[path].shape
        shape = to_flax_layout(path, key, state[names[key]], expected).shape
        if shape != expected:
            differing.add(path.rpartition('/')[0] if shape[:-1] == expected[:-1] and expected[-1] == 1 else path)
    return share, len(differing) <= 1 and not differing & keys.keys()  # only the head may differ


def count_classes(build: Callable[[int], nn.Module], image_shape, state: dict[str, np.ndarray]) -> int:
    """Returns the number of classes of the network in `state`; 1 if `state` has no such head and so does not fit.

    The head is the variable that changes its shape with `num_classes` in `build(num_classes)`; its outputs are the last axis
    in Flax.
    """
    state, module = _without_counters(state), build(1)
    one_class, two_classes = (flatten(shapes_of(build(num_classes), image_shape)) for num_classes in (1, 2))
    matched, keys = _matched(module, one_class, state)
    names = matched.names
    for path, key in keys.items():
        shape = one_class[path].shape
        if shape != two_classes[path].shape and key in names and np.ndim(state[names[key]]) == len(shape):
            return to_flax_layout(path, key, state[names[key]], shape).shape[-1]
    return 1


def _matched(module: nn.Module, template, state) -> tuple[Unwrapped, dict[str, str]]:
    """Returns the keys of `state` that belong to the network, and {path: key} of its variables, also for missing keys."""

    def find(keys) -> dict[str, str]:
        return find_keys(template.keys(), keys, getattr(module, 'aliases', {}), getattr(module, 'counted', True))

    matched, unused = unwrapped(state.keys(), find), getattr(module, 'unused', ())
    names = {key: name for key, name in matched.names.items() if not key.startswith(unused)}
    return dataclasses.replace(matched, names=names), find(names)


def _without_counters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors without step counters such as BatchNorm's num_batches_tracked, which are scalar integers."""
    arrays = {key: np.asarray(value) for key, value in state.items() if not key.endswith('num_batches_tracked')}
    return {key: array for key, array in arrays.items() if array.ndim or jnp.issubdtype(array.dtype, jnp.floating)}


def _refuse_integers(tensors: dict[str, np.ndarray]) -> None:
    wrong = [f'{name} ({array.dtype})' for name, array in tensors.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if wrong:
        raise DvinvError(
            f'These weights are not floating-point numbers: {listed(wrong, 3)}. Are they quantized? Use the float '
            'weights from which they were made.'
        )


def _refuse_misfits(network: str, file_keys: list[str], matched: Unwrapped, expected: set[str]) -> None:
    """Refuses keys that are missing or unexpected.

    Args:
      network: the class name of the network.
      file_keys: all keys of the file.
      matched: the keys that belong to the network.
      expected: the keys that the network needs.
    """
    missing, unexpected = expected - matched.names.keys(), matched.names.keys() - expected
    for problem, unmatched, contents in (
        ('lack', [matched.prefix + key for key in missing], f' The file has {listed(file_keys, 4)}.'),
        ('have left over', [matched.names[key] for key in unexpected], ''),
    ):
        if unmatched:
            raise MisfitError(
                f'These weights do not fit {network}: they {problem} {listed(sorted(unmatched))}. Is it another depth or '
                f'another network?{contents}'
            )


def _refuse_shapes(network: str, arrays: dict[str, tuple], state: dict[str, np.ndarray]) -> None:
    """Refuses arrays of unexpected shapes.

    Args:
      network: the class name of the network.
      arrays: {name: (array, expected shape)}.
      state: the original tensors by name; the message shows their shapes.
    """
    wrong = [f'{name} {state[name].shape}' for name, (array, expected) in arrays.items() if array.shape != expected.shape]
    if wrong:
        raise MisfitError(
            f'These weights do not fit {network}: other shapes than expected have {listed(sorted(wrong))}. Is it another '
            'width?'
        )


def refuse_values(names: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    """Refuses values that no trained network has.

    Args:
      names: {path of a variable: its name in the file}.
      arrays: {path of a variable: array}.

    Raises:
      DvinvError: an array has NaN, infinite numbers or negative variances.
    """
    for path, array in arrays.items():
        wrong, problem = ~np.isfinite(array), 'NaN or infinite'
        if not wrong.any() and path.startswith('batch_stats/') and path.endswith('/var'):
            wrong, problem = array < 0, 'negative, though variances'
        if wrong.any():
            raise DvinvError(
                f'Of the {array.size} numbers in {names[path]}, {wrong.sum()} are {problem}. Did that training diverge, or '
                'is the file damaged? Use weights from before.'
            )
