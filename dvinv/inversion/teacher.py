"""The Teacher: the interface through which dvinv uses a network. Any object with these fields can be inverted.

`check_answers` validates that a network answers as a classifier must.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.graph.program import called_or_jaxs_own, program_of
from dvinv.inversion.linen_modules import LinenModule, LinenTap, eval_arguments, trainable, unboxed
from dvinv.inversion.statistics import moments_of, running_statistics
from dvinv.inversion.tap import Tap
from dvinv.networks.classifier import MOMENTS, Classifier, check_finite, check_normalisation, flatten, unflatten
from dvinv.runtime.errors import DvinvError, in_a_line, listed

NOISE_IMAGES = 4
# The most by which an image's logits may change with the other images of the batch: the larger of these shares.
TOLERANCE = 0.005  # of the range of the logits over the images; moments of the batch cause far larger changes
ROUNDING = 2**-8  # of the size of the logits: the rounding of bfloat16
# The largest distance of normalised images from grey, in multiples of the distance between black and white.
FARTHEST_FROM_GREY = 20


@dataclasses.dataclass(frozen=True, repr=False)
class Teacher(Classifier):
    """A trained, frozen classifier with a tap on its BatchNorm layers, or on the layers that have recorded moments."""

    tap: Tap  # (variables, x, axis=None) -> (logits, {layer: (input mean, input variance)}), layers in forward order
    features: Callable  # (variables, x) -> (logits, {layer: its BatchNorm inputs, one per call}), layers in forward order
    statistics: Callable  # (variables) -> {layer: (running mean, running variance)}, or recorded moments
    module: Any = None  # has `init` and `apply(..., train=...)` like a Linen module; pruning and other tasks train it

    def with_moments(self, moments) -> 'Teacher':
        """Returns the same network with recorded moments in place of its running statistics, if it has any.

        Args:
          moments: The result of `record_moments`, or the path of a file to which it was saved.

        Raises:
          DvinvError: The moments were recorded from another network, or the file is missing or damaged.
        """
        (recorded, source), bare = moments_of(moments), self.without_moments()
        recorded.validate(bare.digest(), source)
        return bare.with_variables(recorded.variables())

    def without_moments(self) -> 'Teacher':
        """Returns the same network as it was before `with_moments`."""
        if MOMENTS not in self.variables:
            return self
        return dataclasses.replace(self, variables=super().without_moments().variables).with_variables({})

    def with_variables(self, more: dict) -> 'Teacher':
        """Returns the same network with the collections `more` added to its variables; they may contain statistics."""
        variables = {**self.variables, **more}
        tap = self.tap.for_variables(variables)
        return dataclasses.replace(self, variables=variables, tap=tap, features=tap.features)


def from_linen(
    module,
    variables,
    *,
    image_shape,
    mean=None,
    std=None,
    call_kwargs: dict | None = None,
    logits: Callable | None = None,
    moments=None,
) -> Teacher:
    """Returns a Teacher made from any Flax Linen module, unmodified.

    Args:
      module: A module that takes x [B, H, W, C] and returns logits [B, K], or a value from which `logits` extracts them.
      variables: {'params': ..., 'batch_stats': ...} of the trained network. They are copied to the host.
      image_shape: (H, W, C).
      mean, std: One number per channel, or one for all channels, for pixels in [0, 1].
      call_kwargs: The arguments that put the module in eval mode. None finds them in the signature of its `__call__`, by
        names such as `train` and `deterministic`.
      logits: A function from what the module returns to the logits, if it returns more than these: for a tuple,
        `lambda out: out[0]`.
      moments: Recorded moments of layers, for a network without BatchNorm: the result of `record_moments`, or the path of
        its file.

    Raises:
      DvinvError: The network has a BatchNorm that the tap cannot reach, or does not take such images; its weights are not
        finite, or are quantized; its outputs are not those of a classifier (see `check_answers`); or the moments
        were recorded from another network.
    """
    pictures = {'image_shape': image_shape, 'mean': mean, 'std': std}
    teacher = trusted_linen(module, variables, **pictures, call_kwargs=call_kwargs, logits=logits)
    check_answers(teacher, type(module).__name__)
    teacher = dataclasses.replace(teacher, module=trainable(module, call_kwargs, pick=logits))
    return teacher if moments is None else teacher.with_moments(moments)


def trusted_linen(
    module, variables, *, image_shape, mean, std, call_kwargs: dict | None = None, logits: Callable | None = None
) -> Teacher:
    """Returns a Teacher as `from_linen` does, but does not run the module: dvinv's own networks return logits."""
    if isinstance(module, type):
        raise DvinvError(
            f'from_linen takes a module, and {module.__name__} is a class; make one of it: {module.__name__}(...).'
        )
    if not isinstance(module, nn.Module):
        raise DvinvError(
            f'from_linen takes a Flax Linen module, and a {type(module).__name__} is none; an NNX model goes to '
            'dvinv.from_nnx(model, ...).'
        )
    if type(module).__module__.startswith('flax.nnx.bridge'):
        raise DvinvError(
            f'from_linen takes a Flax Linen module, and this is an NNX model in a {type(module).__name__}, where its layers '
            'cannot be captured; pass the NNX model itself, with its weights, to dvinv.from_nnx(model, ...).'
        )
    pictures, variables = _pictures(image_shape, mean, std), _on_host(variables, type(module).__name__)
    call_kwargs = eval_arguments(module) if call_kwargs is None else call_kwargs
    return _tapped(LinenTap(module, variables, pictures.example, call_kwargs, logits), variables, pictures, module)


