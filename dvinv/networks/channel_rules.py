"""Rules for how channels pass through the operations of a network, and which of them can only be removed together.

Every place along an axis of a variable is a slot. Each axis of a value has a label: the slots of its places, int [n], or
None if it is not an axis of channels, such as the axes of the images of a batch or of pixels. A rule takes the labels of the
inputs of an operation and returns those of its outputs. It couples slots that must be removed together (those of both sides
of a sum, or of a convolution's outputs and the next one's inputs), and pins slots that must stay.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dvinv.graph.program import Operation, Program


@dataclasses.dataclass(frozen=True)
class Pin:
    """The reason why slots must stay: an operation that needs all of them, and the path of the module that calls it."""

    operation: str
    module: str


class Coupling:
    """Slots, numbered from 0 in the order in which they are created, with their couplings and pins."""

    def __init__(self) -> None:
        self._slots = 0
        self._coupled: list[tuple[np.ndarray, np.ndarray]] = []
        self._pinned: list[tuple[np.ndarray, Pin]] = []

    def fresh(self, count: int) -> np.ndarray:
        """Creates slots; returns their numbers, int64 [count]."""
        self._slots += count
        return np.arange(self._slots - count, self._slots)

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """Records that `first[i]` and `second[i]`, int [n] both, can only be removed together."""
        if first is not second:
            self._coupled.append((first, second))

    def pin(self, slots: np.ndarray, reason: Pin) -> None:
        """Records that these slots must stay."""
        self._pinned.append((slots, reason))

    def groups(self) -> np.ndarray:
        """Returns the group of each slot, int [number of slots]; slots of one group can only be removed together."""
        from scipy.sparse import coo_array  # imported late, because every run imports this module and few prune
        from scipy.sparse.csgraph import connected_components

        first, second = (
            np.concatenate([np.zeros(0, int), *sides]) for sides in (*zip(*self._coupled, strict=True),) or ((), ())
        )
        graph = coo_array((np.ones(len(first), bool), (first, second)), (self._slots, self._slots))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> list[tuple[np.ndarray, Pin]]:
        """Returns the pinned slots, each array with its reason."""
        return self._pinned


Labels = tuple[np.ndarray | None, ...]  # one label per axis
Rule = Callable[[Operation, list[Labels], Coupling], list[Labels] | None]  # None: no output has an axis of channels

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
        unlabelled = [(None,) * len(shape) for shape in operation.shapes]
        input_labels = [labels.get(value) or none for value, none in zip(operation.inputs, unlabelled, strict=True)]
        labelled = any(slots is not None for axes in input_labels for slots in axes)
        results = _rule(operation.name)(operation, input_labels, coupling) if labelled else None
        if results is None:
            results = [(None,) * len(shape) for shape in operation.result_shapes]
        labels.update(zip(operation.outputs, results, strict=True))
        if operation.name in ('conv_general_dilated', 'dot_general'):
            products.append(_product(operation, input_labels))
    return labels, products


def _rule(name: str) -> Rule:
    if name in ELEMENTWISE:
        return _elementwise
    if name in REDUCTIONS:
        return _reduction
    if name in WINDOWS:
        return _window
    return RULES.get(name, _unknown)


def _pin(operation: Operation, coupling: Coupling, *axes: np.ndarray | None) -> None:
    for slots in axes:
        if slots is not None:
            coupling.pin(slots, Pin(operation.name, operation.module))


def _together(operation: Operation, coupling: Coupling, first: np.ndarray | None, second: np.ndarray | None) -> None:
    """Couples two axes that are summed over together; if only one of them is an axis of channels, it is pinned."""
    if first is None or second is None:
        _pin(operation, coupling, first, second)
    else:
        coupling.couple(first, second)


def _unknown(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> None:
    for axes in input_labels:
        _pin(operation, coupling, *axes)


def _elementwise(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    return [_combined(operation, input_labels, operation.result_shapes[0], coupling)] * len(operation.result_shapes)


def _combined(operation: Operation, input_labels: list[Labels], result: tuple[int, ...], coupling: Coupling) -> Labels:
    """Couples the channels at the same index along each axis; returns the labels of a result of the shape `result`."""
    labels: list[np.ndarray | None] = []
    for axis, length in enumerate(result):
        coupled: list[np.ndarray] = []
        for axes, shape in zip(input_labels, operation.shapes, strict=True):
            if shape and shape[axis] != length:
                _pin(operation, coupling, axes[axis])  # a single place that is combined with all places of the other input
            elif shape and (slots := axes[axis]) is not None:
                coupled.append(slots)
        for other in coupled[1:]:
            coupling.couple(coupled[0], other)
        labels.append(coupled[0] if coupled else None)
    return tuple(labels)


def _convolution(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels] | None:
    (images, kernel), params = input_labels, operation.params
    numbers, groups = params['dimension_numbers'], params['feature_group_count']
    batch, channels, *pixels = (images[axis] for axis in numbers.lhs_spec)
    outputs, inputs, *taps = (kernel[axis] for axis in numbers.rhs_spec)
    if params['batch_group_count'] > 1:
        _unknown(operation, input_labels, coupling)
        return None
    _pin(operation, coupling, *pixels, *taps)
    if groups == 1:
        _together(operation, coupling, channels, inputs)
    else:
        _grouped(operation, coupling, groups, channels, inputs, outputs)
    labels = dict(zip(numbers.out_spec, (batch, outputs, *(None for _ in pixels)), strict=True))
    return [tuple(labels[axis] for axis in range(len(labels)))]


def is_depthwise(operation: Operation) -> bool:
    """Returns whether each group of a convolution has one input channel."""
    kernel = operation.shapes[1]
    return operation.params['feature_group_count'] > 1 and kernel[operation.params['dimension_numbers'].rhs_spec[1]] == 1


def _grouped(
    operation: Operation,
    coupling: Coupling,
    groups: int,
    channels: np.ndarray | None,
    inputs: np.ndarray | None,
    outputs: np.ndarray | None,
) -> None:
    """Couples the channels of a grouped convolution.

    In a depthwise convolution, a channel is coupled with the output channels of its group. With larger groups, channels of
    the same index in all groups are coupled, so that all groups lose the same channels.
    """
    if channels is None or outputs is None:
        _pin(operation, coupling, channels, inputs, outputs)
        return
    outputs_of_groups = outputs.reshape(groups, -1)
    if is_depthwise(operation):
        _pin(operation, coupling, inputs)
        coupling.couple(np.repeat(channels, outputs_of_groups.shape[1]), outputs)
        return
    channels_of_groups = channels.reshape(groups, -1)
    for slots in (channels_of_groups, outputs_of_groups):
        coupling.couple(np.tile(slots[0], groups - 1), slots[1:].ravel())
    _together(operation, coupling, channels_of_groups[0], inputs)


def _dot(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    (contracted, batched), (first, second) = operation.params['dimension_numbers'], input_labels
    for a, b in zip(*contracted, strict=True):
        _together(operation, coupling, first[a], second[b])
    for a, b in zip(*batched, strict=True):
        _together(operation, coupling, first[a], second[b])
    labels = [first[a] for a in batched[0]]
    for axes, side in ((first, 0), (second, 1)):
        labels += [slots for axis, slots in enumerate(axes) if axis not in (*contracted[side], *batched[side])]
    return [tuple(labels)]


def _product(operation: Operation, input_labels: list[Labels]) -> Product:
    """Returns the `Product` of an operation; its multiply-adds run over the axes of the result and the summed axes."""
    (shape, other), (result,) = operation.shapes, operation.result_shapes
    # Each entry: (the index of the axis in the first operand or None, in the second operand or None, its length).
    runs: list[tuple[int | None, int | None, int]]
    if operation.name == 'dot_general':
        contracted, batched = operation.params['dimension_numbers']
        second_of = dict((*zip(*contracted, strict=True), *zip(*batched, strict=True)))
        runs = [(None, axis, length) for axis, length in enumerate(other) if axis not in second_of.values()]
        runs += [(axis, second_of.get(axis), length) for axis, length in enumerate(shape)]
    else:
        numbers = operation.params['dimension_numbers']
        outputs, inputs, *taps = numbers.rhs_spec
        channels = numbers.lhs_spec[1]
        # With larger groups the images have several times as many channels as the kernel's input axis, which `operands`
        # cannot express.
        one_group = operation.params['feature_group_count'] == 1
        first_of = {inputs: channels} if one_group else {outputs: channels} if is_depthwise(operation) else {}
        runs = [(first_of.get(axis), axis, other[axis]) for axis in (inputs, outputs, *taps)]
        runs += [(None, None, result[axis]) for axis in (numbers.out_spec[0], *numbers.out_spec[2:])]
    fixed = 1
    axes: list[np.ndarray] = []
    operands: list[list[int | None]] = [[None] * len(shape), [None] * len(other)]
    for first, second, length in runs:
        slots = input_labels[1][second] if second is not None else input_labels[0][first] if first is not None else None
        if slots is None:
            fixed *= length
            continue
        for operand, axis in ((0, first), (1, second)):
            if axis is not None:
                operands[operand][axis] = len(axes)
        axes.append(slots)
    layer = operation.module.partition('/')[2] or operation.module
    return Product(layer, operation, fixed, tuple(axes), tuple(map(tuple, operands)))


def _broadcast(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    (axes, *_), (result,) = input_labels, operation.result_shapes
    labels: list[np.ndarray | None] = [None] * len(result)
    for axis, to in enumerate(operation.params['broadcast_dimensions']):
        if operation.shapes[0][axis] == result[to]:
            labels[to] = axes[axis]
        else:
            _pin(operation, coupling, axes[axis])
    return [tuple(labels)]


def _reshape(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    """Labels merged axes with one axis of channels among them; pins axes of channels that are split or merged together."""
    (axes, *_), (shape, *_), (result,) = input_labels, operation.shapes, operation.result_shapes
    labels: list[np.ndarray | None] = [None] * len(result)
    for before, after in _blocks(shape, result):
        labelled = [(position, slots) for position, axis in enumerate(before) if (slots := axes[axis]) is not None]
        long = [axis for axis in after if result[axis] > 1]
        if len(labelled) == 1 and len(long) == 1:
            # Every place of the merged axis has the slot of the channel from which it comes.
            ((position, slots),) = labelled
            expanded = np.expand_dims(slots, tuple(other for other in range(len(before)) if other != position))
            labels[long[0]] = np.broadcast_to(expanded, [shape[axis] for axis in before]).ravel()
        else:
            _pin(operation, coupling, *(slots for _, slots in labelled))
    return [tuple(labels)]


def _blocks(shape: Sequence[int], result: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields pairs of consecutive axes before and after a reshape, (axes of `shape`, axes of `result`), of equal size."""
    before: list[int] = []
    after: list[int] = []
    i, j = 0, 0
    while i < len(shape) or j < len(result):
        sizes = math.prod(shape[axis] for axis in before), math.prod(result[axis] for axis in after)
        if (sizes[0] <= sizes[1] and i < len(shape)) or j == len(result):
            before.append(i)
            i += 1
        else:
            after.append(j)
            j += 1
        sizes = math.prod(shape[axis] for axis in before), math.prod(result[axis] for axis in after)
        if sizes[0] == sizes[1] and before and after:
            yield before, after
            before, after = [], []
    if before or after:
        yield before, after


