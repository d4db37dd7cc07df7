"""A function's program (its jaxpr) as one list of operations, and its evaluation with some operations replaced.

Every analysis of a network starts from `program_of`, so that all follow the same functions:

    calls (`jit`, `jax.checkpoint`, closed calls) are always inlined;
    functions with a custom derivative are inlined where a program is only read (`called_or_derived`), and stay whole where
    it is evaluated again, so that every derivative stays as it is. Those of JAX itself, such as `jax.nn.silu`, may also be
    inlined there (`called_or_jaxs_own`), because their operations have the same derivative;
    loops and branches stay whole; `programs_inside` yields the programs inside them.

A network that somebody else wrote can thus be adapted to a backend or to little memory without changing its code. Operations
that cannot be inlined (scans, custom derivatives) are run as they are.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Primitive, Var, jaxprs_in_params
from jax.extend.core.primitives import (
    call_p,
    closed_call_p,
    conv_general_dilated_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    dot_general_p,
    jit_p,
    remat_p,
)

CALLS = (jit_p, remat_p, closed_call_p, call_p)
CUSTOM_DERIVATIVES = (custom_jvp_call_p, custom_vjp_call_p)
CONTRACTIONS = ('conv_general_dilated', 'dot_general', 'ragged_dot_general')  # operations that combine values with weights
# Activations that define their derivative at their kinks; inlining them would lose this definition.
ACTIVATIONS: dict[str, Callable] = {'relu': jax.nn.relu, 'relu6': jax.nn.relu6}

Place = tuple[int, ...]  # an equation's index in the program, then its index in the function that is called there, etc.
Inlined = Callable[[JaxprEqn], ClosedJaxpr | None]  # returns the function to inline; None to keep an equation whole
Apply = Callable[[JaxprEqn, int, list], Sequence]  # (equation, its index, its inputs) -> its results
# A function of an operation's parameters, extended by 'avals', the shapes and dtypes of its inputs. It returns a function of
# the inputs that replaces the operation, or None to keep the operation.
Rule = Callable[[dict], Callable | None]


def array_type(variable: Var | Literal) -> jax.core.ShapedArray:
    """Returns the shape and dtype of a variable or literal."""
    return cast(jax.core.ShapedArray, variable.aval)


def called_program(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the program of the function that an equation calls; None for any other operation."""
    return _function_of(equation) if equation.primitive in CALLS else None


