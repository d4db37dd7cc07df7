"""Evaluation of a function of a network's variables on variables with fewer channels.

The program is that of the full network, so that decisions that the network makes by shapes (for example, whether a shortcut
needs a projection) stay as they are. Operations get arrays with fewer channels, and the few operations with a shape as
parameter get a changed shape.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError
from dvinv.networks.channels.coupling import Coupling
from dvinv.networks.channels.flat import Operation, flat_program
from dvinv.networks.channels.rules import ELEMENTWISE, Labels, follow, is_depthwise, parts


def pruned_function(fn: Callable, example, kept: dict[int, dict[int, np.ndarray]]):
    """Returns `fn` for arguments with fewer channels.

    Args:
      fn: A function from trees of arrays to a tree of arrays.
      example: Its arguments, arrays or shapes, as for the full network.
      kept: {number of a leaf of the arguments: {its axis of channels: mask of the remaining channels, bool [n]}}.

    Returns:
      A function of arguments that contain only the remaining channels. It can be differentiated with respect to the same
      arguments as `fn`.

    Raises:
      DvinvError: Channels are missing that can only be removed together with others that are still present, or that must
        stay.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*example)
    program, coupling = flat_program(closed), Coupling()
    there = []  # masks of the remaining slots, one array per axis of channels
    inputs: dict[int, Labels] = {}
    for leaf, (number, variable) in enumerate(zip(program.inputs, closed.jaxpr.invars, strict=True)):
        axes = []
        for axis, length in enumerate(variable.aval.shape):
            mine = kept.get(leaf, {}).get(axis)
            axes.append(None if mine is None else coupling.fresh(length))
            if mine is not None:
                there.append(mine)
        inputs[number] = tuple(axes)
    labels, _ = follow(program, inputs, coupling)
    keep = _keep(coupling, np.concatenate([np.zeros(0, bool), *there]))

    def run(*args):
        values = dict(program.constants) | dict(zip(program.inputs, jax.tree.leaves(args), strict=True))
        for operation in program.operations:
            arrays = [_value(v, values) for v in operation.inputs]
            given = [labels.get(v, ()) if isinstance(v, int) else () for v in operation.inputs]
            made = [labels[v] for v in operation.outputs]
            rule = _fitted if operation.name in ELEMENTWISE else RULES.get(operation.name, _as_it_is)
            values.update(zip(operation.outputs, rule(operation, arrays, given, made, keep), strict=True))
        return jax.tree.unflatten(jax.tree.structure(result), [_value(v, values) for v in program.outputs])

    return run


def _keep(coupling: Coupling, there: np.ndarray) -> np.ndarray:
    """Returns a mask of the remaining slots, bool [number of slots], from the mask of the arguments' slots, the first ones.

    Raises:
      DvinvError: The mask splits a group, or removes slots that must stay.
    """
    group = coupling.groups()
    gone = np.zeros(len(group), bool)
    gone[group[: len(there)][~there]] = True
    keep = ~gone[group]
    broken = np.flatnonzero(keep[: len(there)] != there)
    if len(broken):
        raise DvinvError(
            f'Channels are missing that can only go together with others that are still there ({len(broken)} of '
            f'{len(there)} places): these are no channels of this network.'
        )
    for slots, why in coupling.pins():
        if not keep[slots].all():
            raise DvinvError(f'Channels are missing that {why.operation} in {why.where} cannot do without.')
    return keep


def _value(v, values: dict):
    return values[v] if isinstance(v, int) else v.val


def _taken(array, axis: int, there: np.ndarray):
    """Returns an array with only those places of an axis that the mask `there`, bool [n], selects."""
    return array if there.all() else jnp.take(array, np.flatnonzero(there), axis)


def _as_it_is(operation: Operation, arrays, given, made, keep) -> list:
    return operation.call(operation.params, arrays)


def _fitted(operation: Operation, arrays, given, made, keep) -> list:
    """Runs an elementwise operation; inputs without labels, such as a random mask, are cut to the remaining channels."""
    for axis, slots in enumerate(made[0]):
        if slots is None:
            continue
        for index, (array, labels, shape) in enumerate(zip(arrays, given, operation.shapes, strict=True)):
            if shape and shape[axis] == len(slots) and (not labels or labels[axis] is None):
                arrays[index] = _taken(array, axis, keep[slots])
    return operation.call(operation.params, arrays)


def _convolution(operation: Operation, arrays, given, made, keep) -> list:
    params = dict(operation.params)
    if is_depthwise(operation):
        params['feature_group_count'] = arrays[0].shape[params['dimension_numbers'].lhs_spec[1]]
    return operation.call(params, arrays)


def _reshaped(name: str, operation: Operation, arrays, given, made, keep) -> list:
    """Runs an operation that has the shape of its result as the parameter `name`."""
    shape = [
        length if slots is None else int(keep[slots].sum())
        for length, slots in zip(operation.results[0], made[0], strict=True)
    ]
    return operation.call(operation.params | {name: tuple(shape)}, arrays)


def _concatenated(operation: Operation, arrays, given, made, keep) -> list:
    along = operation.params['dimension']
    for index, (array, labels, shape) in enumerate(zip(arrays, given, operation.shapes, strict=True)):
        for axis, slots in enumerate(made[0]):
            if slots is not None and axis != along and (not labels or labels[axis] is None):
                arrays[index] = _taken(array, axis, keep[slots])
        if made[0][along] is not None and (not labels or labels[along] is None):
            start = sum(other[along] for other in operation.shapes[:index])
            arrays[index] = _taken(array, along, keep[made[0][along][start : start + shape[along]]])
    return operation.call(operation.params, arrays)


def _padded(operation: Operation, arrays, given, made, keep) -> list:
    """Runs a padding, with only the remaining channels of the margin."""
    (padded,) = operation.call(operation.params, arrays)
    for axis, (before, after, _) in enumerate(operation.params['padding_config']):
        slots = made[0][axis]
        if slots is not None and before + after:
            within = np.ones(padded.shape[axis], bool)
            within[:before] = keep[slots[:before]]
            within[len(within) - after :] = keep[slots[len(slots) - after :]]
            padded = _taken(padded, axis, within)
    return [padded]


def _sliced(operation: Operation, arrays, given, made, keep) -> list:
    (array,) = arrays
    for axis, (part, slots) in enumerate(zip(parts(operation), made[0], strict=True)):
        if slots is None:
            array = jax.lax.slice_in_dim(array, part.start, part.stop, part.step, axis)
        else:
            asked = np.zeros(operation.shapes[0][axis], bool)
            asked[part] = True
            array = _taken(array, axis, asked[keep[given[0][axis]]])
    return [array]


RULES = {
    'conv_general_dilated': _convolution,
    'broadcast_in_dim': functools.partial(_reshaped, 'shape'),
    'reshape': functools.partial(_reshaped, 'new_sizes'),
    'concatenate': _concatenated,
    'pad': _padded,
    'slice': _sliced,
}
