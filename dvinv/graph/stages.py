"""The stages of a network, found in its program (its jaxpr) and not by name, and projections between those of two networks.

A network for images lowers their resolution step by step. The output of a stage is the last value [B, h, w, C] of one
resolution (h, w) through which all data flow from the images to the logits: a cut of the dataflow graph. In a residual
network it is the output of the last block before a strided block, in a VGG the input of a pooling, in a MobileNet the input
of a strided depthwise convolution. All later values depend on the images through this value alone, so that the network can
be cut there: `record` returns the outputs of its stages, and `graft` replaces them while the network runs.

Which functions of the program are inlined: see `graph.program`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jaxtyping import Float

from dvinv.graph.program import (
    Operation,
    Place,
    Program,
    array_type,
    bind,
    call,
    called_program,
    contracts,
    evaluate,
    hides,
    program_of,
)
from dvinv.networks.classifier import AnyArray, Scalar
from dvinv.runtime.errors import DvinvError, listed

# Operations that prepare a value for the next operation; their results are not outputs of a stage.
LAYOUT = ('pad', 'transpose')


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a network, identified by the resolution of its output [B, h, w, C].

    Attributes:
      resolution: (h, w), in pixels.
      channels: C.
      operation: The operation that computes the output and the module in which it is called, for tables and messages.
      place: Where the program computes the output: the place of an operation.
      outputs: Which results of that operation are the output.
    """

    resolution: tuple[int, int]
    channels: int
    operation: str
    place: Place
    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        return *self.resolution, self.channels


@dataclasses.dataclass(frozen=True)
class StagePair:
    """A stage of the teacher and the stage of the student with the same resolution."""

    teacher: Stage
    student: Stage

    @property
    def projected(self) -> bool:
        """Whether the numbers of channels differ, so that the comparison needs a projection."""
        return self.teacher.channels != self.student.channels


def find_stages(fn: Callable, *args, name: str = 'The network') -> tuple[Stage, ...]:
    """Finds the stages of a network, in the order in which it computes them.

    Args:
      fn: (variables, x, ...) -> logits [B, K], or a tuple that begins with them, such as `Teacher.apply_fn`, or
        `features_in_training` of a module. Only the logits count: running statistics that a network in train mode returns
        as well do not change its stages.
      *args: The arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s. The second one is x [B, H, W, C].
      name: The network's name in messages.

    Returns:
      A stage for each resolution of more than one pixel. The images are not a stage, and neither are values that are
      computed from them without weights.

    Raises:
      DvinvError: There is none. The message names the operation that cannot be inlined, if there is one.
    """
    return _stages(jax.make_jaxpr(fn)(*args), args, name)


def record(fn: Callable, resolutions: Sequence[tuple[int, int]]) -> Callable:
    """Returns `fn` with the outputs of its stages as a second result.

    Args:
      fn: See `find_stages`.
      resolutions: (h, w) of the stages.

    Returns:
      (variables, x, ...) -> (what `fn` returns, [the output [B, h, w, C] of each of these stages]).
    """
    return graft(fn, resolutions, lambda index, output: output)


def graft(fn: Callable, resolutions: Sequence[tuple[int, int]], replace: Callable) -> Callable:
    """Returns `fn` with the outputs of its stages recorded and replaced; later operations take the new values.

    The result can be compiled, differentiated and mapped as `fn` can. It finds the stages each time that it is traced, so
    it may be called with other shapes, and in train mode or not, as long as `fn` has these stages.

    Args:
      fn: See `find_stages`.
      resolutions: (h, w) of the stages.
      replace: (index in `resolutions`, output [B, h, w, C]) -> the value of the same shape that replaces the output, for
        instance the output of a teacher's stage. It is cast to the dtype of the output.

    Returns:
      (variables, x, ...) -> (what `fn` returns, [the output of each of these stages before it is replaced]).

    Raises:
      DvinvError: When it is called: `fn` has no stage of one of these resolutions.
      ValueError: When it is called: `replace` returns another shape.
    """

    @functools.wraps(fn)
    def run(*args):
        closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
        stages = {stage.resolution: stage for stage in _stages(closed, args, 'The network')}
        missing = [resolution for resolution in resolutions if resolution not in stages]
        if missing:
            raise DvinvError(f'The network has no stage of {_pixels(missing)} pixels; it has {_pixels(stages)}.')
        chosen = [stages[resolution] for resolution in resolutions]
        places = {index: (stage.place, stage.outputs) for index, stage in enumerate(chosen)}
        values, recorded = _evaluate(closed, jax.tree.leaves(args), places, replace)
        return jax.tree.unflatten(jax.tree.structure(result), values), [recorded[index] for index in places]

    return run


