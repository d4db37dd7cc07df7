"""Finds the convolutions and matrix products with weights, and the operations after each, in a network's jaxpr.

This works for any unmodified Flax network, Linen or NNX. A layer is an operation with a variable as one operand. Its norm is
a BatchNorm that is applied to its result and to nothing else. It feeds another layer if only a BatchNorm and a ReLU or ReLU6
lie between the two, because a channel can then be scaled in one and scaled back in the other.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from dvinv.errors import DvinvError, listed
from dvinv.networks.classifier import join_names

OPERATIONS = ('conv_general_dilated', 'dot_general')
LOOKED_INTO = ('jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint')  # calls to inline
OPAQUE = ('custom_jvp_call', 'custom_vjp_call')  # followed here, but rewriting rules do not apply inside
CUT = ('min', 'custom_jvp_call')  # the operations that can implement a ReLU6
SAME = ('convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'reshape', 'broadcast_in_dim', 'squeeze', 'expand_dims')
AFFINE = ('add', 'sub', 'mul', 'div')


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

    @property
    def name(self) -> str:
        """The path of the kernel without 'params/' and '/kernel'."""
        return self.kernel.removeprefix('params/').removesuffix('/kernel')


@dataclasses.dataclass(frozen=True)
class _Step:
    """An equation of the jaxpr; operands and results are numbers of values, and a constant is a list of one value."""

    name: str
    operands: tuple
    results: tuple[int, ...]
    params: dict
    shapes: tuple


def find_layers(apply_fn: Callable, variables, image_shape) -> tuple[Layer, ...]:
    """Finds the layers of a network, in the order in which they run.

    Args:
      apply_fn: (variables, x [B, H, W, C]) -> logits.
      variables: nested dicts of arrays, or of their shapes.

    Raises:
      DvinvError: an operation with weights is out of reach of rewriting rules, for instance inside a loop (the message names
        the operation), or the network has no layer.
    """
    paths, leaves = zip(*_flat(variables), strict=True)
    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    closed = jax.make_jaxpr(apply_fn)(variables, x)
    graph = _Graph(closed, paths, leaves)
    found = [layer for layer in map(graph.layer, range(len(graph.steps))) if layer]
    if not found:
        raise DvinvError('The network has no convolution or matrix product with weights, so there is nothing to quantize.')
    return tuple(found)


def _flat(tree) -> list[tuple[str, object]]:
    """Returns [(path, leaf)] of nested dicts, in JAX's order."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(join_names(getattr(key, 'key', key) for key in path), leaf) for path, leaf in found]