def from_nnx(
    model,
    *,
    image_shape,
    mean=None,
    std=None,
    call_kwargs: dict | None = None,
    logits: Callable | None = None,
    moments=None,
) -> Teacher:
    """Returns a Teacher made from any Flax NNX model, unmodified: a clone of it is put in eval mode and frozen as it is now.

    The Teacher's `variables` are nested dicts like those of a Linen module, {'params': ..., 'batch_stats': ...}. Variables
    that are neither nnx.Param nor nnx.BatchStat nor state of a random stream are in 'others'.

    Args:
      model: A model that takes x [B, H, W, C] and returns logits [B, K], or a value from which `logits` extracts them.
      image_shape, mean, std: See `from_linen`.
      call_kwargs: The arguments of its `__call__` in eval mode besides x, in addition to `model.eval()`; see `from_linen`.
      logits, moments: See `from_linen`.

    Raises:
      DvinvError: See `from_linen`.
    """
    # Imported here because it imports NNX, which takes a third of a second that no other run should pay.
    from dvinv.inversion import nnx_models

    if not isinstance(model, nnx_models.nnx.Module):
        raise DvinvError(
            f'from_nnx takes a Flax NNX model, and a {type(model).__name__} is none; a Linen module goes to '
            'dvinv.from_linen(module, variables, ...).'
        )
    nnx_models.refuse_bridged(model)
    pictures, name = _pictures(image_shape, mean, std), type(model).__name__
    model, module = nnx_models.in_eval_mode(model), trainable(model, call_kwargs, pick=logits)
    variables = _on_host(nnx_models.variables_of(model), name)
    call_kwargs = eval_arguments(model) if call_kwargs is None else call_kwargs
    teacher = _tapped(
        nnx_models.NnxTap(model, variables, pictures.example, call_kwargs, logits), variables, pictures, module
    )
    check_answers(teacher, name)
    return teacher if moments is None else teacher.with_moments(moments)


def teacher_of(module, variables, *, image_shape, mean, std) -> Teacher:
    """Returns a Teacher made from a user's network, as returned by `trainable`, and variables (arrays or shapes).

    Raises:
      DvinvError: See `from_linen`.
    """
    pictures, variables = _pictures(image_shape, mean, std), _on_host(variables, module.label)
    if isinstance(module, LinenModule):
        tap: Tap = LinenTap(module, variables, pictures.example, {'train': False})
    else:
        from dvinv.inversion import nnx_models

        model = nnx_models.in_eval_mode(module.model)
        tap = nnx_models.NnxTap(model, variables, pictures.example, module.arguments, module.pick)
    teacher = _tapped(tap, variables, pictures, module)
    check_answers(teacher, module.label)
    return teacher