def match_stages(teacher: Sequence[Stage], student: Sequence[Stage], image_shape: Sequence[int]) -> tuple[StagePair, ...]:
    """Pairs the stages of two networks for the same images by their resolution.

    Args:
      teacher: The stages of the teacher.
      student: The stages of the student.
      image_shape: (H, W, C) of the images.

    Returns:
      A pair for each resolution that both have, in the student's order. A resolution that only one of them has is left out,
      for instance if their stems have different strides.

    Raises:
      DvinvError: They have no resolution in common.
    """
    of_teacher = {stage.resolution: stage for stage in teacher}
    pairs = tuple(StagePair(of_teacher[stage.resolution], stage) for stage in student if stage.resolution in of_teacher)
    if not pairs:
        raise DvinvError(
            f'For images of {_pixels([image_shape[:2]])} pixels the stages of the teacher have '
            f'{_pixels(stage.resolution for stage in teacher)} pixels and those of the student '
            f'{_pixels(stage.resolution for stage in student)}, none in common; choose a student with one of the '
            "teacher's resolutions, or set distillation.hints='none'."
        )
    return pairs


def _pixels(resolutions) -> str:
    return listed([f'{height}x{width}' for height, width in resolutions])


def _stages(closed, args, name: str) -> tuple[Stage, ...]:
    """Returns the stages of a program that was traced with `args`; raises DvinvError if there is none."""
    program = program_of(closed)
    images, logits = program.inputs[len(jax.tree.leaves(args[0]))], program.outputs[0]
    operations = _between(program.operations, images, logits)
    stages: dict[tuple[int, int], Stage] = {}
    weights: dict[tuple[int, int], int] = {}  # {resolution: the number of operations with weights up to its stage}
    contractions = 0
    for operation, value in _cuts(operations, images, logits):
        contractions += contracts(operation.equation)
        if value is None or operation.equation.primitive.name in LAYOUT:
            continue
        output = array_type(operation.equation.outvars[operation.outputs.index(value)])
        if output.ndim != 4 or output.shape[0] != args[1].shape[0] or not jnp.issubdtype(output.dtype, jnp.floating):
            continue
        resolution, channels = (output.shape[1], output.shape[2]), output.shape[3]
        # A value with more rows or columns than an earlier stage is not [B, h, w, C]. A value that is computed without
        # weights from the stage before it or from the images, such as the mean over windows, is not a separate stage.
        earlier = [other for other in stages if other != resolution]
        coarser = all(new <= old for other in earlier for new, old in zip(resolution, other, strict=True))
        if math.prod(resolution) > 1 and coarser and contractions > max((weights[other] for other in earlier), default=0):
            stages[resolution] = Stage(resolution, channels, operation.title, *_place_of(program, value))
            weights[resolution] = contractions
    if not stages:
        hidden = [operation.title for operation in operations if hides(operation.equation)]
        reason = (
            f'the operation {hidden[0]} hides what is computed inside it'
            if hidden
            else 'no value [batch, height, width, channels] of more than one pixel carries all of what the logits depend on'
        )
        raise DvinvError(f"{name} has no stage to compare: {reason}; set distillation.hints='none'.")
    return tuple(stages.values())


def _between(operations: Sequence[Operation], images: int, logits: int) -> list[Operation]:
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


def _cuts(operations: Sequence[Operation], images: int, logits: int) -> Iterator[tuple[Operation, int | None]]:
    """Yields (operation, its result if all data flow through this value, else None) for each operation.

    Such a value is a cut: every other value on a path from the images to the logits comes before or after it, so that
    directly after its operation no other value remains to be used.
    """
    last_use = {value: index for index, operation in enumerate(operations) for value in operation.inputs}
    last_use[logits] = len(operations)
    remaining = {images}  # the values that later operations use
    for index, operation in enumerate(operations):
        remaining = {value for value in remaining if last_use[value] > index}
        results = {value for value in operation.outputs if last_use.get(value, -1) > index}
        remaining |= results
        yield operation, (*results,)[0] if len(results) == 1 and remaining == results else None


def _place_of(program: Program, value: int) -> tuple[Place, tuple[int, ...]]:
    """Returns where to replace a value: at the outermost function call that returns it and does not use it inside.

    Returns:
      (place of that call or operation, indices of the results that are the value).
    """
    innermost = program.returned[value][0][0]
    users = [operation.place for operation in program.operations if value in operation.inputs]
    place = min(
        (
            place
            for place, _ in program.returned[value]
            if place == innermost[: len(place)] and not any(user[: len(place)] == place for user in users)
        ),
        key=len,
    )
    return place, tuple(result for other, result in program.returned[value] if other == place)


