"""The Teacher: the interface through which dvinv uses a network. Any object with these fields can be inverted."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.inversion.contract import check_answers
from dvinv.inversion.linen_tap import LinenTap
from dvinv.inversion.modules import LinenModule, eval_arguments, trainable, unboxed
from dvinv.inversion.moments import moments_of
from dvinv.inversion.statistics import running_statistics
from dvinv.inversion.tap import Tap
from dvinv.networks.classifier import MOMENTS, Classifier, check_finite, check_normalisation, flatten, unflatten

FAR = 20  # the largest distance of normalised images from grey, in multiples of the distance between black and white


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
        finite, or are quantized; its outputs are not those of a classifier (see `contract.check_answers`); or the moments
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
    from dvinv.inversion import nnx_tap

    if not isinstance(model, nnx_tap.nnx.Module):
        raise DvinvError(
            f'from_nnx takes a Flax NNX model, and a {type(model).__name__} is none; a Linen module goes to '
            'dvinv.from_linen(module, variables, ...).'
        )
    nnx_tap.refuse_bridged(model)
    pictures, name = _pictures(image_shape, mean, std), type(model).__name__
    model, module = nnx_tap.in_eval_mode(model), trainable(model, call_kwargs, pick=logits)
    variables = _on_host(nnx_tap.variables_of(model), name)
    call_kwargs = eval_arguments(model) if call_kwargs is None else call_kwargs
    teacher = _tapped(nnx_tap.NnxTap(model, variables, pictures.example, call_kwargs, logits), variables, pictures, module)
    check_answers(teacher, name)
    return teacher if moments is None else teacher.with_moments(moments)


def teacher_of(module, variables, *, image_shape, mean, std) -> Teacher:
    """Returns a Teacher made from a user's network, as returned by `modules.trainable`, and variables (arrays or shapes).

    Raises:
      DvinvError: See `from_linen`.
    """
    pictures, variables = _pictures(image_shape, mean, std), _on_host(variables, module.label)
    if isinstance(module, LinenModule):
        tap: Tap = LinenTap(module, variables, pictures.example, {'train': False})
    else:
        from dvinv.inversion import nnx_tap

        model = nnx_tap.in_eval_mode(module.model)
        tap = nnx_tap.NnxTap(model, variables, pictures.example, module.arguments, module.pick)
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
    if not (np.abs(images - (low + high) / 2) <= FAR * (high - low)).all():
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
