"""Rules for how channels pass through the operations of a network.

Each axis of a value has a label: the slots (see coupling.py) of its places, int [n], or None if it is not an axis of
channels, such as the axes of the images of a batch or of pixels. A rule takes the labels of an operation's inputs, couples
slots that must be removed together, and returns the labels of its outputs.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dvinv.networks.channels.coupling import Coupling, Pin
from dvinv.networks.channels.flat import Operation, Program

Labels = tuple[np.ndarray | None, ...]  # one label per axis

# Operations that compute each place of their result from the same place of their inputs.
ELEMENTWISE = {
    *('abs', 'add', 'add_any', 'atan2', 'cbrt', 'ceil', 'clamp', 'cos', 'div', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2'),
    *('expm1', 'floor', 'integer_pow', 'log', 'log1p', 'logistic', 'max', 'min', 'mul', 'neg', 'nextafter', 'pow', 'relu'),
    *('relu6', 'rem', 'round', 'rsqrt', 'sign', 'sin', 'sqrt', 'square', 'sub', 'tan', 'tanh'),
    *('and', 'eq', 'ge', 'gt', 'is_finite', 'le', 'lt', 'ne', 'not', 'or', 'select_n', 'xor'),
    *('convert_element_type', 'copy', 'reduce_precision', 'stop_gradient'),
    'pvary',  # passes the weights to each device in a network that is mapped over devices
}
REDUCTIONS = {*('argmax', 'argmin', 'reduce_and', 'reduce_max', 'reduce_min', 'reduce_or', 'reduce_prod', 'reduce_sum')}
WINDOWS = {*('reduce_window', 'reduce_window_max', 'reduce_window_min', 'reduce_window_sum')}


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or matrix product, described for the computation of its cost.

    The multiply-adds run over several axes. For one image there are fixed * len(axes[0]) * len(axes[1]) * ... of them.

    Attributes:
      layer: The path of the module that calls it, without the network's own name.
      operation: The operation.
      fixed: The product of the lengths of the axes that are not axes of channels.
      axes: The slots of each axis of channels.
      operands: For both operands, and each of their axes, the index of the axis in `axes`. It is None if the axis is not an
        axis of channels, and for the images of a grouped convolution with several channels per group.
    """

    layer: str
    operation: Operation
    fixed: int
    axes: tuple[np.ndarray, ...]
    operands: tuple[tuple[int | None, ...], ...]


def follow(program: Program, inputs: dict[int, Labels], coupling: Coupling) -> tuple[dict[int, Labels], list[Product]]:
    """Returns the labels of all values of a program, {number: labels}, given those of its inputs, and its products.

    Slots are coupled and pinned in `coupling` along the way.
    """
    labels, products = dict(inputs), []
    for operation in program.operations:
        given = [_labels(value, shape, labels) for value, shape in zip(operation.inputs, operation.shapes, strict=True)]
        rule = _rule(operation.name)
        made = rule(operation, given, coupling) if any(axis is not None for one in given for axis in one) else None
        if made is None:
            made = [(None,) * len(shape) for shape in operation.results]
        labels.update(zip(operation.outputs, made, strict=True))
        if operation.name in ('conv_general_dilated', 'dot_general'):
            products.append(_product(operation, given))
    return labels, products


def _labels(value, shape, labels: dict[int, Labels]) -> Labels:
    known = labels.get(value) if isinstance(value, int) else None
    return known or (None,) * len(shape)


def _rule(name: str) -> Callable:
    if name in ELEMENTWISE:
        return _elementwise
    if name in REDUCTIONS:
        return _reduction
    if name in WINDOWS:
        return _window
    return RULES.get(name, _unknown)


def _pin(operation: Operation, coupling: Coupling, *axes) -> None:
    for slots in axes:
        if slots is not None:
            coupling.pin(slots, Pin(operation.name, operation.where))


def _together(operation: Operation, coupling: Coupling, first, second) -> None:
    """Couples two axes that are summed over together; if only one of them is an axis of channels, it is pinned."""
    if first is None or second is None:
        _pin(operation, coupling, first, second)
    else:
        coupling.couple(first, second)


def _unknown(operation: Operation, given: list[Labels], coupling: Coupling) -> None:
    for one in given:
        _pin(operation, coupling, *one)


