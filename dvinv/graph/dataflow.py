"""A network's program (its jaxpr) as a dataflow graph, and its evaluation with some of its values replaced.

Functions that a program calls (`jit`, `jax.checkpoint`, closed calls) are inlined. Loops, branches and functions with a
custom derivative (`jax.nn.relu`, for instance) stay whole, so that every derivative stays as it is.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import closed_call_p, jit_p, remat_p

Place = tuple[int, ...]  # an operation's index in the program, then its index in the function that is called there, etc.

CONTRACTIONS = ('conv_general_dilated', 'dot_general', 'ragged_dot_general')  # operations that combine values with weights
LITERAL = -1  # the number that stands for every literal value of a program


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program with inlined functions.

    Attributes:
      equation: The equation of the jaxpr.
      place: The position of the equation, see `Place`.
      module: The path of the module in which it is called.
      inputs, outputs: The numbers of the values that it takes and computes.
    """

    equation: object
    place: Place
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the operation, or of the function with a custom derivative, followed by the name of its module."""
        function = self.equation.params.get('call_jaxpr')
        name = function.jaxpr.debug_info.func_name if function else self.equation.primitive.name
        return f'{name} in {self.module}' if self.module else name


@dataclasses.dataclass(frozen=True)
class Graph:
    """The dataflow graph of a program.

    Attributes:
      operations: The operations in the order of the program.
      results: {value: [(place, index of the result)]}: the place of the operation that computes the value, followed by the
        places of the function calls that return it.
      inputs, outputs: The numbers of the program's input and output values.
    """

    operations: list[Operation]
    results: dict[int, list[tuple[Place, int]]]
    inputs: list[int]
    outputs: list[int]


def graph_of(closed: ClosedJaxpr) -> Graph:
    """Returns the dataflow graph of a program."""
    count = itertools.count()
    numbers = {variable: next(count) for variable in (*closed.jaxpr.constvars, *closed.jaxpr.invars)}
    graph = Graph([], collections.defaultdict(list), [numbers[variable] for variable in closed.jaxpr.invars], [])
    _inline(graph, closed.jaxpr, numbers, count)
    graph.outputs.extend(_number(variable, numbers) for variable in closed.jaxpr.outvars)
    return graph


def _inline(graph: Graph, jaxpr, numbers: dict, count: Iterator[int], place: Place = (), module: str = '') -> None:
    """Adds the operations of `jaxpr` to the graph, and its variables to `numbers`, {variable: number of its value}."""
    for index, equation in enumerate(jaxpr.eqns):
        here, where = (*place, index), '/'.join(filter(None, (module, str(equation.source_info.name_stack))))
        body = _body(equation)
        if body is None:
            numbers.update((variable, next(count)) for variable in equation.outvars)
            values = (tuple(_number(v, numbers) for v in variables) for variables in (equation.invars, equation.outvars))
            graph.operations.append(Operation(equation, here, where, *values))
        else:
            inner = {variable: next(count) for variable in body.jaxpr.constvars}
            inner.update(zip(body.jaxpr.invars, (_number(v, numbers) for v in equation.invars), strict=True))
            _inline(graph, body.jaxpr, inner, count, here, where)
            numbers.update(zip(equation.outvars, (_number(v, inner) for v in body.jaxpr.outvars), strict=True))
        for result, variable in enumerate(equation.outvars):
            graph.results[numbers[variable]].append((here, result))


def _number(variable, numbers: Mapping) -> int:
    return LITERAL if isinstance(variable, Literal) else numbers[variable]


def _body(equation) -> ClosedJaxpr | None:
    """Returns the program of the function that an equation calls; None for any other operation."""
    if equation.primitive not in (jit_p, remat_p, closed_call_p):
        return None
    body = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def _programs(equation) -> Iterator:
    """Yields the programs inside an operation, such as the body of a loop, the branches of a condition, or a function."""
    for leaf in jax.tree.leaves([*equation.params.values()], is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
        if hasattr(leaf, 'eqns'):
            yield leaf


def hides(equation) -> bool:
    """Returns whether a convolution or a matrix product is inside an operation."""
    return any(contracts(inner) for program in _programs(equation) for inner in program.eqns)


def contracts(equation) -> bool:
    """Returns whether a convolution or a matrix product is, or is inside, an operation."""
    return equation.primitive.name in CONTRACTIONS or hides(equation)


def between(operations: Sequence[Operation], images: int, logits: int) -> list[Operation]:
    """Returns the operations through which data flow from the value `images` to the value `logits`, in order."""
    reached, forward = {images}, []
    for operation in operations:
        if not reached.isdisjoint(operation.inputs):
            reached.update(operation.outputs)
            forward.append(operation)
    needed, kept = {logits}, []
    for operation in reversed(forward):
        if not needed.isdisjoint(operation.outputs):
            needed.update(reached.intersection(operation.inputs))
            kept.append(operation)
    return kept[::-1]


def cuts(operations: Sequence[Operation], images: int, logits: int) -> Iterator[tuple[Operation, int | None]]:
    """Yields (operation, its result if all data flow through this value, else None) for each operation.

    Such a value is a cut: every other value on a path from the images to the logits comes before or after it, so that
    directly after its operation no other value remains to be used.
    """
    uses = {value: index for index, operation in enumerate(operations) for value in operation.inputs}
    uses[logits] = len(operations)
    waiting = {images}
    for index, operation in enumerate(operations):
        waiting = {value for value in waiting if uses[value] > index}
        results = {value for value in operation.outputs if uses.get(value, -1) > index}
        waiting |= results
        yield operation, (*results,)[0] if len(results) == 1 and waiting == results else None


def place_of(graph: Graph, value: int) -> tuple[Place, tuple[int, ...]]:
    """Returns where to replace a value: at the outermost function call that returns it and does not use it inside.

    Returns:
      (place of that call or operation, indices of the results that are the value).
    """
    inside = graph.results[value][0][0]
    users = [operation.place for operation in graph.operations if value in operation.inputs]
    place = min(
        (
            place
            for place, _ in graph.results[value]
            if place == inside[: len(place)] and not any(user[: len(place)] == place for user in users)
        ),
        key=len,
    )
    return place, tuple(result for other, result in graph.results[value] if other == place)


def evaluate(closed: ClosedJaxpr, arrays: list, places: Mapping[int, tuple], replace: Callable) -> tuple[list, dict]:
    """Evaluates a program and replaces values in it.

    Args:
      closed: The program.
      arrays: Its inputs.
      places: {index of a stage: (place, results) of its output, as returned by `place_of`}.
      replace: See `graft`.

    Returns:
      The program's outputs, and {index of a stage: its output before it was replaced}.
    """
    jaxpr, recorded = closed.jaxpr, {}
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arrays), strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for position, equation in enumerate(jaxpr.eqns):
        here = {index: (place[1:], outputs) for index, (place, outputs) in places.items() if place[0] == position}
        inside = {index: where for index, where in here.items() if where[0]}
        inputs = [read(variable) for variable in equation.invars]
        with equation.ctx.manager:
            if inside:
                results, found = _call(equation, inputs, inside, replace)
                recorded |= found
            else:
                results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
                results = [*results] if equation.primitive.multiple_results else [results]
        for index in here.keys() - inside.keys():
            outputs = here[index][1]
            recorded[index] = results[outputs[0]]
            value = _replacement(index, recorded[index], replace)
            results = [value if number in outputs else result for number, result in enumerate(results)]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars], recorded


def _call(equation, inputs: list, places: Mapping[int, tuple], replace: Callable) -> tuple[list, dict]:
    """Evaluates the function that an equation calls; a function under `jax.checkpoint` stays under it."""

    def run(*arrays):
        return evaluate(_body(equation), arrays, places, replace)

    if equation.primitive is remat_p:
        run = jax.checkpoint(run, prevent_cse=equation.params['prevent_cse'], policy=equation.params['policy'])
    return run(*inputs)


def _replacement(index: int, output: jax.Array, replace: Callable) -> jax.Array:
    value = replace(index, output)
    if value.shape != output.shape:
        raise ValueError(f'The output of stage {index} has the shape {output.shape}, its replacement {value.shape}.')
    return value.astype(output.dtype)