def called_or_derived(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the same as `called_program`, and also the program of a function with a custom derivative."""
    return _function_of(equation) if equation.primitive in (*CALLS, *CUSTOM_DERIVATIVES) else None


def called_or_jaxs_own(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the same as `called_program`, and also the program of JAX's own functions with a custom JVP.

    The functions in `ACTIVATIONS` stay whole.
    """
    if equation.primitive is custom_jvp_call_p and _is_jaxs_own(equation) and not _activation(equation):
        return _function_of(equation)
    return called_program(equation)


def _function_of(equation: JaxprEqn) -> ClosedJaxpr:
    params = equation.params
    function = params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
    return function if isinstance(function, ClosedJaxpr) else ClosedJaxpr(function, ())


def _activation(equation: JaxprEqn) -> str | None:
    """Returns the name of the activation in `ACTIVATIONS` that an equation computes, or None."""
    if equation.primitive is not custom_jvp_call_p or not _is_jaxs_own(equation):
        return None
    name = equation.params['call_jaxpr'].jaxpr.debug_info.func_name
    return name if name in ACTIVATIONS else None


def _is_jaxs_own(equation: JaxprEqn) -> bool:
    """Returns whether a function with a custom derivative belongs to JAX; its operations then have the same derivative."""
    return '/jax/_src/' in str(equation.params['call_jaxpr'].jaxpr.debug_info.func_src_info)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program with inlined functions.

    Attributes:
      equation: The equation of the jaxpr.
      place: The position of the equation, see `Place`.
      module: The path of the module in which it is called, such as 'CifarResNet/layer1_0/conv1'.
      inputs, outputs: The numbers of the values that it takes and computes.
      callers: The equations that call the functions around it, from the outermost one to the innermost one.
    """

    equation: JaxprEqn
    place: Place
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[JaxprEqn, ...] = ()

    @property
    def name(self) -> str:
        """The name of the primitive, or of an activation in `ACTIVATIONS`."""
        return _activation(self.equation) or self.equation.primitive.name

    @property
    def title(self) -> str:
        """The name of the operation, or of the function with a custom derivative, followed by the name of its module."""
        function = self.equation.params.get('call_jaxpr')
        name = function.jaxpr.debug_info.func_name if function else self.equation.primitive.name
        return f'{name} in {self.module}' if self.module else name

    @property
    def params(self) -> dict[str, Any]:
        """The keyword arguments of the primitive."""
        return self.equation.params

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the inputs."""
        return tuple(array_type(variable).shape for variable in self.equation.invars)

    @property
    def result_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the outputs."""
        return tuple(array_type(variable).shape for variable in self.equation.outvars)

    def call(self, params: dict, arrays: Sequence) -> list:
        """Returns the results of the operation for `arrays`, with `params` in place of its own parameters."""
        if activation := _activation(self.equation):
            return [ACTIVATIONS[activation](*arrays)]
        with self.equation.ctx.manager:
            return bind(self.equation, arrays, params)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program as a list of operations; its values are numbered.

    Attributes:
      operations: The operations in order.
      inputs, outputs: The numbers of the program's inputs and outputs.
      constants: {number: value} of the constants and literals of the program.
      returned: {number: [(place, index of the result)]}: the place of the operation that computes the value, followed by the
        places of the function calls that return it.
    """

    operations: list[Operation]
    inputs: list[int]
    outputs: list[int]
    constants: dict[int, Any]
    returned: dict[int, list[tuple[Place, int]]]


def program_of(closed: ClosedJaxpr, inlined: Inlined = called_program) -> Program:
    """Returns the program of a closed jaxpr.

    Args:
      closed: The jaxpr.
      inlined: Which functions are inlined: `called_program`, `called_or_jaxs_own` or `called_or_derived`.
    """
    inliner = _Inliner(inlined)
    inputs = [inliner.fresh() for _ in closed.jaxpr.invars]
    outputs = inliner.inline(closed, inputs)
    return Program(inliner.operations, inputs, outputs, inliner.constants, inliner.returned)


class _Inliner:
    """The one walk over a jaxpr; collects the fields of a `Program`."""

    def __init__(self, inlined: Inlined):
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.returned: dict[int, list[tuple[Place, int]]] = collections.defaultdict(list)
        self._inlined = inlined
        self._count = itertools.count()

    def fresh(self) -> int:
        """Returns the number of a new value."""
        return next(self._count)

    def inline(
        self,
        closed: ClosedJaxpr,
        inputs: Sequence[int],
        place: Place = (),
        module: str = '',
        callers: tuple[JaxprEqn, ...] = (),
    ) -> list[int]:
        """Adds the operations of a program at `place` in `module`; returns the numbers of its outputs."""
        jaxpr = closed.jaxpr
        numbers: dict[Var, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            numbers[variable] = self._constant(value)

        def number_of(variable) -> int:
            return self._constant(variable.val) if isinstance(variable, Literal) else numbers[variable]

        for index, equation in enumerate(jaxpr.eqns):
            position, path = (*place, index), '/'.join(filter(None, (module, str(equation.source_info.name_stack))))
            arguments = tuple(map(number_of, equation.invars))
            function = self._inlined(equation)
            if function is None:
                results = [self.fresh() for _ in equation.outvars]
                self.operations.append(Operation(equation, position, path, arguments, tuple(results), callers))
            else:
                results = self.inline(function, arguments, position, path, (*callers, equation))
            numbers.update(zip(equation.outvars, results, strict=True))
            for result, value in enumerate(results):
                self.returned[value].append((position, result))
        return [*map(number_of, jaxpr.outvars)]

    def _constant(self, value) -> int:
        number = self.fresh()
        self.constants[number] = value
        return number


def programs_inside(equation: JaxprEqn) -> Iterator[ClosedJaxpr]:
    """Yields the programs inside an equation, such as the body of a loop or the branches of a condition.

    They have None in place of their constants, because they are only read.
    """
    for jaxpr in jaxprs_in_params(equation.params):
        yield ClosedJaxpr(jaxpr, [None] * len(jaxpr.constvars))


def hides(equation: JaxprEqn) -> bool:
    """Returns whether a convolution or a matrix product is inside an operation, such as in the body of a loop."""
    return any(contracts(inner) for program in programs_inside(equation) for inner in program.jaxpr.eqns)


def contracts(equation: JaxprEqn) -> bool:
    """Returns whether a convolution or a matrix product is, or is inside, an operation."""
    return equation.primitive.name in CONTRACTIONS or hides(equation)


# Evaluation


def evaluate(closed: ClosedJaxpr, arrays: Sequence, apply: Apply) -> list:
    """Evaluates a program on `arrays`, with `apply` in place of each of its equations; returns its outputs."""
    values = start_values(closed, arrays)
    run_equations(closed.jaxpr.eqns, values, apply)
    return [value_of(variable, values) for variable in closed.jaxpr.outvars]


def start_values(closed: ClosedJaxpr, arrays: Sequence) -> dict[Var, Any]:
    """Returns {variable: its value} of the constants and inputs of a program that is called with `arrays`."""
    return dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *arrays], strict=True))


