"""Projections between stages with different numbers of channels, and the error that they are learned from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvinv.graph.stages import Stage, StagePair, initial_projections, relative_error, to_student, to_teacher


def _pair(teacher_channels, student_channels):
    return StagePair(*(Stage((4, 4), channels, 'relu', (0,), (0,)) for channels in (teacher_channels, student_channels)))


@pytest.mark.parametrize(('teacher', 'student'), [(5, 8), (8, 5)])
def test_a_projection_undoes_the_other_in_the_smaller_number_of_channels(teacher, student):
    pair = _pair(teacher, student)
    projections = initial_projections(jax.random.key(0), [pair])
    output = np.random.default_rng(0).normal(size=(2, 4, 4, min(teacher, student))).astype(np.float32)
    first, second = (to_student, to_teacher) if teacher < student else (to_teacher, to_student)
    projected = first(projections, pair, output)
    assert projected.shape == (2, 4, 4, max(teacher, student))
    np.testing.assert_allclose(second(projections, pair, projected), output, rtol=1e-4, atol=1e-5)


def test_stages_with_the_same_number_of_channels_are_not_projected():
    pair = _pair(5, 5)
    assert initial_projections(jax.random.key(0), [pair]) == {}
    output = jnp.ones((2, 4, 4, 5))
    assert to_teacher({}, pair, output) is output
    assert to_student({}, pair, output) is output


def test_the_error_is_relative_to_the_output_of_the_teacher():
    rng = np.random.default_rng(0)
    output, teacher_output = rng.normal(size=(2, 2, 4, 4, 3))
    wanted = np.square(output - teacher_output).mean() / np.square(teacher_output).mean()
    np.testing.assert_allclose(relative_error(output, teacher_output), wanted, rtol=1e-5)
    assert relative_error(output, 0 * teacher_output) == 0
    assert np.isfinite(jax.grad(relative_error)(jnp.asarray(output), jnp.zeros_like(output))).all()
