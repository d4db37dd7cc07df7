"""Hints: losses that compare intermediates of a student with those of its teacher (FitNets, arXiv 1412.6550).

The DeepInversion paper has no hints; there a student is trained on the teacher's logits only. Synthesized images give the
layers of the teacher the same moments as real images, and learning a layer from its inputs and outputs takes few images.

Two networks that have all BatchNorm layers in common are compared at the inputs of these layers. Any other two are compared
at the outputs of their stages, the last values of each resolution (see `graph.stages`). With grafted stages, some images of
a batch enter a stage of the student as the output of the teacher's previous stage, so that all stages learn from the first
update on. This is an idea of LIT (Koratana et al., arXiv 1810.01937), where all images do so.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dvinv.errors import DvinvError, listed
from dvinv.graph import Stage, StagePair, find_stages, graft, match_stages, record
from dvinv.graph.projections import relative_error, to_student, to_teacher
from dvinv.inversion import Teacher
from dvinv.inversion.linen_tap import features_in_training
from dvinv.networks import shapes_of
from dvinv.networks.arrays import Images, Scalar
from dvinv.networks.suited import suited_to


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


def staged_forward(module, teacher: Teacher, pairs: tuple[StagePair, ...], share: float, platform: str) -> Callable:
    """Returns the forward pass of a student that is compared with `teacher` at the outputs of its stages.

    Args:
      module: the Linen module of the student; takes x and `train`.
      share: the initial probability with which the output of a stage of the student is replaced by that of the teacher's
        stage (projected to the student's channels), drawn per stage and image. It falls to 0 linearly over the training, so
        that the student ends with its own outputs.
      platform: the platform that the networks run on, 'cpu', 'gpu' or 'tpu'.

    Returns:
      A `training.step.TrainJob.forward`; its features are {'teacher_logits': [B, K], 'stage_errors': float32 [stages]}.
    """
    resolutions = [pair.student.resolution for pair in pairs]
    of_teacher = suited_to(platform, record(teacher.apply_fn, resolutions))

    def forward(variables, projections: dict, x: Images, rngs, frozen, progress):
        teacher_logits, targets = of_teacher(frozen, x)
        key, probability = jax.random.fold_in(rngs['dropout'], 1), share * (1 - progress)
        replaced = jax.random.bernoulli(key, probability, (len(pairs), len(x), 1, 1, 1))

        def replace(index: int, output: jax.Array) -> jax.Array:
            target = to_student(projections, pairs[index], targets[index])
            return jnp.where(replaced[index], target.astype(output.dtype), output) if share else output

        student = graft(functools.partial(features_in_training, module), resolutions, replace)
        (logits, _, batch_stats), outputs = suited_to(platform, student)(variables, x, rngs)
        projected = [to_teacher(projections, pair, output) for pair, output in zip(pairs, outputs, strict=True)]
        errors = [*map(relative_error, projected, targets)]
        return logits, {'teacher_logits': teacher_logits, 'stage_errors': jnp.stack(errors)}, batch_stats

    return forward
