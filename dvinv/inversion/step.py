"""One iteration of the inversion as a pure function: parameterization, objective (eq. 1 to 5), update.

The parameterization (`make_decode`) says which parameters Adam updates, and how images are decoded from them. The objective
is the only place where the terms of the loss are weighted and summed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dvinv.config import InversionConfig, Stage
from dvinv.inversion.augmentation import augmentation_of, centred, scaled_down
from dvinv.inversion.losses import (
    L2,
    TOTAL_VARIATION,
    competition,
    cross_entropy,
    feature_loss,
    feature_terms,
    patch_similarity,
    pixel_moments,
)
from dvinv.inversion.teacher import Teacher
from dvinv.networks.classifier import Classifier, Images, Labels, Scalar

COMMON = 0.5, 0.25  # mean and std of the common space, for pixels in [0, 1]
NORMALISED = 0.02, 0.6  # least and largest std of networks that normalise pixels in [0, 1]; otherwise it is 1/255 or 1
SHARED = 0.85  # the share of the variance that the channels have in common


@functools.partial(jax.jit, static_argnums=(1, 2))
def initial_parameters(key: jax.Array, batch_size: int, image_shape) -> tuple[Images, jax.Array]:
    """Returns (parameters ~ N(0, 1), [B, H, W, C] float32, and the key from which the iterations draw)."""
    parameters_key, step_key = jax.random.split(key)
    return jax.random.normal(parameters_key, (batch_size, *image_shape), jnp.float32), step_key


def pixel_scale_of(kind: str, classifier: Classifier) -> Classifier:
    """Returns `classifier` with the mean and std that define the space of 'pixels' and of the image priors.

    Args:
      kind: 'network' or 'common', see `InversionConfig.pixel_scale`.
      classifier: The network; its mean and std are used with 'network' if it takes normalised pixels.
    """
    least, most = NORMALISED
    if kind == 'network' and all(least <= deviation <= most for deviation in classifier.std):
        return classifier
    mean, std = ((value,) * classifier.image_shape[-1] for value in COMMON)
    return dataclasses.replace(classifier, mean=mean, std=std)


def rescaled(x: Images, old: Classifier, new: Classifier) -> Images:
    """Converts images [B, H, W, C] from the normalisation of `old` to that of `new`; returns `x` itself if they agree."""
    if (old.mean, old.std) == (new.mean, new.std):
        return x
    (old_mean, old_std), (new_mean, new_std) = (np.asarray((c.mean, c.std), np.float64) for c in (old, new))
    scale, shift = old_std / new_std, (old_mean - new_mean) / new_std
    # Expanded, because users may let JAX refuse implicit rank promotion.
    return x * scale.astype(np.float32)[None, None, None] + shift.astype(np.float32)[None, None, None]


def make_decode(kind: str, contrast: float, classifier: Classifier, scale: Classifier | None = None) -> Callable:
    """Returns the function `parameters -> images`, both [B, H, W, C] float32, the images normalised.

    'pixels' (paper): the parameters are the images in normalised space, initialised with white noise. The normalised space
    is that of the network. If the network takes unnormalised pixels, for instance from 0 to 255, the initial noise would be
    nearly black in its space and the steps of Adam invisible. Therefore such networks, and with `pixel_scale = 'common'` all
    networks, use one common space (see `pixel_scale_of`).

    'fourier': the parameters are initialised with white noise as well. Decoding gives every frequency the amplitude that it
    has in natural images, 1/frequency (Field, 1987), mixes the colour channels so that they correlate as in natural images,
    and applies a sigmoid that keeps the pixels between black and white. Adam updates all parameters by steps of about the
    same size. On pixels this is a step of the same size for every frequency, which leads to fine patterns that only the
    teacher recognises. Here coarse shapes change a lot and fine ones little, and brightness and colour vary from image to
    image as in real ones. No data is needed for that. (Preconditioning by frequency is known from feature visualization:
    Olah, Mordvintsev and Schubert, 2017.)

    Args:
      kind: 'pixels' or 'fourier'.
      contrast: The contrast of the first images of 'fourier': the standard deviation of the input of the sigmoid.
      classifier: The network; defines the images' shape and the normalisation of the decoded images.
      scale: The classifier with the normalisation of the parameters of 'pixels', see `pixel_scale_of`; None for the same
        normalisation.
    """
    if kind == 'pixels':
        return lambda parameters: rescaled(parameters, scale or classifier, classifier)
    height, width, channels = classifier.image_shape
    # One constant array, because XLA folds products of constants differently for one device and for several.
    amplitudes = np.float32(contrast) * _amplitudes(height, width)[None, ..., None]
    colours = np.linalg.cholesky(SHARED * np.ones((channels, channels)) + (1 - SHARED) * np.eye(channels)).astype(np.float32)

    def decode(parameters):
        spectrum = jnp.fft.rfft2(parameters, axes=(1, 2)) * amplitudes
        picture = jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
        return classifier.normalise(jax.nn.sigmoid(jnp.einsum('bhwc,dc->bhwd', picture, colours, precision='highest')))

    return decode


def _amplitudes(height: int, width: int) -> np.ndarray:
    """Returns 1/frequency, float32 [H, W // 2 + 1], scaled so that white noise of variance 1 keeps its variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))  # frequency 0 as the lowest one
    amplitude /= np.sqrt(np.mean(amplitude**2))
    return amplitude[:, : width // 2 + 1].astype(np.float32)


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


class InversionState(struct.PyTreeNode):
    """The state that changes while one batch is inverted.

    Attributes:
      parameters: The parameters from which the images are decoded, [B, H, W, C] float32, always at full resolution; see
        `make_decode`.
      opt_state: The state of the current stage's optimizer (Adam).
      iteration: int32 scalar, counted over all stages of the batch.
      key: The batch's random key. Iteration t draws from fold_in(key, t).
    """

    # Arrays, or what JAX puts in their places in trees of the same structure.
    parameters: Any
    opt_state: Any
    iteration: Any
    key: Any


def make_step(teacher: Teacher, config: InversionConfig, stage: Stage, student_fn=None, axis: str | None = None):
    """Returns the pure step `(state, labels, variables, student_variables) -> (state, metrics)`.

    The gradient is taken with respect to the parameters only. The metrics are the loss and its unweighted terms for the
    images *before* the update.
    """
    objective = make_objective(teacher, config, stage, student_fn, axis)
    optimizer = stage.make_optimizer()
    scale = pixel_scale_of(config.pixel_scale, teacher)
    low, high = (bound[None, None, None] for bound in scale.valid_range)  # [1, 1, 1, C]: JAX may refuse to promote ranks
    decode = make_decode(config.parameterization, config.contrast, teacher, scale)

    def step(
        state: InversionState, labels: Labels, variables, student_variables
    ) -> tuple[InversionState, dict[str, Scalar]]:
        def loss_fn(parameters):
            key = jax.random.fold_in(state.key, state.iteration)
            return objective(decode(parameters), labels, variables, student_variables, key)

        (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.parameters)
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        parameters = optax.apply_updates(state.parameters, updates)
        if stage.clip and config.parameterization == 'pixels':
            parameters = jnp.clip(parameters, low, high)
        state = state.replace(parameters=parameters, opt_state=opt_state, iteration=state.iteration + 1)
        return state, {'loss': loss, **terms}

    return step


def make_chunk(step, iterations: int):
    """Returns a function that runs `iterations` steps in one dispatch and returns metrics [iterations]."""

    def chunk(state, labels, variables, student_variables):
        def body(state, _):
            return step(state, labels, variables, student_variables)

        if iterations == 1:
            state, metrics = body(state, None)
            return state, jax.tree.map(lambda value: value[None], metrics)
        return jax.lax.scan(body, state, length=iterations)

    return chunk
