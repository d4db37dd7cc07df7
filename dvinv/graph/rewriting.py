"""Evaluation of a function's program (its jaxpr) with some operations replaced, or in segments that are recomputed.

A network that somebody else wrote can thus be adapted to a backend or to little memory without changing its code. Operations
that cannot be inlined (scans, custom derivatives) are run as they are.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import jit_p, remat_p

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


def recomputed(fn: Callable, stretches: int) -> Callable:
    """Returns `fn` divided into segments; only values that pass between segments are kept for the gradient.

    All other values of a segment are recomputed during the backward pass. With n operations and about sqrt(n) segments the
    memory falls to about 2 / sqrt(n), at the cost of one more forward pass (Chen et al., arXiv 1604.06174).

    Args:
      fn: A function from arrays, or trees of arrays, to a tree of arrays.
      stretches: The number of segments.
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        jaxpr = closed.jaxpr
        values = _bound(closed, jax.tree.leaves(args))
        length = max(1, math.ceil(len(jaxpr.eqns) / stretches))
        cuts = range(0, len(jaxpr.eqns), length)
        asked = {*_variables(jaxpr.outvars)}  # the variables that are used after a segment
        plan = []
        for start in reversed(cuts):
            equations = jaxpr.eqns[start : start + length]
            made = [v for equation in equations for v in equation.outvars if v in asked]
            own = {v for equation in equations for v in equation.outvars}
            # In order of use and not in the order of a set, so that the program is the same in every process, as the
            # compilation cache requires.
            inputs = [*dict.fromkeys(v for equation in equations for v in _variables(equation.invars) if v not in own)]
            asked |= {*inputs}
            plan.append((equations, inputs, made))
        for equations, inputs, made in reversed(plan):
            stretch = functools.partial(_stretch, equations, inputs, made)
            values.update(zip(made, jax.checkpoint(stretch)(*(values[v] for v in inputs)), strict=True))
        return jax.tree.unflatten(jax.tree.structure(result), [_read(v, values) for v in jaxpr.outvars])

    return run


def _stretch(equations, inputs, made, *arrays) -> list:
    """Evaluates `equations` on the arrays of the variables `inputs`; returns the values of the variables `made`."""
    values = dict(zip(inputs, arrays, strict=True))
    _follow(equations, values, {})
    return [values[v] for v in made]


def _variables(atoms) -> list:
    return [v for v in atoms if not isinstance(v, Literal)]


def _bound(closed, arrays: list) -> dict:
    """Returns {variable: its value} at the start of a program."""
    return dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *arrays], strict=True))


def _evaluate(closed, arrays: list, rules) -> list:
    values = _bound(closed, arrays)
    _follow(closed.jaxpr.eqns, values, rules)
    return [_read(v, values) for v in closed.jaxpr.outvars]


def _read(variable, values):
    return variable.val if isinstance(variable, Literal) else values[variable]


def _follow(equations, values: dict, rules) -> None:
    """Evaluates `equations` in order, taking inputs from `values`, {variable: its value}, and adding results to it."""
    for equation in equations:
        arrays = [_read(v, values) for v in equation.invars]
        with equation.ctx.manager:
            made = _apply(equation, arrays, rules)
        values.update(zip(equation.outvars, made, strict=True))


def _apply(equation, arrays: list, rules) -> list:
    primitive, params = equation.primitive, equation.params
    rule = rules.get(primitive.name)
    if rule and (replacement := rule(params | {'avals': [v.aval for v in equation.invars]})):
        return [replacement(*arrays)]
    if primitive is jit_p and _holds(params['jaxpr'].jaxpr, rules):
        return _evaluate(params['jaxpr'], arrays, rules)
    if primitive is remat_p and _holds(params['jaxpr'], rules):

        def inner(*arrays):
            return _evaluate(ClosedJaxpr(params['jaxpr'], ()), arrays, rules)

        return jax.checkpoint(inner, prevent_cse=params['prevent_cse'], policy=params['policy'])(*arrays)
    made = primitive.bind(*arrays, **primitive.get_bind_params(params))
    return made if primitive.multiple_results else [made]


def _holds(jaxpr, rules) -> bool:
    """Returns whether `jaxpr`, or a program that it calls, has an operation with a rule."""
    for equation in jaxpr.eqns:
        inner = equation.params.get('jaxpr')
        if equation.primitive.name in rules or (inner is not None and _holds(getattr(inner, 'jaxpr', inner), rules)):
            return True
    return False
