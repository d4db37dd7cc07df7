"""The student: what it is taught by the teacher, and when its images come. One lesson for all students that are compared."""

import jax
import jax.numpy as jnp

from dvinv.configuration import recipe_of
from dvinv.inversion import Teacher
from dvinv.rounds import Rounds
from dvinv.training import Lesson

ROLE = 3  # see `training.training_of`


def lesson_of(config, teacher: Teacher, rounds: Rounds) -> Lesson:
    """What a student of `teacher` is taught, on images that come in `rounds`."""
    loss = distillation_loss(teacher, config.distillation.temperature)
    return Lesson(recipe_of(config.distillation), loss, rounds, teacher.variables)


def distillation_loss(teacher: Teacher, temperature: float):
    """T^2 KL(teacher || student) at temperature T, both on the augmented view, as the loss of a `Lesson`.

    T^2 keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531, section 2).
    """

    def loss(logits, x, labels, teacher_variables):
        teacher_logits = teacher.apply_fn(teacher_variables, x)
        targets, answers = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (teacher_logits, logits))
        divergence = jnp.sum(jnp.exp(targets) * (targets - answers), -1)
        return temperature**2 * divergence.mean()

    return loss
