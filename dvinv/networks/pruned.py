"""A pruned network as an ordinary Linen module.

Its program is that of the full network, so that decisions that the network makes by shapes (for example, whether a shortcut
needs a projection) stay as they are. Operations get arrays with fewer channels, and the few operations with a shape as
parameter get a changed shape.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.graph.program import Operation, array_type, called_or_jaxs_own, program_of
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.channel_rules import ELEMENTWISE, Coupling, Labels, follow, is_depthwise, parts
from dvinv.runtime.errors import DvinvError


class PrunedModule(nn.Module):
    """`network` with fewer channels: the same layers and variable names, but smaller arrays.

    It maps x [B, H, W, C] to logits [B, K], and can be initialised, applied, trained, saved and tapped (its BatchNorm inputs
    captured by `inversion.linen_modules`) like the network itself.

    Raises, when called:
      DvinvError: `kept` names layers or channels that this network does not have, or removes channels without others that
        must be removed together with them.
    """

    network: Any  # a Linen module that takes x and `train`, or an object with its `init` and `apply`
    kept: Mapping[str, tuple[int, ...]]  # {a layer with removed channels: the indices of its remaining output channels}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        network = self.network
        if isinstance(network, nn.Module):
            # Detached, so that it is not a submodule of this module, which has variables of its own.
            network = network.clone(parent=None, _deep_clone=True)
        channels = find_channels(network, x.shape[1:])
        keep = channels.keep_mask(self.kept)
        if self.is_initializing():
            unpruned = network.init(self.make_rng('params'), x, train=train)
            self._put(channels.sliced(keep, unpruned))
            return network.apply(unpruned, x, train=False)
        rngs = {name: self.make_rng(name) for name in ('dropout',) if self.has_rng(name)}

        def apply(variables, x, rngs):
            return network.apply(variables, x, train=train, rngs=rngs, mutable=self.scope.mutable or [])

        variables = {name: tree for name, tree in flax.core.unfreeze(dict(self.variables)).items() if tree}
        # The shapes of the full network's variables, but the dtypes of this module's, which may be a half-precision copy.
        example = jax.tree.map(lambda full, leaf: jax.ShapeDtypeStruct(full.shape, leaf.dtype), channels.shapes, variables)
        logits, changed = pruned_function(apply, (example, x, rngs), channels.places(keep))(variables, x, rngs)
        self._put(changed)
        return logits

    def _put(self, variables) -> None:
        for collection, tree in flax.core.unfreeze(variables).items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)


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
    program, coupling = program_of(closed, called_or_jaxs_own), Coupling()
    masks = [np.zeros(0, bool)]  # of the remaining slots, one array per axis of channels
    inputs: dict[int, Labels] = {}
    for leaf, (number, variable) in enumerate(zip(program.inputs, closed.jaxpr.invars, strict=True)):
        axes: list[np.ndarray | None] = []
        for axis, length in enumerate(array_type(variable).shape):
            mask = kept.get(leaf, {}).get(axis)
            axes.append(None if mask is None else coupling.fresh(length))
            if mask is not None:
                masks.append(mask)
        inputs[number] = tuple(axes)
    labels, _ = follow(program, inputs, coupling)
    keep = _keep(coupling, np.concatenate(masks))

    def run(*args):
        values = dict(program.constants) | dict(zip(program.inputs, jax.tree.leaves(args), strict=True))
        for operation in program.operations:
            arrays = [values[number] for number in operation.inputs]
            input_labels = [labels.get(number, ()) for number in operation.inputs]
            output_labels = [labels[number] for number in operation.outputs]
            rule = _elementwise if operation.name in ELEMENTWISE else RULES.get(operation.name, _unchanged)
            values.update(zip(operation.outputs, rule(operation, arrays, input_labels, output_labels, keep), strict=True))
        return jax.tree.unflatten(jax.tree.structure(result), [values[number] for number in program.outputs])

    return run


def _keep(coupling: Coupling, mask: np.ndarray) -> np.ndarray:
    """Returns the mask of all remaining slots, bool [number of slots].

    Args:
      coupling: The slots, with their couplings and pins.
      mask: The mask of the first slots, those of the arguments.

    Raises:
      DvinvError: The mask splits a group, or removes slots that must stay.
    """
    group = coupling.groups()
    removed = np.zeros(len(group), bool)
    removed[group[: len(mask)][~mask]] = True
    keep = ~removed[group]
    split = np.flatnonzero(keep[: len(mask)] != mask)
    if len(split):
        raise DvinvError(
            f'Channels are missing that can only be removed together with others that are present ({len(split)} of '
            f'{len(mask)} places): these are no channels of this network.'
        )
    for slots, reason in coupling.pins():
        if not keep[slots].all():
            raise DvinvError(f'Channels are missing that {reason.operation} in {reason.module} cannot do without.')
    return keep


def _select(array, axis: int, mask: np.ndarray):
    """Returns an array with only those places of an axis that the mask, bool [n], selects."""
    return array if mask.all() else jnp.take(array, np.flatnonzero(mask), axis)


# The rules: (operation, its inputs, the labels of its inputs and of its outputs, the mask of the slots) -> its outputs.


def _unchanged(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    return operation.call(operation.params, arrays)


def _elementwise(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    """Runs an elementwise operation; inputs without labels, such as a random mask, are cut to the remaining channels."""
    for axis, slots in enumerate(output_labels[0]):
        if slots is None:
            continue
        for index, (array, labels, shape) in enumerate(zip(arrays, input_labels, operation.shapes, strict=True)):
            if shape and shape[axis] == len(slots) and (not labels or labels[axis] is None):
                arrays[index] = _select(array, axis, keep[slots])
    return operation.call(operation.params, arrays)


def _convolution(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    params = dict(operation.params)
    if is_depthwise(operation):
        params['feature_group_count'] = arrays[0].shape[params['dimension_numbers'].lhs_spec[1]]
    return operation.call(params, arrays)


def _reshaped(name: str, operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    """Runs an operation that has the shape of its result as the parameter `name`."""
    shape = [
        length if slots is None else int(keep[slots].sum())
        for length, slots in zip(operation.result_shapes[0], output_labels[0], strict=True)
    ]
    return operation.call(operation.params | {name: tuple(shape)}, arrays)


def _concatenated(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    along = operation.params['dimension']
    for index, (array, labels, shape) in enumerate(zip(arrays, input_labels, operation.shapes, strict=True)):
        for axis, slots in enumerate(output_labels[0]):
            if slots is not None and axis != along and (not labels or labels[axis] is None):
                arrays[index] = _select(array, axis, keep[slots])
        if output_labels[0][along] is not None and (not labels or labels[along] is None):
            start = sum(other[along] for other in operation.shapes[:index])
            arrays[index] = _select(array, along, keep[output_labels[0][along][start : start + shape[along]]])
    return operation.call(operation.params, arrays)


def _padded(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    """Runs a padding, with only the remaining channels of the margin."""
    (padded,) = operation.call(operation.params, arrays)
    for axis, (before, after, _) in enumerate(operation.params['padding_config']):
        slots = output_labels[0][axis]
        if slots is not None and before + after:
            mask = np.ones(padded.shape[axis], bool)
            mask[:before] = keep[slots[:before]]
            mask[len(mask) - after :] = keep[slots[len(slots) - after :]]
            padded = _select(padded, axis, mask)
    return [padded]


def _sliced(operation: Operation, arrays, input_labels, output_labels, keep) -> list:
    (array,) = arrays
    for axis, (part, slots) in enumerate(zip(parts(operation), output_labels[0], strict=True)):
        if slots is None:
            array = jax.lax.slice_in_dim(array, part.start, part.stop, part.step, axis)
        else:
            inside = np.zeros(operation.shapes[0][axis], bool)
            inside[part] = True
            array = _select(array, axis, inside[keep[input_labels[0][axis]]])
    return [array]


RULES: dict[str, Callable[..., list]] = {
    'conv_general_dilated': _convolution,
    'broadcast_in_dim': functools.partial(_reshaped, 'shape'),
    'reshape': functools.partial(_reshaped, 'new_sizes'),
    'concatenate': _concatenated,
    'pad': _padded,
    'slice': _sliced,
}
