"""Evaluation of a function's program (its jaxpr) with some operations replaced, or in segments that are recomputed.

A network that somebody else wrote can thus be adapted to a backend or to little memory without changing its code. Operations
that cannot be inlined (scans, custom derivatives) are run as they are.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Primitive, Var
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from dvinv.graph.program import bind, call, called_program, evaluate, program_of, run_equations, start_values, value_of

# A function of an operation's parameters, extended by 'avals', the shapes and dtypes of its inputs. It returns a function of
# the inputs that replaces the operation, or None to keep the operation.
Rule = Callable[[dict], Callable | None]


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