def value_of(variable: Var | Literal, values: dict[Var, Any]) -> Any:
    """Returns the value of a variable or literal."""
    return variable.val if isinstance(variable, Literal) else values[variable]


def run_equations(equations: Sequence[JaxprEqn], values: dict[Var, Any], apply: Apply) -> None:
    """Computes equations in order by `apply`; their inputs are taken from `values`, and their results added to it."""
    for index, equation in enumerate(equations):
        arrays = [value_of(variable, values) for variable in equation.invars]
        with equation.ctx.manager:
            results = apply(equation, index, arrays)
        values.update(zip(equation.outvars, results, strict=True))


def bind(equation: JaxprEqn, arrays: Sequence, params: dict | None = None) -> list:
    """Returns the results of an equation for `arrays`; `params` take the place of its own parameters if given."""
    primitive = equation.primitive
    results = primitive.bind(*arrays, **primitive.get_bind_params(equation.params if params is None else params))
    return [*results] if primitive.multiple_results else [results]


def call(equation: JaxprEqn, arrays: Sequence, run: Callable) -> Any:
    """Returns `run(*arrays)`, for an equation that calls a function; under `jax.checkpoint` if the equation is that."""
    if equation.primitive is remat_p:
        run = jax.checkpoint(run, prevent_cse=equation.params['prevent_cse'], policy=equation.params['policy'])
    return run(*arrays)


def count_flops(closed: ClosedJaxpr) -> int:
    """Counts the floating-point operations of the convolutions and matrix products of a program, two per multiply-add.

    The body of a scan counts as often as it runs, that of another loop once, and all branches of a condition count.
    """
    return sum(map(_flops, program_of(closed, called_or_derived).operations))


def _flops(operation: Operation) -> int:
    if operation.name == 'conv_general_dilated':
        kernel, (result,) = operation.shapes[1], operation.result_shapes
        features = kernel[operation.params['dimension_numbers'].rhs_spec[0]]
        return 2 * math.prod(result) * math.prod(kernel) // features
    if operation.name == 'dot_general':
        (contracted, _), _ = operation.params['dimension_numbers']
        (result,) = operation.result_shapes
        return 2 * math.prod(result) * math.prod(operation.shapes[0][axis] for axis in contracted)
    return operation.params.get('length', 1) * sum(map(count_flops, programs_inside(operation.equation)))


