"""Projections between the stage outputs of a teacher and of a student that have different numbers of channels.

A projected pair of stages has two 1x1 convolutions without a bias. They are trained together with the student and discarded
afterwards:

    to_teacher [C_student, C_teacher] maps the student's output to the teacher's channels, where the two are compared;
    to_student [C_teacher, C_student] maps the teacher's output to the student's channels, where it replaces the student's
    output.

The comparison is made only in the teacher's channels, so that no projection can make both outputs vanish. `to_student` is
trained by the errors of the later stages of the student. A pair with the same numbers of channels has no projections.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dvinv.graph.stages import StagePair
from dvinv.networks.arrays import AnyArray, Scalar


def initial_projections(key: jax.Array, pairs: Sequence[StagePair]) -> dict:
    """Draws the projections of the pairs that need them.

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
