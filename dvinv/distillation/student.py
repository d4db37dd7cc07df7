"""The student, its losses and its training job, which is the same for all students that are compared."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.config import validate_devices
from dvinv.distillation.hints import Hints, choose_hints, layer_error, staged_forward
from dvinv.errors import DvinvError, say
from dvinv.evaluation.divergence import divergence
from dvinv.graph.projections import initial_projections
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.networks import shapes_of
from dvinv.networks.inheritance import inherited
from dvinv.pipeline.run import Run
from dvinv.runtime.devices import platform_of
from dvinv.teacher.task import validate_takes
from dvinv.training.sampling import Rounds
from dvinv.training.step import TrainJob
from dvinv.training.targets import TrainTarget, seed_of

ROLE = 3  # see `training.targets.TrainTarget`; the same for all students
PROJECTIONS = 2  # folded into the key of a student for its projections; a training folds in 0 and 1


def validate(run: Run) -> None:
    """Validates the student of a run, and prints a message if it has more parameters than the teacher.

    Raises:
      DvinvError: the student cannot take the teacher's images, has no intermediates to compare as the settings ask, or
        cannot inherit weights of the teacher.
    """
    teacher = run.planned_teacher
    validate_devices(run.settings.distillation, 'distillation', run.training_mesh.size)
    if not run.settings.student.factory:
        validate_takes('student', run.settings.student, teacher)
    student = dataclasses.replace(teacher, variables=shapes_of(run.student_module(teacher), teacher.image_shape))
    if student.parameters > teacher.parameters:
        say(
            f'The student has {student.parameters:,} parameters, more than the teacher ({teacher.parameters:,}); a smaller '
            'one is named by student.network, student.width or student.factory.'
        )
    hints_of(run, teacher)
    student_of(run, teacher)


def student_of(run: Run, teacher: Teacher, name: str = 'student', task: str = 'distillation') -> TrainTarget:
    """Returns the run's student of `teacher`, or one of another name or task, for instance for a control.

    Raises:
      DvinvError: the student should start from weights of the teacher, and no layer fits.
    """
    group, module, start = run.settings.student, run.student_module(teacher), None
    if group.inherit:
        start = inherited(teacher.variables, shapes_of(module, teacher.image_shape))
        if not start:
            raise DvinvError(
                'student.inherit is True, but no layer of the student has name and shapes of one of the teacher; set '
                'student.inherit=False, or choose a student of the same family and width.'
            )
    user_module = module if group.factory else None
    snapshots = run.settings.distillation.curve_updates if task == 'distillation' else ()
    return TrainTarget(task, name, group, teacher, ROLE, start=start, user_module=user_module, snapshots=snapshots)


def prefix_of(name: str) -> str:
    """Returns the prefix of the figures of a student in results.json: '' for the result of the task, else its name."""
    return '' if name == 'student' else f'{name}_'


def job_of(run: Run, teacher: Teacher, rounds: Rounds, hints: Hints) -> TrainJob:
    """Returns the training job of the run's student of `teacher`.

    Args:
      run: the run.
      teacher: the teacher.
      rounds: the schedule by which images become available.
      hints: the result of `hints_of`.
    """
    settings = run.settings.distillation
    module, teacher = run.student_module(teacher), in_precision(teacher, settings.precision)
    if not hints.pairs:
        loss = distillation_loss(teacher, settings.temperature, settings.hint, hints.layers, decay=settings.hint_decay)
        return TrainJob(settings, loss, rounds, teacher.variables)
    return TrainJob(
        settings,
        staged_loss(settings.temperature, settings.hint, settings.hint_decay),
        rounds,
        teacher.variables,
        forward=staged_forward(module, teacher, hints.pairs, settings.graft, platform_of(run.mesh)),
        auxiliary=initial_projections(jax.random.fold_in(jax.random.key(seed_of(run, ROLE)), PROJECTIONS), hints.pairs),
    )


def hints_of(run: Run, teacher: Teacher) -> Hints:
    """Returns the hints with which the run's student is compared with `teacher`; none if `distillation.hint` is 0.

    Raises:
      DvinvError: see `choose_hints`.
    """
    settings = run.settings.distillation
    return choose_hints(settings.hints, run.student_module(teacher), teacher) if settings.hint else Hints()


def print_hints(hints: Hints) -> None:
    """Prints the hints with which a student is compared with its teacher, before its training."""
    print(hints, file=sys.stderr, flush=True)


def distillation_loss(
    teacher: Teacher,
    temperature: float,
    hint: float = 0.0,
    layers: Collection[str] = (),
    kept_channels: Mapping[str, np.ndarray] | None = None,
    decay: float = 0.0,
) -> Callable:
    """Returns the loss of a `TrainJob`: T^2 KL(teacher || student) at temperature T, plus `layer_error` of `layers`.

    Both networks get the same augmented images. T^2 keeps the scale of the gradient independent of the temperature (Hinton
    et al., arXiv 1503.02531, section 2).

    Args:
      teacher: the teacher.
      temperature: T.
      hint, decay: the weight of the second term, see `hint_weight`.
      layers: the layers of the second term; none: no such term.
      kept_channels: for a student with pruned channels, {layer: the teacher's channels that the student keeps, int [c]}.
    """
    kept = kept_channels or {}

    def loss(logits, features, x, labels, teacher_variables, progress):
        if layers:
            teacher_logits, teacher_features = teacher.features(teacher_variables, x)
        else:
            teacher_logits = teacher.apply_fn(teacher_variables, x)
        total = temperature**2 * divergence(teacher_logits, logits, temperature)
        if layers:
            targets = {layer: teacher_features[layer] for layer in layers}
            targets |= {layer: [jnp.take(x, kept[layer], -1) for x in targets[layer]] for layer in layers if layer in kept}
            total += hint_weight(hint, decay, progress) * layer_error(features, targets)
        return total

    return loss


def staged_loss(temperature: float, hint: float, decay: float = 0.0) -> Callable:
    """Returns the loss of a `TrainJob` with `hints.staged_forward`.

        T^2 KL(teacher || student) at temperature T + weight * mean over stages of the relative squared error of outputs

    The outputs are those of the stages, and the weight is that of `hint_weight`.
    """

    def loss(logits, features, x, labels, teacher_variables, progress):
        distillation = temperature**2 * divergence(features['teacher_logits'], logits, temperature)
        return distillation + hint_weight(hint, decay, progress) * features['stage_errors'].mean()

    return loss


def hint_weight(hint: float, decay: float, progress):
    """Computes the weight of hints, hint (1 - progress)^decay; progress is the share of finished updates."""
    return hint * (1 - progress) ** decay if decay else hint
