"""The floating-point operations of a network, counted in its program."""

import math

from jax.extend.core import ClosedJaxpr

from dvinv.graph.program import Operation, called_or_derived, program_of, programs_inside


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
