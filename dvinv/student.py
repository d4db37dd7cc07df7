"""The student: what it is taught by the teacher, and when its images come. One lesson for all students that are compared."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import jax.numpy as jnp

from dvinv.configuration import recipe_of
from dvinv.divergence import divergence
from dvinv.hints import hint_loss, shared_layers
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.networks import create
from dvinv.rounds import Rounds
from dvinv.training import Learner, Lesson

NONE = MappingProxyType({})
ROLE = 3  # see `training.Learner`; one for all students


def student_of(config, teacher: Teacher, name: str = 'student', task: str = 'distillation') -> Learner:
    """The run's student of `teacher`, or one that goes by another name, to compare it with or for another task."""
    return Learner(task, name, config.student, teacher, ROLE)


def lesson_of(config, teacher: Teacher, rounds: Rounds) -> Lesson:
    """What a student of `teacher` is taught, on images that come in `rounds`."""
    group = config.distillation
    layers = hinted_layers(config, teacher)
    loss = distillation_loss(in_precision(teacher, group.precision), group.temperature, group.hint, layers)
    return Lesson(recipe_of(group), loss, rounds, teacher.variables)


def hinted_layers(config, teacher: Teacher) -> tuple[str, ...]:
    """The layers that hints are about; none where `distillation.hint` is 0.

    Raises:
      DvinvError: there should be some, but student and teacher have no layer in common.
    """
    if not config.distillation.hint:
        return ()
    return shared_layers(create(config.student.network, teacher.num_classes, config.student.width), teacher)


def distillation_loss(
    teacher: Teacher, temperature: float, hint: float = 0.0, layers: Iterable[str] = (), left: Mapping = NONE
):
    """T^2 KL(teacher || student) at temperature T, plus `hint` times `hint_loss` of `layers`; the loss of a `Lesson`.

    Where the student has lost channels, `left` tells for a layer, int [c], which of the teacher's its own are.

    Both networks see the same augmented view. T^2 keeps the gradient's size independent of the temperature (Hinton et al.,
    arXiv 1503.02531, section 2).
    """

    def loss(logits, features, x, labels, teacher_variables):
        if layers:
            teacher_logits, teacher_features = teacher.features(teacher_variables, x)
        else:
            teacher_logits = teacher.apply_fn(teacher_variables, x)
        total = temperature**2 * divergence(teacher_logits, logits, temperature)
        if layers:
            hints = {layer: teacher_features[layer] for layer in layers}
            hints |= {layer: [jnp.take(x, left[layer], -1) for x in hints[layer]] for layer in layers if layer in left}
            total += hint * hint_loss(features, hints)
        return total

    return loss
