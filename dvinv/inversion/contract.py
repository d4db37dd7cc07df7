"""Checks of a network's outputs before it is inverted, made by running it on a few images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, in_a_line
from dvinv.graph.program import called_or_jaxs_own, program_of
from dvinv.networks.classifier import Classifier

IMAGES = 4
# The most by which an image's logits may change with the other images of the batch: the larger of these shares.
TOLERANCE = 0.005  # of the range of the logits over the images; moments of the batch cause far larger changes
ROUNDING = 2**-8  # of the size of the logits: the rounding of bfloat16


def check_answers(classifier: Classifier, name: str) -> None:
    """Validates that a network returns logits as a classifier must, for a few images of noise.

    Does nothing if the variables are shapes, as those of a network that is yet to be trained.

    Args:
      classifier: The network.
      name: The network's name in messages.

    Raises:
      DvinvError: The logits are NaN or infinite (one of a masked class may be -inf), have no finite, non-zero gradient with
        respect to the pixels, are probabilities, or depend on the other images or the size of the batch.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(classifier.variables)):
        return
    _check_single(classifier, name)
    run, images = _compiled(classifier, name), _images(classifier.image_shape)
    mixed = np.asarray(classifier.normalise(images), np.float32)
    logits, gradient = run(mixed)
    if np.isnan(logits).any() or (logits == np.inf).any() or not np.isfinite(logits).any(1).all():
        raise DvinvError(
            f'{name} returns logits that are NaN or infinite for ordinary images; look at its weights, mean and std (a '
            'logit may be -inf, for a masked class).'
        )
    if not np.isfinite(gradient).all():
        raise DvinvError(
            f'The gradient of the logits of {name} with respect to the pixels is not finite, so no image can be optimized; '
            'look for a square root or a norm at 0.'
        )
    if not gradient.any():
        raise DvinvError(
            f'The logits of {name} have no gradient with respect to the pixels: it is 0 everywhere, so no image can be '
            'moved towards its class. Leave out stop_gradient, argmax, rounding and comparisons on the way from the images '
            'to the logits (or give them a straight-through gradient), and look for weights that are all 0.'
        )
    _check_probabilities(classifier, name, logits, lambda: run(100 * mixed)[0])
    alone = run(np.broadcast_to(mixed[:1], mixed.shape))[0]  # at every place in the batch
    # Each class separately, since one may be masked by -1e9.
    finite = np.isfinite(logits).all(0)
    span, size = np.ptp(logits[:, finite], 0).max(initial=0), np.abs(logits[:, finite]).max(0)
    change = np.abs(logits[:1, finite] - alone[:, finite]).max(0)
    if not (change <= np.maximum(TOLERANCE * span, ROUNDING * size)).all():
        raise DvinvError(
            f'The logits of one image depend on the other images of the batch: for the same image alone and among others '
            f'{name} returns logits that differ by {change.max():.3g}, and from image to image they differ by {span:.3g}. '
            'In eval mode a normalization must use its running statistics, not the moments of the batch: '
            'use_running_average=True, say.'
        )


def _check_single(classifier: Classifier, name: str) -> None:
    """Validates by shapes that the network returns logits [1, K] for one image; some networks take only one batch size.

    Raises:
      DvinvError: It does not.
    """
    x = jax.ShapeDtypeStruct((1, *classifier.image_shape), np.float32)
    try:
        what = str(jax.eval_shape(classifier.apply_fn, classifier.variables, x).shape)
    except Exception as error:  # the user's network runs here, and Flax and JAX raise many kinds
        what = in_a_line(error)
    if what != str((1, classifier.num_classes)):
        raise DvinvError(
            f'{name} must return logits [B, K] for a batch of any size; for one image it gives {what} instead of '
            f'(1, {classifier.num_classes}). Is there a squeeze() of all axes, or a batch size in a reshape?'
        )


