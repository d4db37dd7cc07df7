"""Residual blocks of any network, found in its program: modules that return the sum of their input and a function of it."""

import jax
import numpy as np

from dvinv.graph.program import Program, called_or_jaxs_own, program_of
from dvinv.inversion.capture import OUTPUT

# Operations through which sums are traced back, because they change neither whether an array is a sum nor its summands.
# They occur after a sum, or in a shortcut without weights.
PASSED = ('relu', 'relu6', 'max', 'convert_element_type', 'reshape', 'squeeze', 'transpose', 'copy', 'pad', 'slice')


def residual_blocks(teacher) -> tuple[str, ...]:
    """Returns the paths of the innermost modules that are residual blocks, in the order of their calls.

    A module is a residual block if its output is a sum, perhaps followed by a ReLU, of its input and of a value that depends
    on its input. The other modules of its class then count as well, since they may project their input. Modules inside
    lifted loops (nn.scan) are not examined.
    """
    tap, variables = teacher.tap, teacher.variables
    modules = {path: module for path, module in tap.modules(variables).items() if path}
    places = tuple(place for path in modules for place in (path, path + OUTPUT))
    x = jax.ShapeDtypeStruct((2, *teacher.image_shape), np.float32)

    def arrays(variables, x):
        _, _, kept = tap(variables, x, capture=places)
        return {place: calls[0] for place, calls in kept.items() if isinstance(calls[0], jax.Array)}

    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(variables, x)
    program = program_of(closed, called_or_jaxs_own)
    value = dict(zip(sorted(shapes), program.outputs, strict=True))  # JAX flattens a dict in sorted order
    pairs = {path: (value[path], value[path + OUTPUT]) for path in modules if {path, path + OUTPUT} <= value.keys()}
    producers = {value: operation for operation in program.operations for value in operation.outputs}
    found = {path for path, (taken, returned) in pairs.items() if _adds(program, producers, taken, returned)}
    inner = {path for path in found if not any(other.startswith(f'{path}/') for other in found)}
    classes = {modules[path] for path in inner}
    blocks = {path for path, module in modules.items() if module in classes}
    return tuple(path for path in modules if path in blocks and not any(other.startswith(f'{path}/') for other in blocks))


def _adds(program: Program, producers: dict, taken, returned) -> bool:
    """Returns whether `returned` is a sum of `taken` and a value that depends on it; `producers` is {value: operation}."""
    depends = {taken}
    for operation in program.operations:
        if not depends.isdisjoint(operation.inputs):
            depends.update(operation.outputs)
    pending, summands, added = [returned], [], False
    while pending:
        value = pending.pop()
        producer = producers.get(value) if value != taken else None
        if producer and producer.name in ('add', 'add_any'):
            pending += producer.inputs
            added = True
        elif producer and producer.name in PASSED:
            pending.append(producer.inputs[0])
        else:
            summands.append(value)
    return added and taken in summands and not depends.isdisjoint({*summands} - {taken})
