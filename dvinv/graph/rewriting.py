"""A function's program (its jaxpr) run again with some of its operations replaced, or in stretches that are recomputed.

So a network that somebody else wrote can be made to suit a backend or a small memory, unmodified. What the rewriting cannot
look into (scans, custom derivatives) is run as it is.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import jit_p, remat_p

# (what an operation is called with as keywords, and 'avals', its arrays' shapes and dtypes) -> what to do in its place with
# them, or None: leave it
Rule = Callable[[dict], Callable | None]


def rewritten(fn: Callable, rules: Mapping[str, Rule]) -> Callable:
    """`fn`, whose operations of the names in `rules` are replaced where the rule gives something to put in their place.

    Args:
      fn: arrays, or trees of them, to a tree of arrays. Differentiable and mappable as before.
      rules: {name of a primitive: its rule}.
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        values = _evaluate(closed, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(result), values)

    return run


def recomputed(fn: Callable, stretches: int) -> Callable:
    """`fn`, which keeps for its gradient only what passes from one of so many stretches to the next.

    The rest of a stretch is computed again when the gradient comes by: with n operations and about sqrt(n) stretches the
    memory falls to about 2 / sqrt(n), for one more forward pass (Chen et al., arXiv 1604.06174).
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        jaxpr = closed.jaxpr
        values = _bound(closed, jax.tree.leaves(args))
        length = max(1, math.ceil(len(jaxpr.eqns) / stretches))
        cuts = range(0, len(jaxpr.eqns), length)
        asked = {*_variables(jaxpr.outvars)}  # by what comes after a stretch
        plan = []
        for start in reversed(cuts):
            equations = jaxpr.eqns[start : start + length]
            made = [v for equation in equations for v in equation.outvars if v in asked]
            own = {v for equation in equations for v in equation.outvars}
            # In order of use, not of a set: the same program in every process, for the compilation cache.
            inputs = [*dict.fromkeys(v for equation in equations for v in _variables(equation.invars) if v not in own)]
            asked |= {*inputs}
            plan.append((equations, inputs, made))
        for equations, inputs, made in reversed(plan):
            stretch = functools.partial(_stretch, equations, inputs, made)
            values.update(zip(made, jax.checkpoint(stretch)(*(values[v] for v in inputs)), strict=True))
        return jax.tree.unflatten(jax.tree.structure(result), [_read(v, values) for v in jaxpr.outvars])

    return run


def _stretch(equations, inputs, made, *arrays) -> list:
    """What `equations` compute of `made` from the arrays of `inputs`."""
    values = dict(zip(inputs, arrays, strict=True))
    _follow(equations, values, {})
    return [values[v] for v in made]


def _variables(atoms) -> list:
    return [v for v in atoms if not isinstance(v, Literal)]


def _bound(closed, arrays: list) -> dict:
    """{variable: its value} at the start of a program."""
    return dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *arrays], strict=True))


def _evaluate(closed, arrays: list, rules) -> list:
    values = _bound(closed, arrays)
    _follow(closed.jaxpr.eqns, values, rules)
    return [_read(v, values) for v in closed.jaxpr.outvars]


def _read(variable, values):
    return variable.val if isinstance(variable, Literal) else values[variable]


def _follow(equations, values: dict, rules) -> None:
    """Compute `equations` in order; `values` has what they need, and gets what they make."""
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
    """Whether an operation with a rule is within reach in `jaxpr`."""
    for equation in jaxpr.eqns:
        inner = equation.params.get('jaxpr')
        if equation.primitive.name in rules or (inner is not None and _holds(getattr(inner, 'jaxpr', inner), rules)):
            return True
    return False