def _transpose(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    return [tuple(input_labels[0][axis] for axis in operation.params['permutation'])]


def _squeeze(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    return _without_axes(operation, input_labels, coupling, operation.params['dimensions'])


def _reduction(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    return _without_axes(operation, input_labels, coupling, operation.params['axes'])  # for example, a mean over channels


def _without_axes(
    operation: Operation, input_labels: list[Labels], coupling: Coupling, removed: Sequence[int]
) -> list[Labels]:
    """Pins the axes that an operation removes; returns the labels of the other ones."""
    _pin(operation, coupling, *(input_labels[0][axis] for axis in removed))
    labels = tuple(slots for axis, slots in enumerate(input_labels[0]) if axis not in removed)
    return [labels] * len(operation.result_shapes)


def _window(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    params, labels = operation.params, []
    windows = zip(params['window_dimensions'], params['window_strides'], params['padding'], strict=True)
    for slots, (size, stride, padding) in zip(input_labels[0], windows, strict=True):
        single = size == stride == 1 and not any(padding)
        if not single:
            _pin(operation, coupling, slots)
        labels.append(slots if single else None)
    return [tuple(labels)] * len(operation.result_shapes)


def _concatenate(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    along = operation.params['dimension']
    others = [tuple(None if axis == along else slots for axis, slots in enumerate(axes)) for axes in input_labels]
    labels = [*_combined(operation, others, operation.shapes[0], coupling)]
    if any(axes[along] is not None for axes in input_labels):
        sections = zip((axes[along] for axes in input_labels), operation.shapes, strict=True)
        labels[along] = np.concatenate(
            [coupling.fresh(shape[along]) if slots is None else slots for slots, shape in sections]
        )
    return [tuple(labels)]


def _padding(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    labels: list[np.ndarray | None] = []
    for slots, (before, after, between) in zip(input_labels[0], operation.params['padding_config'], strict=True):
        if slots is None or before == after == between == 0:
            labels.append(slots)
        elif between or min(before, after) < 0:
            _pin(operation, coupling, slots)
            labels.append(None)
        else:  # a shortcut padded with zero channels: the new slots are coupled where they are added to other channels
            labels.append(np.concatenate([coupling.fresh(before), slots, coupling.fresh(after)]))
    return [tuple(labels)]


def _slice(operation: Operation, input_labels: list[Labels], coupling: Coupling) -> list[Labels]:
    sections = zip(input_labels[0], parts(operation), strict=True)
    return [tuple(None if slots is None else slots[part] for slots, part in sections)]


def parts(operation: Operation) -> tuple[slice, ...]:
    """Returns the part of each axis that a `slice` operation takes."""
    params = operation.params
    steps = params['strides'] or (1,) * len(params['start_indices'])
    return tuple(map(slice, params['start_indices'], params['limit_indices'], steps))


RULES: dict[str, Rule] = {
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