class _Pictures(NamedTuple):
    """The images that a network takes: (H, W, C), and one number per channel to normalise pixels in [0, 1]."""

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a batch of two."""
        return jax.ShapeDtypeStruct((2, *self.image_shape), jnp.float32)


def _pictures(image_shape, mean, std) -> _Pictures:
    """Returns the arguments of `from_linen` as tuples.

    Raises:
      DvinvError: They are missing, malformed or do not have the same number of channels.
    """
    try:
        image_shape = tuple(int(n) for n in image_shape)
    except (TypeError, ValueError) as error:
        raise DvinvError(f'image_shape is {image_shape!r}; it must be (height, width, channels).') from error
    if mean is None or std is None:
        missing = ' and '.join(name for name, values in (('mean', mean), ('std', std)) if values is None)
        raise DvinvError(
            f'{missing} must be given, one number per channel, for pixels in [0, 1]: the network takes (pixels - mean) / '
            'std. A network that takes the pixels as they are has mean=0, std=1.'
        )
    channels = image_shape[-1] if image_shape else 1
    try:
        mean, std = (
            tuple(float(v) for v in (np.full(channels, values) if np.ndim(values) == 0 else np.ravel(values)))
            for values in (mean, std)
        )
    except (TypeError, ValueError) as error:
        raise DvinvError(f'mean is {mean} and std is {std}; each must be one number per channel.') from error
    if len(image_shape) != 3 or min(image_shape) < 1 or not len(mean) == len(std) == image_shape[-1]:
        raise DvinvError(
            f'image_shape is {image_shape} with {len(mean)} means and {len(std)} standard deviations; '
            'image_shape must be (height, width, channels), with one mean and one deviation per channel.'
        )
    check_normalisation(mean, std)
    return _Pictures(image_shape, mean, std)


def _on_host(variables, name: str) -> dict:
    """Returns the variables as nested dicts of numpy arrays: copied, gathered if sharded, and without Flax's boxes.

    Shapes and random keys stay as they are.

    Raises:
      DvinvError: They are not a dict of arrays, their numbers are not finite, or a parameter is an integer array.
    """
    if not isinstance(variables, Mapping):
        raise DvinvError(
            f"The variables of {name} are a {type(variables).__name__}; they must be {{'params': ..., 'batch_stats': ...}}, "
            'as module.init returns them.'
        )

    if not {'params', 'batch_stats'} & variables.keys():
        raise DvinvError(
            f"The variables of {name} have {listed([*map(str, variables)], 4) or 'nothing'}; they must be {{'params': ..., "
            "'batch_stats': ...}, as module.init returns them: params alone do not have the running statistics."
        )

    def copied(path: str, leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if isinstance(leaf, jax.Array):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return leaf
            if not leaf.is_fully_addressable:
                raise DvinvError(f'{path} of {name} lies in part on devices of other processes; gather it first.')
        array = np.array(leaf)  # a copy, because the caller's array may change or be donated
        if array.dtype.kind in 'OSU':
            raise DvinvError(f'{path} of {name} is a {type(leaf).__name__}; every variable must be an array of numbers.')
        return array

    # A leaf may be a tuple of values that the network sowed in `init`.
    flat = {
        path: jax.tree.map(lambda value, path=path: copied(path, value), leaf)
        for path, leaf in flatten(unboxed(variables)).items()
        if leaf is not None
    }
    parameters = {path: leaf for path, leaf in flat.items() if path.startswith('params/')}
    for path, leaf in parameters.items():
        if isinstance(leaf, list | tuple):
            raise DvinvError(f'{path} of {name} is a {type(leaf).__name__}; every variable must be an array of numbers.')
    integers = [f'{path} ({leaf.dtype})' for path, leaf in parameters.items() if jnp.issubdtype(leaf.dtype, jnp.integer)]
    if integers:
        raise DvinvError(
            f'{name} has integer parameters, as quantized networks have: {listed(integers)}. Images are optimized through '
            'the trained network in floating point: pass its dequantized weights.'
        )
    check_finite(unflatten(flat), name)
    return {'params': {}} | unflatten(flat)


def network_input(teacher: Teacher, images: np.ndarray):
    """Returns pixels uint8, or normalised floats, [B, H, W, C] as the float32 input of the network.

    Raises:
      DvinvError: Floats are far outside of the range from black to white, as unnormalised pixels from 0 to 255 are.
    """
    if images.dtype == np.uint8:
        return teacher.normalise(images)
    low, high = teacher.valid_range
    if not (np.abs(images - (low + high) / 2) <= FARTHEST_FROM_GREY * (high - low)).all():
        raise DvinvError(
            f'The images are {images.dtype} with values from {images.min():.4g} to {images.max():.4g}, so they must be '
            f'normalised: black is {low.min():.4g} for this network, white {high.max():.4g}. Pixels from 0 to 255 must be '
            'uint8.'
        )
    return images.astype(np.float32)


def _tapped(tap: Tap, variables: dict, pictures: _Pictures, module) -> Teacher:
    """Returns the Teacher of a network with this tap; `module` is what trains it."""
    shape, mean, std = pictures
    return Teacher(tap.apply_fn, variables, shape, tap.num_classes, mean, std, tap, tap.features, running_statistics, module)


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
    """Returns `x -> (logits, gradient of their weighted sum)`, numpy float32, for batches of `NOISE_IMAGES` images."""
    # A different weight for each logit, so that the gradients of one image's logits cannot cancel: the plain sum of the
    # outputs of a softmax has no gradient.
    weights = np.random.default_rng(1).normal(size=(NOISE_IMAGES, classifier.num_classes)).astype(np.float32)

    def run(variables, x):
        logits, pull = jax.vjp(lambda x: classifier.apply_fn(variables, x), x)
        return logits.astype(jnp.float32), pull(weights.astype(logits.dtype))[0]

    # The program runs only a few times, so that optimising it is not worth the time.
    program = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})
    x = jax.ShapeDtypeStruct((NOISE_IMAGES, *classifier.image_shape), np.float32)
    try:
        jax.eval_shape(program, classifier.variables, x)
    except Exception as error:  # the user's network is differentiated here, and Flax and JAX raise many kinds
        raise DvinvError(f'{name} cannot be differentiated with respect to its images: {in_a_line(error)}') from error
    return lambda x: jax.device_get(program(classifier.variables, x))


def _images(image_shape) -> np.ndarray:
    """Returns noise, float32 [NOISE_IMAGES, H, W, C] in [0, 1], with different brightness and contrast.

    The images therefore have different moments, so that a dependence on the moments of the batch shows.
    """
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, size=(NOISE_IMAGES, *image_shape))
    brightness, contrast = (
        np.reshape(values, (NOISE_IMAGES, 1, 1, 1)) for values in ((0.5, 0.2, 0.8, 0.4), (0.5, 0.3, 0.1, 0.8))
    )
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
    x = jax.ShapeDtypeStruct((NOISE_IMAGES, *classifier.image_shape), np.float32)
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
