"""The student: what it is taught by the teacher, and when its images come. One lesson for all students that are compared."""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from dvinv import factories
from dvinv.configuration import recipe_of
from dvinv.divergence import divergence
from dvinv.errors import DvinvError, say
from dvinv.graph.projections import initial_projections
from dvinv.hints import Hints, choose_hints, layer_error, staged_forward
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.inversion.modules import check_trainable
from dvinv.networks import create, shapes_of
from dvinv.networks.inheritance import inherited
from dvinv.rounds import Rounds
from dvinv.runtime.devices import make_mesh, platform_of
from dvinv.training import Learner, Lesson

NONE = MappingProxyType({})
ROLE = 3  # see `training.Learner`; one for all students
PROJECTIONS = 2  # folded into the key of a student for its projections; a training folds in 0 and 1


def student_of(config, teacher: Teacher, name: str = 'student', task: str = 'distillation') -> Learner:
    """The run's student of `teacher`, or one that goes by another name, to compare it with or for another task.

    Raises:
      DvinvError: it should start from weights of the teacher, and no layer fits.
    """
    start, own = None, module_of_student(config, teacher) if config.student.factory else None
    if config.student.inherit:
        module = module_of_student(config, teacher)
        start = inherited(teacher.variables, shapes_of(module, teacher.image_shape))
        if not start:
            raise DvinvError(
                'student.inherit is True, but no layer of the student has name and shapes of one of the teacher; set '
                'student.inherit=False, or choose a student of the same family and width.'
            )
    return Learner(task, name, config.student, teacher, ROLE, start=start, own=own)


def lesson_of(config, teacher: Teacher, rounds: Rounds) -> Lesson:
    """What a student of `teacher` is taught, on images that come in `rounds`."""
    group, hints = config.distillation, hints_of(config, teacher)
    recipe, teacher = recipe_of(group), in_precision(teacher, group.precision)
    if not hints.pairs:
        loss = distillation_loss(teacher, group.temperature, group.hint, hints.layers, decay=group.hint_decay)
        return Lesson(recipe, loss, rounds, teacher.variables)
    module = module_of_student(config, teacher)
    platform = platform_of(make_mesh(config.devices))
    return Lesson(
        recipe,
        staged_loss(group.temperature, group.hint, group.hint_decay),
        rounds,
        teacher.variables,
        forward=staged_forward(module, teacher, hints.pairs, group.graft, platform),
        auxiliary=initial_projections(jax.random.fold_in(jax.random.key(16 * config.seed + ROLE), PROJECTIONS), hints.pairs),
    )


def module_of_student(config, teacher: Teacher):
    """Returns the run's student of `teacher`: a Linen module that takes x and `train`, or what has its `init` and `apply`.

    Raises:
      DvinvError: there is no such network, or it cannot be trained here.
    """
    if config.student.factory:
        return _own_student(config.student.factory, teacher.image_shape, teacher.num_classes)
    return create(config.student.network, teacher.num_classes, config.student.width)


@functools.cache
def _own_student(factory: str, image_shape: tuple[int, int, int], num_classes: int):
    module = factories.of_student(factory, num_classes)
    check_trainable(module, image_shape, num_classes, f'The network of student.factory {factory!r}')
    return module


def say_larger(config, teacher: Teacher) -> None:
    """Says, before anything is made, that the student has more parameters than `teacher`, if it has."""
    shapes = shapes_of(module_of_student(config, teacher), teacher.image_shape)
    student = dataclasses.replace(teacher, variables=shapes)
    if student.parameters > teacher.parameters:
        say(
            f'The student has {student.parameters:,} parameters, more than the teacher ({teacher.parameters:,}); a smaller '
            'one is named by student.network, student.width or student.factory.'
        )


def hints_of(config, teacher: Teacher) -> Hints:
    """Returns where the run's student is compared with `teacher`; nowhere if `distillation.hint` is 0.

    Raises:
      DvinvError: see `choose_hints`.
    """
    if not config.distillation.hint:
        return Hints()
    module = module_of_student(config, teacher)
    return choose_hints(config.distillation.hints, module, teacher)


def print_hints(config, teacher: Teacher) -> None:
    """Prints where the student is compared with `teacher`, before its training."""
    print(hints_of(config, teacher), file=sys.stderr, flush=True)


def distillation_loss(
    teacher: Teacher,
    temperature: float,
    hint: float = 0.0,
    layers: Iterable[str] = (),
    left: Mapping = NONE,
    decay: float = 0.0,
):
    """Returns the loss of a `Lesson`: T^2 KL(teacher || student) at temperature T, plus `layer_error` of `layers`.

    The second term has the weight of `hint_weight`. Where the student has lost channels, `left` tells for a layer, int [c],
    which of the teacher's its own are.

    Both networks see the same augmented view. T^2 keeps the gradient's size independent of the temperature (Hinton et al.,
    arXiv 1503.02531, section 2).
    """

    def loss(logits, features, x, labels, teacher_variables, progress):
        if layers:
            teacher_logits, teacher_features = teacher.features(teacher_variables, x)
        else:
            teacher_logits = teacher.apply_fn(teacher_variables, x)
        total = temperature**2 * divergence(teacher_logits, logits, temperature)
        if layers:
            hints = {layer: teacher_features[layer] for layer in layers}
            hints |= {layer: [jnp.take(x, left[layer], -1) for x in hints[layer]] for layer in layers if layer in left}
            total += hint_weight(hint, decay, progress) * layer_error(features, hints)
        return total

    return loss


def staged_loss(temperature: float, hint: float, decay: float = 0.0):
    """Returns the loss of a `Lesson` with `hints.staged_forward`:

    T^2 KL(teacher || student) at temperature T + weight * mean over stages of the relative squared error of their outputs

    The weight is that of `hint_weight`.
    """

    def loss(logits, features, x, labels, teacher_variables, progress):
        answers = temperature**2 * divergence(features['teacher_logits'], logits, temperature)
        return answers + hint_weight(hint, decay, progress) * features['stage_errors'].mean()

    return loss


def hint_weight(hint: float, decay: float, progress):
    """Returns the weight of hints, hint (1 - progress)^decay; progress is the share of the updates that are done."""
    return hint * (1 - progress) ** decay if decay else hint
