"""The objective of DeepInversion (eq. 1 to 5): the only module in which the terms are weighted and summed."""

from collections.abc import Callable

import jax

from dvinv.config import InversionConfig, Stage
from dvinv.inversion.augmentation import augmentation_of, centred, scaled_down
from dvinv.inversion.losses import (
    L2,
    TOTAL_VARIATION,
    competition,
    cross_entropy,
    feature_loss,
    feature_terms,
)
from dvinv.inversion.parameterization import pixel_scale_of, rescaled
from dvinv.inversion.priors import patch_similarity, pixel_moments
from dvinv.inversion.teacher import Teacher
from dvinv.networks.arrays import Images


def view(teacher: Teacher, stage: Stage, images: Images, key: jax.Array, axis: str | None = None):
    """Returns images [B, H, W, C] at the stage's resolution, as a pair: plain, and augmented as the teacher's input."""
    scaled = centred(scaled_down(images, stage.view_size(*images.shape[1:3])), stage.centre)
    return scaled, augmentation_of(stage)(key, scaled, teacher, axis)


def make_objective(
    teacher: Teacher, config: InversionConfig, stage: Stage, student_fn: Callable | None = None, axis: str | None = None
) -> Callable:
    """Returns the function that computes the loss of one batch and its terms.

    Args:
      teacher: The network to invert.
      config: The settings of the inversion.
      stage: The current stage.
      student_fn: (student_variables, x) -> logits, in eval mode: the student of Adaptive DeepInversion, or None.
      axis: The mesh axis over which the batch is split, or None. If it is split, all values are those of the whole batch.

    Returns:
      `(images, labels, variables, student_variables, key) -> (loss, {term: unweighted value})`, float32 scalars.
        images: [B, H, W, C] float32, normalised.
        labels: int [B].
        variables: The teacher's variables.
        student_variables: The student's variables, or None.
        key: The random key of this iteration, from which the augmentation is drawn.
    """
    weights = config.weights
    attention = config.attention if weights.patch_similarity else ()  # places, see `invert.with_attention`
    scale = pixel_scale_of(config.pixel_scale, teacher)

    def objective(images, labels, variables, student_variables, key):
        scaled, augmented = view(teacher, stage, images, key, axis)
        logits, moments, *captured = teacher.tap(variables, augmented, axis, **({'capture': attention} if attention else {}))
        smooth = rescaled(augmented if config.prior_on == 'view' else scaled, teacher, scale)
        terms = {'cross_entropy': (weights.main, cross_entropy(logits, labels, axis))}
        if moments:
            features = feature_terms(moments, teacher.statistics(variables))
            terms['feature'] = weights.feature, feature_loss(features, weights.first_bn_multiplier)
        terms['total_variation'] = weights.total_variation, TOTAL_VARIATION[config.total_variation](smooth, axis)
        terms['l2'] = weights.l2, L2[config.l2](smooth, axis)
        if captured:
            terms['patch_similarity'] = weights.patch_similarity, patch_similarity(captured[0], axis)
        if weights.pixel_moments:
            terms['pixel_moments'] = weights.pixel_moments, pixel_moments(scaled, axis)
        if student_fn is not None:
            student_logits = student_fn(student_variables, augmented)
            terms['competition'] = weights.competition, competition(logits, student_logits, axis)
        loss = sum(weight * value for weight, value in terms.values() if weight)
        return loss, {name: value for name, (_, value) in terms.items()}

    return objective