def rewritten(fn: Callable, rules: Mapping[str, Rule]) -> Callable:
    """Returns `fn` with operations replaced by rules.

    Args:
      fn: A function from arrays, or trees of arrays, to a tree of arrays.
      rules: {name of a primitive: its rule}. An operation is replaced if the rule returns a replacement.

    Returns:
      A function that can be differentiated and mapped as `fn` can.
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        values = _evaluate(closed, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(result), values)

    return run


def contraction_rules(rule: Callable[[Primitive, dict], Callable | None]) -> dict[str, Rule]:
    """Returns the rules that replace the convolutions and matrix products of a function.

    Args:
      rule: (the primitive, its parameters) -> a function of both operands that replaces the operation, or None to keep it.
    """

    def without_avals(primitive: Primitive, params: dict) -> Callable | None:
        return rule(primitive, {name: value for name, value in params.items() if name != 'avals'})

    primitives = conv_general_dilated_p, dot_general_p
    return {primitive.name: functools.partial(without_avals, primitive) for primitive in primitives}


def recomputed(fn: Callable, segments: int) -> Callable:
    """Returns `fn` divided into segments; only values that pass between segments are kept for the gradient.

    All other values of a segment are recomputed during the backward pass. With n operations and about sqrt(n) segments the
    memory falls to about 2 / sqrt(n), at the cost of one more forward pass (Chen et al., arXiv 1604.06174).

    Args:
      fn: A function from arrays, or trees of arrays, to a tree of arrays.
      segments: The number of segments.
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        equations, outputs = closed.jaxpr.eqns, closed.jaxpr.outvars
        values = start_values(closed, jax.tree.leaves(args))
        length = max(1, math.ceil(len(equations) / segments))
        used = {*_variables(outputs)}  # the variables that are used after a segment
        plan = []
        for start in reversed(range(0, len(equations), length)):
            segment = equations[start : start + length]
            computed = [variable for equation in segment for variable in equation.outvars]
            returned = [variable for variable in computed if variable in used]
            # In order of use and not in the order of a set, so that the program is the same in every process, as the
            # compilation cache requires.
            read = [variable for equation in segment for variable in _variables(equation.invars)]
            inputs = [*dict.fromkeys(variable for variable in read if variable not in {*computed})]
            used |= {*inputs}
            plan.append((segment, inputs, returned))
        for segment, inputs, returned in reversed(plan):
            run_segment = jax.checkpoint(functools.partial(_run_segment, segment, inputs, returned))
            results = run_segment(*(values[variable] for variable in inputs))
            values.update(zip(returned, results, strict=True))
        return jax.tree.unflatten(jax.tree.structure(result), [value_of(variable, values) for variable in outputs])

    return run


def _run_segment(equations: Sequence[JaxprEqn], inputs: Sequence[Var], returned: Sequence[Var], *arrays) -> list:
    """Evaluates equations on the arrays of the variables `inputs`; returns the values of the variables `returned`."""
    values = dict(zip(inputs, arrays, strict=True))
    run_equations(equations, values, lambda equation, _, arrays: bind(equation, arrays))
    return [values[variable] for variable in returned]


def _variables(operands: Iterable[Var | Literal]) -> list[Var]:
    return [operand for operand in operands if not isinstance(operand, Literal)]


def _evaluate(closed: ClosedJaxpr, arrays: Sequence, rules: Mapping[str, Rule]) -> list:
    """Evaluates a program with operations replaced by rules, also in the functions that it calls."""

    def apply(equation: JaxprEqn, _, arrays: list) -> list:
        rule = rules.get(equation.primitive.name)
        if rule and (replacement := rule(equation.params | {'avals': [variable.aval for variable in equation.invars]})):
            return [replacement(*arrays)]
        function = called_program(equation)
        if function is not None and _has_rule(function, rules):
            return call(equation, arrays, lambda *arrays: _evaluate(function, arrays, rules))
        return bind(equation, arrays)

    return evaluate(closed, arrays, apply)


def _has_rule(closed: ClosedJaxpr, rules: Mapping[str, Rule]) -> bool:
    """Returns whether a program, or one that it calls, has an operation with a rule."""
    return any(operation.equation.primitive.name in rules for operation in program_of(closed).operations)
