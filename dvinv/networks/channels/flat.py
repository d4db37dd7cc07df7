"""A function's program (its jaxpr) as one flat list of operations, with the functions that it calls inlined."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal
from jax.extend.core.primitives import jit_p, remat_p

# Activations that define their derivative at their kinks; inlining them would lose this definition.
ACTIVATIONS = {'relu': jax.nn.relu, 'relu6': jax.nn.relu6}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on arrays.

    Attributes:
      name: The name of the primitive, or of an activation.
      params: The keyword arguments of the primitive.
      inputs: The numbers of the values that it takes; literals themselves.
      outputs: The numbers of the values that it computes.
      shapes, results: The shapes of the inputs and of the outputs.
      where: The path of the modules in which it is called, such as 'CifarResNet/layer1_0/conv1'.
      call: (params, arrays) -> the list of its results.
    """

    name: str
    params: dict
    inputs: tuple
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]
    where: str
    call: Callable[[dict, list], list]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program as a list of operations.

    Attributes:
      operations: The operations in order.
      inputs, outputs: The numbers of the program's inputs and outputs; an output may also be a literal.
      constants: {number: value} of the constants in the program.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple
    constants: dict[int, Any]


def flat_program(closed) -> Program:
    """Returns the `Program` of a closed jaxpr. Scans, branches and functions with a user's custom derivative stay whole."""
    count = iter(range(10**9))
    numbers = {v: next(count) for v in [*closed.jaxpr.constvars, *closed.jaxpr.invars]}
    constants = {numbers[v]: value for v, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)}
    inputs = tuple(numbers[v] for v in closed.jaxpr.invars)
    operations = tuple(_operations(closed.jaxpr, numbers, constants, count, ''))
    return Program(operations, inputs, tuple(_read(v, numbers) for v in closed.jaxpr.outvars), constants)


def _operations(jaxpr, numbers: dict, constants: dict, count: Iterator[int], outer: str) -> Iterator[Operation]:
    for equation in jaxpr.eqns:
        where = '/'.join(filter(None, (outer, str(equation.source_info.name_stack))))
        inner = _inner(equation)
        if inner is None:
            yield _operation(equation, numbers, count, where)
            continue
        body, consts = inner
        mine = dict(zip(body.invars, (_read(v, numbers) for v in equation.invars), strict=True))
        for variable, value in zip(body.constvars, consts, strict=True):
            mine[variable] = next(count)
            constants[mine[variable]] = value
        yield from _operations(body, mine, constants, count, where)
        numbers.update(zip(equation.outvars, (_read(v, mine) for v in body.outvars), strict=True))


def _inner(equation):
    """Returns (jaxpr, its constants) of the function that an equation calls, or None if the equation is not such a call."""
    primitive, params = equation.primitive, equation.params
    if primitive is jit_p:
        return params['jaxpr'].jaxpr, params['jaxpr'].consts
    if primitive is remat_p:
        return params['jaxpr'], ()
    if primitive.name == 'custom_jvp_call' and _is_jaxs_own(equation) and not _activation(equation):
        return params['call_jaxpr'].jaxpr, params['call_jaxpr'].consts
    return None


def _activation(equation) -> str | None:
    """Returns the name of the activation in `ACTIVATIONS` that an equation computes, or None."""
    if equation.primitive.name != 'custom_jvp_call' or not _is_jaxs_own(equation):
        return None
    name = equation.params['call_jaxpr'].jaxpr.debug_info.func_name
    return name if name in ACTIVATIONS else None


def _is_jaxs_own(equation) -> bool:
    """Returns whether a function with a custom derivative belongs to JAX; its operations then have the same derivative."""
    return '/jax/_src/' in str(equation.params['call_jaxpr'].jaxpr.debug_info.func_src_info)


def _operation(equation, numbers: dict, count: Iterator[int], where: str) -> Operation:
    primitive = equation.primitive
    inputs = tuple(_read(v, numbers) for v in equation.invars)
    outputs = tuple(next(count) for _ in equation.outvars)
    numbers.update(zip(equation.outvars, outputs, strict=True))
    name = _activation(equation) or primitive.name
    if name in ACTIVATIONS:

        def call(params: dict, arrays: list) -> list:
            return [ACTIVATIONS[name](*arrays)]

    else:

        def call(params: dict, arrays: list) -> list:
            with equation.ctx.manager:
                made = primitive.bind(*arrays, **primitive.get_bind_params(params))
            return made if primitive.multiple_results else [made]

    shapes = tuple(tuple(v.aval.shape) for v in equation.invars)
    results = tuple(tuple(v.aval.shape) for v in equation.outvars)
    return Operation(name, dict(equation.params), inputs, outputs, shapes, results, where, call)


def _read(variable, numbers: dict):
    return variable if isinstance(variable, Literal) else numbers[variable]