def _elementwise(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    made = []
    for axis, length in enumerate(operation.results[0]):
        for one, shape in zip(given, operation.shapes, strict=True):
            if shape and shape[axis] != length:
                _pin(operation, coupling, one[axis])  # a single place that is combined with all places of the other input
        met = [one[axis] for one, shape in zip(given, operation.shapes, strict=True) if shape and shape[axis] == length]
        met = [slots for slots in met if slots is not None]
        for other in met[1:]:
            coupling.couple(met[0], other)
        made.append(met[0] if met else None)
    return [tuple(made)] * len(operation.results)


def _convolution(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    (images, kernel), params = given, operation.params
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    batch, channels, *pixels = (images[axis] for axis in numbers.lhs_spec)
    outputs, inputs, *taps = (kernel[axis] for axis in numbers.rhs_spec)
    if params['batch_group_count'] > 1:
        return _unknown(operation, given, coupling)
    _pin(operation, coupling, *pixels, *taps)
    if groups == 1:
        _together(operation, coupling, channels, inputs)
    else:
        _grouped(operation, coupling, groups, channels, inputs, outputs)
    made = dict(zip(numbers.out_spec, (batch, outputs, *(None for _ in pixels)), strict=True))
    return [tuple(made[axis] for axis in range(len(made)))]


def is_depthwise(operation: Operation) -> bool:
    """Returns whether each group of a convolution has one input channel."""
    kernel = operation.shapes[1]
    return operation.params['feature_group_count'] > 1 and kernel[operation.params['dimension_numbers'].rhs_spec[1]] == 1


def _grouped(operation: Operation, coupling: Coupling, groups: int, channels, inputs, outputs) -> None:
    """Couples the channels of a grouped convolution.

    In a depthwise convolution, a channel is coupled with the output channels of its group. With larger groups, channels of
    the same index in all groups are coupled, so that all groups lose the same channels.
    """
    if channels is None or outputs is None:
        return _pin(operation, coupling, channels, inputs, outputs)
    made = outputs.reshape(groups, -1)
    if is_depthwise(operation):
        _pin(operation, coupling, inputs)
        coupling.couple(np.repeat(channels, made.shape[1]), outputs)
        return None
    taken = channels.reshape(groups, -1)
    for one in (taken, made):
        coupling.couple(np.tile(one[0], groups - 1), one[1:].ravel())
    return _together(operation, coupling, taken[0], inputs)


def _dot(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    (contracted, batched), (first, second) = operation.params['dimension_numbers'], given
    for a, b in zip(*contracted, strict=True):
        _together(operation, coupling, first[a], second[b])
    for a, b in zip(*batched, strict=True):
        if first[a] is not None and second[b] is not None:
            coupling.couple(first[a], second[b])
        else:
            _pin(operation, coupling, first[a], second[b])
    made = [first[a] for a in batched[0]]
    for one, taken in ((first, {*contracted[0], *batched[0]}), (second, {*contracted[1], *batched[1]})):
        made += [slots for axis, slots in enumerate(one) if axis not in taken]
    return [tuple(made)]


def _product(operation: Operation, given: list[Labels]) -> Product:
    """Returns the `Product` of an operation; its multiply-adds run over the axes of the result and the summed axes."""
    (shape, other), (result,) = operation.shapes, operation.results
    if operation.name == 'dot_general':
        contracted, batched = operation.params['dimension_numbers']
        pairs = {b: a for a, b in (*zip(*contracted, strict=True), *zip(*batched, strict=True))}
        # (the index of the axis in the first operand or None, in the second operand or None, its length)
        runs = [(None, axis, length) for axis, length in enumerate(other) if axis not in pairs]
        back = {a: b for b, a in pairs.items()}
        runs += [(axis, back.get(axis), length) for axis, length in enumerate(shape)]
    else:
        numbers = operation.params['dimension_numbers']
        outputs, inputs, *taps = numbers.rhs_spec
        channels = numbers.lhs_spec[1]
        # With larger groups the images have several times as many channels as the kernel's input axis, which `operands`
        # cannot express.
        alike = inputs if operation.params['feature_group_count'] == 1 else outputs if is_depthwise(operation) else None
        meets = {alike: channels}
        runs = [(meets.get(axis), axis, other[axis]) for axis in (inputs, outputs, *taps)]
        runs += [(None, None, result[axis]) for axis in (numbers.out_spec[0], *numbers.out_spec[2:])]
    fixed, axes, operands = 1, [], [[None] * len(shape), [None] * len(other)]
    for first, second, length in runs:
        slots = given[1][second] if second is not None else given[0][first] if first is not None else None
        if slots is None:
            fixed *= length
            continue
        for operand, axis in ((0, first), (1, second)):
            if axis is not None:
                operands[operand][axis] = len(axes)
        axes.append(slots)
    layer = operation.where.partition('/')[2] or operation.where
    return Product(layer, operation, fixed, tuple(axes), tuple(map(tuple, operands)))


def _broadcast(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    made = [None] * len(operation.results[0])
    for axis, to in enumerate(operation.params['broadcast_dimensions']):
        if operation.shapes[0][axis] == operation.results[0][to]:
            made[to] = given[0][axis]
        else:
            _pin(operation, coupling, given[0][axis])
    return [tuple(made)]


def _reshape(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    """Labels merged axes with one axis of channels among them; pins axes of channels that are split or merged together."""
    (shape, *_), (result,) = operation.shapes, operation.results
    made: list = [None] * len(result)
    for ours, theirs in _blocks(shape, result):
        labelled = [axis for axis in ours if given[0][axis] is not None]
        long = [axis for axis in theirs if result[axis] > 1]
        if len(labelled) == 1 and len(long) == 1:
            # Every place of the merged axis has the slot of the channel from which it comes.
            whole = np.expand_dims(given[0][labelled[0]], [i for i, axis in enumerate(ours) if axis != labelled[0]])
            made[long[0]] = np.broadcast_to(whole, [shape[axis] for axis in ours]).ravel()
        else:
            _pin(operation, coupling, *(given[0][axis] for axis in labelled))
    return [tuple(made)]


def _blocks(shape, result):
    """Yields pairs of consecutive axes before and after a reshape, (axes of `shape`, axes of `result`), of equal size."""
    ours, theirs, i, j = [], [], 0, 0
    while i < len(shape) or j < len(result):
        sizes = math.prod(shape[axis] for axis in ours), math.prod(result[axis] for axis in theirs)
        if (sizes[0] <= sizes[1] and i < len(shape)) or j == len(result):
            ours.append(i)
            i += 1
        else:
            theirs.append(j)
            j += 1
        sizes = math.prod(shape[axis] for axis in ours), math.prod(result[axis] for axis in theirs)
        if sizes[0] == sizes[1] and ours and theirs:
            yield ours, theirs
            ours, theirs = [], []
    if ours or theirs:
        yield ours, theirs


def _transpose(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    return [tuple(given[0][axis] for axis in operation.params['permutation'])]


def _squeeze(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    gone = operation.params['dimensions']
    _pin(operation, coupling, *(given[0][axis] for axis in gone))
    return [tuple(slots for axis, slots in enumerate(given[0]) if axis not in gone)]


def _reduction(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    gone = operation.params['axes']
    _pin(operation, coupling, *(given[0][axis] for axis in gone))  # for example, a mean over channels
    return [tuple(slots for axis, slots in enumerate(given[0]) if axis not in gone)] * len(operation.results)


def _window(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    params, made = operation.params, []
    for axis, slots in enumerate(given[0]):
        alone = params['window_dimensions'][axis] == params['window_strides'][axis] == 1 and not any(params['padding'][axis])
        if not alone:
            _pin(operation, coupling, slots)
        made.append(slots if alone else None)
    return [tuple(made)] * len(operation.results)


def _concatenate(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    along = operation.params['dimension']
    alike = _elementwise(
        dataclasses.replace(operation, results=(operation.shapes[0],)),
        [tuple(None if axis == along else slots for axis, slots in enumerate(one)) for one in given],
        coupling,
    )[0]
    joined = None
    if any(one[along] is not None for one in given):
        parts = [
            coupling.fresh(shape[along]) if one[along] is None else one[along]
            for one, shape in zip(given, operation.shapes, strict=True)
        ]
        joined = np.concatenate(parts)
    return [tuple(joined if axis == along else slots for axis, slots in enumerate(alike))]


def _padding(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    made = []
    for slots, (before, after, between) in zip(given[0], operation.params['padding_config'], strict=True):
        if slots is None or before == after == between == 0:
            made.append(slots)
        elif between or min(before, after) < 0:
            _pin(operation, coupling, slots)
            made.append(None)
        else:  # a shortcut padded with zero channels: the new slots are coupled where they are added to other channels
            made.append(np.concatenate([coupling.fresh(before), slots, coupling.fresh(after)]))
    return [tuple(made)]


def _slice(operation: Operation, given: list[Labels], coupling: Coupling) -> list[Labels]:
    return [tuple(None if slots is None else slots[part] for slots, part in zip(given[0], parts(operation), strict=True))]


def parts(operation: Operation) -> tuple[slice, ...]:
    """Returns the part of each axis that a `slice` operation takes."""
    params = operation.params
    steps = params['strides'] or (1,) * len(params['start_indices'])
    return tuple(map(slice, params['start_indices'], params['limit_indices'], steps))


RULES = {
    'conv_general_dilated': _convolution,
    'dot_general': _dot,
    'broadcast_in_dim': _broadcast,
    'reshape': _reshape,
    'transpose': _transpose,
    'squeeze': _squeeze,
    'concatenate': _concatenate,
    'pad': _padding,
    'slice': _slice,
}