class _Graph:
    """The equations of a network with nested calls inlined, and the users of every value."""

    def __init__(self, closed, paths, leaves):
        self._fresh = itertools.count()
        inputs = [next(self._fresh) for _ in closed.jaxpr.invars]
        self.path = dict(zip(inputs, paths, strict=False))  # of values that are a variable, possibly reshaped
        self.shape = {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
        self.steps, self.numbers = [], {}  # numbers: {index of a step: number among all OPERATIONS}
        self.cuts = {}  # {index of a `min` step: number of that operation, or of the one that contains it, among `CUT`}
        self._cut = itertools.count()
        self._of_images = {*inputs[len(paths) :]}
        self._roots = {value: {path} for value, path in self.path.items()}
        outputs = self._inline(closed.jaxpr, [[const] for const in closed.consts], inputs)
        self.users = {}
        for index, step in enumerate(self.steps):
            for operand in step.operands:
                if isinstance(operand, int):
                    self.users.setdefault(operand, []).append(index)
        for value in outputs:
            if isinstance(value, int):
                self.users.setdefault(value, []).append(None)

    def _inline(self, jaxpr, consts, inputs, within: str = '', cut: int | None = None) -> list:
        """Appends the steps of a jaxpr, with nested calls inlined.

        Args:
          jaxpr: the jaxpr.
          consts, inputs: the values of its constants and inputs.
          within: the primitive of the custom derivative that contains the jaxpr, '' if there is none.
          cut: the number of that operation among `CUT`.

        Returns:
          The values of the outputs.
        """
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(atom):
            return [atom.val] if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            operands = [*map(read, equation.invars)]
            inner = params.get('call_jaxpr', params.get('jaxpr', params.get('fun_jaxpr')))
            if name in (*LOOKED_INTO, *OPAQUE) and inner is not None:
                body, held = getattr(inner, 'jaxpr', inner), [[const] for const in getattr(inner, 'consts', ())]
                mine = next(self._cut) if name in CUT and not within else cut
                results = self._inline(body, held, operands, within or (name if name in OPAQUE else ''), mine)
                values.update(zip(equation.outvars, results, strict=True))
                continue
            self._refuse_hidden(name, params, within)
            results = tuple(next(self._fresh) for _ in equation.outvars)
            values.update(zip(equation.outvars, results, strict=True))
            self._note(name, operands, results)
            if name in OPERATIONS:
                self.numbers[len(self.steps)] = len(self.numbers)
            if name in CUT:
                self.cuts[len(self.steps)] = cut if within else next(self._cut)
            self.steps.append(_Step(name, tuple(operands), results, params, tuple(v.aval.shape for v in equation.invars)))
        return [*map(read, jaxpr.outvars)]

    def _refuse_hidden(self, name: str, params: dict, within: str) -> None:
        hidden = within if name in OPERATIONS else name if any(_holds_layers(value) for value in params.values()) else ''
        if hidden or name in ('ragged_dot', 'ragged_dot_general', 'conv_general_dilated_patches'):
            raise DvinvError(
                f'The network has the operation {hidden or name}, whose weights cannot be quantized: only convolutions and '
                'matrix products outside of loops and custom derivatives can; write it out, or use another network.'
            )

    def _note(self, name, operands, results) -> None:
        values = [operand for operand in operands if isinstance(operand, int)]
        roots = set().union(*(self._roots.get(value, ()) for value in values))
        for result in results:
            if any(value in self._of_images for value in values):
                self._of_images.add(result)
            else:
                self._roots[result] = roots
                if name in SAME and values and values[0] in self.path:
                    self.path[result] = self.path[values[0]]

    def layer(self, index: int) -> Layer | None:
        """Returns the layer at the step `index`, or None if that step is no layer.

        Raises:
          DvinvError: its weights are computed from variables or constants rather than being a variable.
        """
        step = self.steps[index]
        if step.name not in OPERATIONS:
            return None
        sides = [side for side in (0, 1) if step.operands[side] not in self._of_images]
        if len(sides) != 1:  # two activations, as in attention, or no activation at all
            return None
        (side,) = sides
        weights = step.operands[side]
        path = self.path.get(weights) if isinstance(weights, int) else None
        if path is None or self.shape[path] != step.shapes[side]:
            made_of = listed(sorted(self._roots.get(weights, ())) if isinstance(weights, int) else []) or 'constants'
            raise DvinvError(
                f'The network has the operation {step.name} whose weights are computed ({made_of}), and so '
                'cannot be quantized; give it the finished weights as a variable.'
            )
        axes = _axes(step, side)
        return self._followed(Layer(self.numbers[index], path, side, **axes), step.results[0])

    def _followed(self, layer: Layer, value: int) -> Layer:
        """Adds bias, norm and the next layer to `layer`, following its result `value` while it has a single user."""
        if layer.outputs is None:
            return layer
        size, ceilings, between = self.shape[layer.kernel][layer.outputs], [], False
        while len(users := self.users.get(value, [])) == 1 and users[0] is not None:
            step = self.steps[users[0]]
            other = next((operand for operand in step.operands if operand != value), None)
            constant = isinstance(other, list) and np.size(other[0]) == 1
            if step.name in OPERATIONS:
                if step.operands.index(value) == 0:
                    layer = dataclasses.replace(layer, feeds=self.numbers[users[0]], ceilings=tuple(ceilings))
                return layer
            of_variables = isinstance(other, int) and other not in self._of_images
            if step.name in AFFINE and of_variables and not between:
                roots = self._roots[other]
                means = [path for path in roots if path.startswith('batch_stats/') and path.endswith('/mean')]
                if step.name == 'sub' and means and self.shape[means[0]] == (size,) and not layer.norm:
                    layer = dataclasses.replace(layer, norm=self._norm(means[0]))
                    if layer.norm is None:
                        return layer
                elif not layer.norm and step.name == 'add' and len(roots) == 1 and not layer.bias:
                    (path,) = roots
                    if self.shape[path] != (size,):
                        return layer
                    layer = dataclasses.replace(layer, bias=path)
                elif not (layer.norm and roots <= {layer.norm.variance, layer.norm.scale, layer.norm.bias}):
                    return layer
            elif step.name in ('max', 'min') and constant:
                between = True
                if step.name == 'max' and np.any(np.asarray(other[0])):
                    return layer  # a maximum with another constant than 0 is no ReLU
                if step.name == 'min':
                    if self.cuts[users[0]] is None:
                        return layer
                    ceilings.append(self.cuts[users[0]])
            elif step.name not in ('convert_element_type', 'copy'):
                return layer
            value = step.results[0]
        return layer

    def _norm(self, mean: str) -> Norm | None:
        """Returns the BatchNorm with this running mean; None if its epsilon cannot be determined."""
        place = mean.removesuffix('/mean')
        variance, params = f'{place}/var', place.replace('batch_stats/', 'params/', 1)
        for step in self.steps:
            if step.name == 'add' and variance in {self.path.get(o) for o in step.operands if isinstance(o, int)}:
                constants = [o[0] for o in step.operands if isinstance(o, list) and np.size(o[0]) == 1]
                if constants:
                    there = [f'{params}/{name}' if f'{params}/{name}' in self.shape else '' for name in ('scale', 'bias')]
                    return Norm(mean, variance, *there, float(np.reshape(constants[0], ())))
        return None


def _holds_layers(value) -> bool:
    """Returns whether a parameter of an operation contains a jaxpr with convolutions or matrix products."""
    if isinstance(value, tuple | list):
        return any(map(_holds_layers, value))
    jaxpr = getattr(value, 'jaxpr', value)
    return hasattr(jaxpr, 'eqns') and any(
        equation.primitive.name in OPERATIONS or any(map(_holds_layers, equation.params.values())) for equation in jaxpr.eqns
    )


def _axes(step: _Step, side: int) -> dict:
    """Returns the fields of a `Layer` that describe the axes of its kernel, input and result.

    Raises:
      DvinvError: the variables are the images of a convolution.
    """
    if step.name == 'conv_general_dilated':
        numbers = step.params['dimension_numbers']
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
            'groups': step.params['feature_group_count'],
        }
    contracted, batch = (pair[side] for pair in step.params['dimension_numbers'])
    theirs = step.params['dimension_numbers'][0][1 - side]
    free = [axis for axis in range(len(step.shapes[side])) if axis not in (*contracted, *batch)]
    return {
        'contracted': tuple(contracted),
        'inputs': contracted[0] if len(contracted) == 1 else None,
        'outputs': free[0] if len(free) == 1 and not batch else None,
        'channel': theirs[0] if len(theirs) == 1 else None,
        'last': side == 1,
    }
