"""The student of a run, its hints, its losses and its training job, which is the same for all students that are compared.

The DeepInversion paper has no hints; there a student is trained on the teacher's logits only. Synthesized images give the
layers of the teacher the same moments as real images, and learning a layer from its inputs and outputs takes few images.

Two networks that have all BatchNorm layers in common are compared at the inputs of these layers. Any other two are compared
at the outputs of their stages, the last values of each resolution (see `graph.stages`). With grafted stages, some images of
a batch enter a stage of the student as the output of the teacher's previous stage, so that all stages learn from the first
update on. This is an idea of LIT (Koratana et al., arXiv 1810.01937), where all images do so.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.config import validate_devices
from dvinv.evaluation import divergence
from dvinv.graph.stages import (
    Stage,
    StagePair,
    find_stages,
    graft,
    initial_projections,
    match_stages,
    record,
    relative_error,
    to_student,
    to_teacher,
)
from dvinv.inversion import Teacher
from dvinv.inversion.linen_modules import features_in_training
from dvinv.inversion.programs import in_precision
from dvinv.networks import shapes_of
from dvinv.networks.classifier import Images, Scalar
from dvinv.networks.naming import inherited
from dvinv.pipeline.run import Run
from dvinv.runtime.errors import DvinvError, listed, say
from dvinv.teacher.task import validate_takes
from dvinv.training.step import Rounds, TrainJob
from dvinv.training.trainer import TrainTarget, seed_of

ROLE = 3  # see `training.trainer.TrainTarget`; the same for all students
PROJECTIONS = 2  # folded into the key of a student for its projections; a training folds in 0 and 1


@dataclasses.dataclass(frozen=True)
class Hints:
    """The intermediates at which a student is compared with its teacher, in addition to the logits.

    Attributes:
      layers: BatchNorm layers with the same path and input shape in both networks, or none.
      pairs: pairs of stages with the same resolution, or none.
    """

    layers: tuple[str, ...] = ()
    pairs: tuple[StagePair, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of hints: 'layers', 'stages' or 'none'."""
        return 'layers' if self.layers else 'stages' if self.pairs else 'none'

    def rows(self) -> list[list[str]]:
        """Returns a table row per pair of stages: resolution, teacher's channels and operation, student's, projection."""
        return [
            [
                '{}x{}'.format(*pair.student.resolution),
                _described(pair.teacher),
                _described(pair.student),
                f'{pair.student.channels} to {pair.teacher.channels} channels' if pair.projected else 'none',
            ]
            for pair in self.pairs
        ]

    def __str__(self) -> str:
        """Returns a description of the matching for the terminal."""
        if self.layers:
            return f'Hints: the inputs of {len(self.layers)} BatchNorm layers that student and teacher have in common.'
        if not self.pairs:
            return 'Hints: none; the student is trained on the logits of the teacher only.'
        lines = ['Hints: the outputs of the stages, teacher and student.']
        lines += ['  {}: {}; {}; projection: {}'.format(*row) for row in self.rows()]
        return '\n'.join(lines)


def _described(stage: Stage) -> str:
    return f'{stage.channels} channels of {stage.operation}'


def choose_hints(kind: str, module, teacher: Teacher) -> Hints:
    """Returns the hints for a student, determined from shapes only.

    Args:
      kind: 'layers', 'stages', 'none', or 'auto': layers if the two networks have all of them in common, else stages.
      module: the Linen module of the student; takes x and `train`.

    Raises:
      DvinvError: the networks have no layer, or no stage, in common; the message names the operation that hides the stages,
        if there is one.
    """
    if kind == 'none':
        return Hints()
    images, rngs = jax.ShapeDtypeStruct((2, *teacher.image_shape), jnp.float32), {'dropout': jax.random.key(0)}
    student, shapes = functools.partial(features_in_training, module), shapes_of(module, teacher.image_shape)
    if kind != 'stages':
        in_teacher = _input_shapes(teacher.features, teacher.variables, images)
        in_student = _input_shapes(student, shapes, images, rngs)
        shared = tuple(layer for layer, shapes in in_teacher.items() if shapes == in_student.get(layer))
        if kind == 'layers' and not shared:
            raise DvinvError(
                "distillation.hints is 'layers', but no BatchNorm layer of the student has the path and the input shape "
                f"of one of the teacher's ({listed([*in_teacher], 3)}); set distillation.hints='stages', which compares any "
                "two networks, or 'none'."
            )
        if kind == 'layers' or 0 < len(shared) == len(in_teacher) == len(in_student):
            return Hints(layers=shared)
    of_teacher = find_stages(teacher.apply_fn, teacher.variables, images, name='The teacher')
    of_student = find_stages(student, shapes, images, rngs, name='The student')
    return Hints(pairs=match_stages(of_teacher, of_student, teacher.image_shape))


def _input_shapes(fn: Callable, *args) -> dict[str, list]:
    """Returns {layer: the shape of its input at each call}, for `fn(*args)` that returns (logits, features, ...)."""
    _, features, *_ = jax.eval_shape(fn, *args)
    return {layer: [x.shape for x in calls] for layer, calls in features.items()}


def layer_error(features: dict, teacher_features: dict) -> Scalar:
    """Computes the mean over layers and calls of the relative squared error, float32 scalar; see `relative_error`.

    Args:
      features, teacher_features: {layer: BatchNorm inputs, one per call}; `features`, of the student, may have more layers.
    """
    terms = [
        relative_error(output, target)
        for layer, calls in teacher_features.items()
        for output, target in zip(features[layer], calls, strict=True)
    ]
    return jnp.stack(terms).mean()


def staged_forward(module, teacher: Teacher, pairs: tuple[StagePair, ...], share: float) -> Callable:
    """Returns the forward pass of a student that is compared with `teacher` at the outputs of its stages.

    Args:
      module: the Linen module of the student; takes x and `train`.
      share: the initial probability with which the output of a stage of the student is replaced by that of the teacher's
        stage (projected to the student's channels), drawn per stage and image. It falls to 0 linearly over the training, so
        that the student ends with its own outputs.

    Returns:
      A `training.step.TrainJob.forward`; its features are {'teacher_logits': [B, K], 'stage_errors': float32 [stages]}.
    """
    resolutions = [pair.student.resolution for pair in pairs]
    of_teacher = record(teacher.apply_fn, resolutions)

    def forward(variables, projections: dict, x: Images, rngs, frozen, progress):
        teacher_logits, targets = of_teacher(frozen, x)
        key, probability = jax.random.fold_in(rngs['dropout'], 1), share * (1 - progress)
        replaced = jax.random.bernoulli(key, probability, (len(pairs), len(x), 1, 1, 1))

        def replace(index: int, output: jax.Array) -> jax.Array:
            target = to_student(projections, pairs[index], targets[index])
            return jnp.where(replaced[index], target.astype(output.dtype), output) if share else output

        student = graft(functools.partial(features_in_training, module), resolutions, replace)
        (logits, _, batch_stats), outputs = student(variables, x, rngs)
        projected = [to_teacher(projections, pair, output) for pair, output in zip(pairs, outputs, strict=True)]
        errors = [*map(relative_error, projected, targets)]
        return logits, {'teacher_logits': teacher_logits, 'stage_errors': jnp.stack(errors)}, batch_stats

    return forward


def validate_student(run: Run) -> None:
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
        forward=staged_forward(module, teacher, hints.pairs, settings.graft),
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
    """Returns the loss of a `TrainJob` with `staged_forward`.

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
