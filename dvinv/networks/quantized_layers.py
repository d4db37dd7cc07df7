"""Finds the convolutions and matrix products with weights, and the operations after each, in a network's jaxpr.

This works for any unmodified Flax network, Linen or NNX. A layer is an operation with a variable as one operand. Its norm is
a BatchNorm that is applied to its result and to nothing else. It feeds another layer if only a BatchNorm and a ReLU or ReLU6
lie between the two, because a channel can then be scaled in one and scaled back in the other.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from dvinv.graph.program import (
    CUSTOM_DERIVATIVES,
    Operation,
    Place,
    Program,
    called_or_derived,
    contraction_rules,
    hides,
    program_of,
    rewritten,
)
from dvinv.networks.classifier import join_names
from dvinv.runtime.errors import DvinvError, listed

OPERATIONS = ('conv_general_dilated', 'dot_general')
CUT = ('min', 'custom_jvp_call')  # the operations that can implement a ReLU6
# Operations that pass a variable on.
PASSED = ('convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'reshape', 'broadcast_in_dim', 'squeeze', 'expand_dims')
AFFINE = ('add', 'sub', 'mul', 'div')
UNSUPPORTED = ('ragged_dot', 'ragged_dot_general', 'conv_general_dilated_patches')


@dataclasses.dataclass(frozen=True)
class Norm:
    """A BatchNorm: the paths of its variables ('' for a missing one), and the epsilon that it adds to the variance."""

    mean: str
    variance: str
    scale: str
    bias: str
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with weights.

    Attributes:
      number: the index among all convolutions and matrix products, in the order in which they run.
      kernel: the path of the weights.
      side: the index of the operand that is the kernel, 0 or 1.
      contracted: the axes of the kernel that are summed over (for a convolution all but the output channels).
      inputs: the kernel's axis of input channels (of one group); None: not exactly one axis.
      outputs: the kernel's axis of output channels; None: not exactly one axis.
      channel: the axis of the channels of the input; None: not exactly one axis.
      last: whether channels are the last axis of the result.
      groups: the number of groups of a grouped convolution.
      bias: the path of the bias that is added to the result, '' if there is none.
      norm: the BatchNorm of the result, if any.
      feeds: the `number` of the layer that gets the result after at most a BatchNorm and a ReLU, if any.
      ceilings: the ReLU6 operations on the way to that layer, by their numbers among all `CUT`.
      tokens: whether the input is an array of tokens, [B, ..., C], and the sum is over the channels of each token.
      per_token: whether each token of the input gets a range of its own, see `quantized.round_tokens`.
    """

    number: int
    kernel: str
    side: int
    contracted: tuple[int, ...]
    inputs: int | None
    outputs: int | None
    channel: int | None
    last: bool
    groups: int = 1
    bias: str = ''
    norm: Norm | None = None
    feeds: int | None = None
    ceilings: tuple[int, ...] = ()
    tokens: bool = False
    per_token: bool = False

    @property
    def name(self) -> str:
        """The path of the kernel without 'params/' and '/kernel'."""
        return self.kernel.removeprefix('params/').removesuffix('/kernel')