def _evaluate(
    closed: ClosedJaxpr,
    arrays: Sequence,
    places: Mapping[int, tuple[Place, tuple[int, ...]]],
    replace: Callable,
) -> tuple[list, dict[int, jax.Array]]:
    """Evaluates a program and replaces values in it.

    Args:
      closed: The program.
      arrays: Its inputs.
      places: {index of a stage: (place, results) of its output, as returned by `_place_of`}.
      replace: See `graft`.

    Returns:
      The program's outputs, and {index of a stage: its output before it was replaced}.
    """
    recorded: dict[int, jax.Array] = {}

    def apply(equation: JaxprEqn, position: int, inputs: list) -> list:
        at_equation = {index: (place[1:], outputs) for index, (place, outputs) in places.items() if place[0] == position}
        inside = {index: (place, outputs) for index, (place, outputs) in at_equation.items() if place}
        function = called_program(equation)
        if inside and function is not None:
            results, recorded_inside = call(equation, inputs, lambda *arrays: _evaluate(function, arrays, inside, replace))
            recorded.update(recorded_inside)
        else:
            results = bind(equation, inputs)
        for index in at_equation.keys() - inside.keys():
            outputs = at_equation[index][1]
            recorded[index] = results[outputs[0]]
            value = _replacement(index, recorded[index], replace)
            results = [value if number in outputs else result for number, result in enumerate(results)]
        return results

    return evaluate(closed, arrays, apply), recorded


def _replacement(index: int, output: jax.Array, replace: Callable) -> Float[AnyArray, '...']:
    value = replace(index, output)
    if value.shape != output.shape:
        raise ValueError(f'The output of stage {index} has the shape {output.shape}, its replacement {value.shape}.')
    return value.astype(output.dtype)


def initial_projections(key: jax.Array, pairs: Sequence[StagePair]) -> dict:
    """Draws the projections of the pairs that need them.

    A projected pair of stages has two 1x1 convolutions without a bias. They are trained together with the student and
    discarded afterwards:

        to_teacher [C_student, C_teacher] maps the student's output to the teacher's channels, where the two are compared;
        to_student [C_teacher, C_student] maps the teacher's output to the student's channels, where it replaces the
        student's output.

    The comparison is made only in the teacher's channels, so that no projection can make both outputs vanish. `to_student`
    is trained by the errors of the later stages of the student. A pair with the same numbers of channels has no projections.

    Args:
      key: A random key.
      pairs: The matched stages.

    Returns:
      {'16x16': {'to_teacher': float32 [C_student, C_teacher], 'to_student': float32 [C_teacher, C_student]}}. Each matrix is
      the transpose of the other, with orthonormal rows or columns: a map to more channels followed by a map back is the
      identity.
    """
    projections = {}
    for index, pair in enumerate(pairs):
        if pair.projected:
            channels = pair.student.channels, pair.teacher.channels
            square = jax.random.orthogonal(jax.random.fold_in(key, index), max(channels), dtype=jnp.float32)
            kernel = square[: channels[0], : channels[1]]
            projections[_name(pair)] = {'to_teacher': kernel, 'to_student': kernel.T}
    return projections


def to_teacher(projections: dict, pair: StagePair, output: Float[AnyArray, 'B h w _']) -> Float[AnyArray, 'B h w _']:
    """Maps the student's output [B, h, w, C_student] to the teacher's channels, [B, h, w, C_teacher]."""
    return output @ projections[_name(pair)]['to_teacher'] if pair.projected else output


def to_student(projections: dict, pair: StagePair, output: Float[AnyArray, 'B h w _']) -> Float[AnyArray, 'B h w _']:
    """Maps the teacher's output [B, h, w, C_teacher] to the student's channels, [B, h, w, C_student]."""
    return output @ projections[_name(pair)]['to_student'] if pair.projected else output


def relative_error(output: Float[AnyArray, '*S'], teacher_output: Float[AnyArray, '*S']) -> Scalar:
    """Computes E[(output - teacher_output)^2] / E[teacher_output^2], float32 scalar; 0 if the teacher's output is 0."""
    output, teacher_output = output.astype(jnp.float32), teacher_output.astype(jnp.float32)
    power = jnp.square(teacher_output).mean()
    return jnp.square(output - teacher_output).mean() / jnp.where(power > 0, power, jnp.inf)


def _name(pair: StagePair) -> str:
    return '{}x{}'.format(*pair.student.resolution)