def _compiled(classifier: Classifier, name: str) -> Callable:
    """Returns `x -> (logits, gradient of their weighted sum)`, numpy float32, for batches of `IMAGES` images."""
    # A different weight for each logit, so that the gradients of one image's logits cannot cancel: the plain sum of the
    # outputs of a softmax has no gradient.
    weights = np.random.default_rng(1).normal(size=(IMAGES, classifier.num_classes)).astype(np.float32)

    def run(variables, x):
        logits, pull = jax.vjp(lambda x: classifier.apply_fn(variables, x), x)
        return logits.astype(jnp.float32), pull(weights.astype(logits.dtype))[0]

    # The program runs only a few times, so that optimising it is not worth the time.
    program = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})
    x = jax.ShapeDtypeStruct((IMAGES, *classifier.image_shape), np.float32)
    try:
        jax.eval_shape(program, classifier.variables, x)
    except Exception as error:  # the user's network is differentiated here, and Flax and JAX raise many kinds
        raise DvinvError(f'{name} cannot be differentiated with respect to its images: {in_a_line(error)}') from error
    return lambda x: jax.device_get(program(classifier.variables, x))


def _images(image_shape) -> np.ndarray:
    """Returns noise, float32 [IMAGES, H, W, C] in [0, 1], with a brightness and contrast that differ from image to image.

    The images therefore have different moments, so that a dependence on the moments of the batch shows.
    """
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, size=(IMAGES, *image_shape))
    brightness, contrast = (np.reshape(values, (IMAGES, 1, 1, 1)) for values in ((0.5, 0.2, 0.8, 0.4), (0.5, 0.3, 0.1, 0.8)))
    return (brightness + contrast * noise).astype(np.float32)


def _check_probabilities(classifier: Classifier, name: str, logits: np.ndarray, of_strong_images: Callable) -> None:
    """Validates that outputs are not those of a softmax (also in percent) or of sigmoids.

    Args:
      classifier: The network.
      name: Its name in messages.
      logits: Its outputs [B, K].
      of_strong_images: Returns the outputs for images with so strong a contrast that true logits would change a lot.

    Raises:
      DvinvError: They are.
    """
    for total, layer, way_out in (
        (1, 'softmax', 'take the log of it'),
        (100, 'softmax', 'take the log of it'),
        (0, 'sigmoid', 'take log(p / (1 - p)) of it'),
    ):
        if _are_shares(logits, total):
            strong = of_strong_images()
            # Sigmoids saturate at both ends, unless the network normalises the contrast away. Logits may also stay in
            # [0, 1], so that the last operation decides then.
            if _are_shares(strong, total) and (total or np.ptp(strong) > 0.5 or _ends_in_sigmoids(classifier)):
                what = f'not negative, and sum to {total}' if total else 'in [0, 1], however strong its contrast'
                raise DvinvError(
                    f'{name} returns probabilities: its answers for an image are {what}. Return the logits: leave out the '
                    f'{layer} at its end, or {way_out}.'
                )


def _ends_in_sigmoids(classifier: Classifier) -> bool:
    """Returns whether the last operation on the logits, apart from changes of their shape and dtype, is a sigmoid."""
    x = jax.ShapeDtypeStruct((IMAGES, *classifier.image_shape), np.float32)
    program = program_of(jax.make_jaxpr(classifier.apply_fn)(classifier.variables, x), called_or_jaxs_own)
    (value,), passed = program.outputs, ('convert_element_type', 'reshape', 'squeeze', 'slice', 'transpose', 'copy')
    for operation in reversed(program.operations):
        if value in operation.outputs:
            if operation.name not in passed:
                return operation.name == 'logistic'
            value = operation.inputs[0]
    return False


def _are_shares(answers: np.ndarray, total: float) -> bool:
    """Returns whether all rows of `answers` [B, K] are non-negative and sum to `total`, or are in [0, 1] if that is 0."""
    if not answers.min() >= 0:
        return False
    return bool(np.allclose(answers.sum(1), total, rtol=0.01, atol=0) if total else answers.max() <= 1)