def find_layers(apply_fn: Callable, variables, image_shape) -> tuple[Layer, ...]:
    """Finds the layers of a network, in the order in which they run.

    Args:
      apply_fn: (variables, x [B, H, W, C]) -> logits.
      variables: nested dicts of arrays, or of their shapes.

    Raises:
      DvinvError: an operation with weights is out of reach of rewriting rules, for instance inside a loop (the message names
        the operation), or the network has no layer.
    """
    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(variables)  # in JAX's order
    shapes = {join_names(getattr(key, 'key', key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
    finder = _LayerFinder(jax.make_jaxpr(apply_fn)(variables, x), shapes)
    layers = tuple(layer for layer in map(finder.layer, finder.operations) if layer)
    if not layers:
        raise DvinvError('The network has no convolution or matrix product with weights, so there is nothing to quantize.')
    return layers


def with_token_ranges(layers: Sequence[Layer], kernels: Collection[str] | None = None) -> tuple[Layer, ...]:
    """Returns the layers, those with tokens as input with a range per token.

    Args:
      layers: the layers of a network.
      kernels: the kernels of the layers to change; None: all layers with tokens as input.
    """
    chosen = (layer.tokens if kernels is None else layer.kernel in kernels for layer in layers)
    return tuple(dataclasses.replace(layer, per_token=per_token) for layer, per_token in zip(layers, chosen, strict=True))


def with_rules(apply_fn: Callable, layers: Sequence[Layer], compute_layer: Callable) -> Callable:
    """Returns `(weights, ceilings, x) -> logits`, which runs `apply_fn` with its layers computed by `compute_layer`.

    Args:
      compute_layer: (index of the layer, bind, operands) -> its result; `bind(*operands)` is the operation itself.

    Returns:
      The function; for `ceilings` see `calibration.Folded`.
    """
    index_of = {layer.number: index for index, layer in enumerate(layers)}

    def run(weights, ceilings, x):
        operations, cuts = itertools.count(), itertools.count()

        def layer_rule(primitive, params):
            index = index_of.get(next(operations))
            if index is None:
                return None
            return lambda *operands: compute_layer(index, functools.partial(primitive.bind, **params), operands)

        def ceiling_rule(params):
            factor = ceilings.get(str(next(cuts)))
            if factor is None:
                return None
            function = params.get('call_jaxpr')

            def scaled(*operands):
                operands = [operand * factor if np.ndim(operand) else operand for operand in operands]
                result = jaxpr_as_fun(function)(*operands)[0] if function else jnp.minimum(*operands)
                return result / factor

            return scaled

        return rewritten(apply_fn, contraction_rules(layer_rule) | dict.fromkeys(CUT, ceiling_rule))(weights, x)

    return run


class _LayerFinder:
    """The operations of a network, also those of functions with a custom derivative, and the users of every value."""

    def __init__(self, closed: ClosedJaxpr, shapes: dict[str, tuple[int, ...]]):
        """Follows the variables through the network.

        Args:
          closed: the network as a function of its variables and images.
          shapes: {path of a variable: its shape}, in the order of the function's arguments.

        Raises:
          DvinvError: an operation with weights is out of reach of rewriting rules.
        """
        program = program_of(closed, called_or_derived)
        self.operations, self._constants, self._shapes = program.operations, program.constants, shapes
        # Rewriting rules keep functions with a custom derivative whole, and so count the operations of another program.
        outer = program_of(closed)
        self._numbers, self._cuts = _numbered(outer, OPERATIONS), _numbered(outer, CUT)
        # {value: the path of the variable that it is, possibly reshaped}
        self._path = dict(zip(program.inputs, shapes, strict=False))
        # {value that does not depend on the images: the paths of the variables that it is computed from}
        self._roots: dict[int, set[str]] = {value: {path} for value, path in self._path.items()}
        self._of_images = {*program.inputs[len(shapes) :]}
        # {value: the operations that use it, and None if the network returns it}
        self._users: dict[int, list[Operation | None]] = collections.defaultdict(list)
        for operation in program.operations:
            _refuse_hidden(operation)
            self._follow(operation)
            for value in operation.inputs:
                self._users[value].append(operation)
        for value in program.outputs:
            self._users[value].append(None)

    def _follow(self, operation: Operation) -> None:
        """Records what the results of an operation depend on."""
        values = [value for value in operation.inputs if value not in self._constants]
        if not self._of_images.isdisjoint(values):
            self._of_images.update(operation.outputs)
            return
        for result in operation.outputs:
            self._roots[result] = {path for value in values for path in self._roots[value]}
            if operation.name in PASSED and values and values[0] in self._path:
                self._path[result] = self._path[values[0]]

    def layer(self, operation: Operation) -> Layer | None:
        """Returns the layer that an operation is, or None if it is no layer.

        Raises:
          DvinvError: its weights are computed from variables or constants rather than being a variable.
        """
        if operation.name not in OPERATIONS:
            return None
        sides = [side for side in (0, 1) if operation.inputs[side] not in self._of_images]
        if len(sides) != 1:  # two activations, as in attention, or no activation at all
            return None
        (side,) = sides
        weights = operation.inputs[side]
        path = self._path.get(weights)
        if path is None or self._shapes[path] != operation.shapes[side]:
            origin = listed(sorted(self._roots.get(weights, ()))) or 'constants'
            raise DvinvError(
                f'The network has the operation {operation.name} with weights that are computed ({origin}), and so cannot '
                'be quantized; give it the finished weights as a variable.'
            )
        layer = Layer(self._numbers[operation.place], path, side, **_axes(operation, side))
        return self._followed(layer, operation.outputs[0])

    def _followed(self, layer: Layer, value: int) -> Layer:
        """Adds bias, norm and the next layer to `layer`, following its result `value` while it has a single user."""
        if layer.outputs is None:
            return layer
        size, activated = self._shapes[layer.kernel][layer.outputs], False
        ceilings: list[int] = []
        while len(users := self._users[value]) == 1 and (operation := users[0]) is not None:
            if operation.name in OPERATIONS:
                if operation.inputs.index(value) == 0:
                    number = self._numbers[operation.place]
                    layer = dataclasses.replace(layer, feeds=number, ceilings=tuple(ceilings))
                return layer
            other = next((operand for operand in operation.inputs if operand != value), value)
            constant = self._constants.get(other)
            if operation.name in AFFINE and other in self._roots and not activated:
                extended = self._with_affine(layer, operation.name, self._roots[other], size)
                if extended is None:
                    return layer
                layer = extended
            elif operation.name == 'max' and constant is not None and np.size(constant) == 1:
                if np.any(np.asarray(constant)):
                    return layer  # a maximum with another constant than 0 is no ReLU
                activated = True
            elif operation.name == 'min' and constant is not None and np.size(constant) == 1:
                cut = self._cut_of(operation)
                if cut is None:
                    return layer
                ceilings.append(cut)
                activated = True
            elif operation.name not in ('convert_element_type', 'copy'):
                return layer
            value = operation.outputs[0]
        return layer

    def _with_affine(self, layer: Layer, name: str, roots: set[str], size: int) -> Layer | None:
        """Adds an affine operation on the result of a layer to the layer, as its bias or as a part of its norm.

        Args:
          layer: the layer.
          name: the name of the operation.
          roots: the paths of the variables from which the other operand is computed.
          size: the number of output channels of the layer.

        Returns:
          The layer, or None if the operation is neither.
        """
        means = [path for path in roots if path.startswith('batch_stats/') and path.endswith('/mean')]
        if name == 'sub' and means and self._shapes[means[0]] == (size,) and not layer.norm:
            norm = self._norm(means[0])
            return dataclasses.replace(layer, norm=norm) if norm else None
        if not layer.norm and name == 'add' and len(roots) == 1 and not layer.bias:
            (path,) = roots
            return dataclasses.replace(layer, bias=path) if self._shapes[path] == (size,) else None
        if layer.norm and roots <= {layer.norm.variance, layer.norm.scale, layer.norm.bias}:
            return layer
        return None

    def _norm(self, mean: str) -> Norm | None:
        """Returns the BatchNorm with this running mean; None if its epsilon cannot be determined."""
        module = mean.removesuffix('/mean')
        variance, params = f'{module}/var', module.replace('batch_stats/', 'params/', 1)
        for operation in self.operations:
            if operation.name == 'add' and variance in map(self._path.get, operation.inputs):
                values = [self._constants[value] for value in operation.inputs if value in self._constants]
                epsilons = [value for value in values if np.size(value) == 1]
                if epsilons:
                    scale, bias = (
                        f'{params}/{name}' if f'{params}/{name}' in self._shapes else '' for name in ('scale', 'bias')
                    )
                    return Norm(mean, variance, scale, bias, float(np.reshape(epsilons[0], ())))
        return None

    def _cut_of(self, operation: Operation) -> int | None:
        """Returns the number of an operation, or of the function around it, among `CUT`; None if it has none."""
        places = (operation.place[:depth] for depth in range(len(operation.place) + 1))
        return next((self._cuts[place] for place in places if place in self._cuts), None)


def _numbered(program: Program, names: tuple[str, ...]) -> dict[Place, int]:
    """Returns {place of an operation with one of these names: its number among them}, as `with_rules` counts them."""
    places = [operation.place for operation in program.operations if operation.equation.primitive.name in names]
    return {place: number for number, place in enumerate(places)}


def _refuse_hidden(operation: Operation) -> None:
    """Raises DvinvError if an operation with weights is out of reach of rewriting rules."""
    derivatives = [caller.primitive.name for caller in operation.callers if caller.primitive in CUSTOM_DERIVATIVES]
    hidden = operation.name in OPERATIONS and bool(derivatives)
    if hidden or operation.name in UNSUPPORTED or hides(operation.equation):
        name = derivatives[0] if hidden else operation.name
        raise DvinvError(
            f'The network has the operation {name} with weights that cannot be quantized: only those of convolutions and '
            'matrix products outside of loops and custom derivatives can; write it out, or use another network.'
        )


def _axes(operation: Operation, side: int) -> dict[str, Any]:
    """Returns the fields of a `Layer` that describe the axes of its kernel, input and result.

    Raises:
      DvinvError: the variables are the images of a convolution.
    """
    if operation.name == 'conv_general_dilated':
        numbers = operation.params['dimension_numbers']
        outputs, inputs, *space = numbers.rhs_spec
        if side == 0:
            raise DvinvError(
                'The network has the operation conv_general_dilated with variables as its images, which cannot be '
                'quantized; use another network.'
            )
        return {
            'contracted': (inputs, *space),
            'inputs': inputs,
            'outputs': outputs,
            'channel': numbers.lhs_spec[1],
            'last': numbers.out_spec[1] == len(numbers.out_spec) - 1,
            'groups': operation.params['feature_group_count'],
        }
    contracted, batch = (pair[side] for pair in operation.params['dimension_numbers'])
    of_input = operation.params['dimension_numbers'][0][1 - side]
    free = [axis for axis in range(len(operation.shapes[side])) if axis not in (*contracted, *batch)]
    return {
        'contracted': tuple(contracted),
        'inputs': contracted[0] if len(contracted) == 1 else None,
        'outputs': free[0] if len(free) == 1 and not batch else None,
        'channel': of_input[0] if len(of_input) == 1 else None,
        'last': side == 1,
        'tokens': of_input == (len(operation.shapes[1 - side]) - 1,) and len(operation.shapes[1 - side]) > 2,
    }
