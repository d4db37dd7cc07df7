"""The Teacher: all that the rest of dvinv knows of a network. Whatever has these fields is invertible."""

import dataclasses
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError
from dvinv.inversion.tap import LinenTap, running_statistics
from dvinv.networks.classifier import Classifier

# Names by which networks say "eval mode", and the value that says so.
EVAL_MODE = {'train': False, 'training': False, 'is_training': False, 'deterministic': True, 'use_running_average': True}


@dataclasses.dataclass(frozen=True)
class Teacher(Classifier):
    """A trained, frozen classifier whose BatchNorm inputs can be listened to."""

    tap: Callable  # (variables, x, axis=None) -> (logits, {layer: (input mean, input variance)}), layers in forward order
    features: Callable  # (variables, x) -> (logits, {layer: its BatchNorm inputs, one a call}), layers in forward order
    statistics: Callable  # (variables) -> {layer: (running mean, running variance)}


def from_linen(module, variables, *, image_shape, mean, std, call_kwargs: dict | None = None) -> Teacher:
    """A Teacher from any Flax Linen module, unmodified.

    Args:
      module: takes x [B, H, W, C] and returns logits [B, K].
      variables: {'params': ..., 'batch_stats': ...} of the trained network.
      image_shape: (H, W, C).
      mean, std: one number a channel, for pixels in [0, 1].
      call_kwargs: what puts the module in eval mode; found from its signature (`train`, `deterministic`, ...) when None.

    Raises:
      DvinvError: the network has no BatchNorm, or one out of reach of the tap, or does not take such images.
    """
    if not isinstance(module, nn.Module):
        raise DvinvError(
            f'from_linen takes a Flax Linen module, and a {type(module).__name__} is none; an NNX model goes to '
            'dvinv.from_nnx(model, ...).'
        )
    return _teacher(LinenTap, module, variables, *_pictures(image_shape, mean, std), call_kwargs)


def from_nnx(model, *, image_shape, mean, std, call_kwargs: dict | None = None) -> Teacher:
    """A Teacher from any Flax NNX model, unmodified: a clone of it is put in eval mode and frozen as it is now.

    Its `variables` are nested dicts as of a Linen module, {'params': ..., 'batch_stats': ...}; what is neither nnx.Param nor
    nnx.BatchStat nor a random key is in 'others'.

    Args:
      model: takes x [B, H, W, C] and returns logits [B, K].
      image_shape, mean, std: see `from_linen`.
      call_kwargs: what its `__call__` takes beside x in eval mode, over and above `model.eval()`; see `from_linen`.

    Raises:
      DvinvError: see `from_linen`.
    """
    # Here, for it imports NNX, which takes a third of a second that no other run should pay.
    from dvinv.inversion import nnx_tap

    if not isinstance(model, nnx_tap.nnx.Module):
        raise DvinvError(
            f'from_nnx takes a Flax NNX model, and a {type(model).__name__} is none; a Linen module goes to '
            'dvinv.from_linen(module, variables, ...).'
        )
    pictures = _pictures(image_shape, mean, std)
    model = nnx_tap.in_eval_mode(model)
    return _teacher(nnx_tap.NnxTap, model, nnx_tap.variables_of(model), *pictures, call_kwargs)


def _pictures(image_shape, mean, std):
    """(image_shape, mean, std) as tuples, if they go together."""
    image_shape = tuple(int(n) for n in image_shape)
    try:
        mean, std = (tuple(float(v) for v in np.ravel(values)) for values in (mean, std))
    except (TypeError, ValueError) as error:
        raise DvinvError(f'mean is {mean} and std is {std}; each must be one number a channel.') from error
    if len(image_shape) != 3 or not len(mean) == len(std) == image_shape[-1]:
        raise DvinvError(
            f'image_shape is {image_shape} with {len(mean)} means and {len(std)} standard deviations; '
            'image_shape must be (height, width, channels), with a mean and a deviation a channel.'
        )
    if min(std) <= 0:
        raise DvinvError(f'std is {std}; every standard deviation must be above 0.')
    return image_shape, mean, std


def _teacher(make_tap, network, variables, image_shape, mean, std, call_kwargs) -> Teacher:
    if call_kwargs is None:
        parameters = inspect.signature(network.__call__).parameters if callable(network) else {}
        call_kwargs = {name: value for name, value in EVAL_MODE.items() if name in parameters}
    example = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    tap = make_tap(network, variables, example, call_kwargs)
    num_classes = jax.eval_shape(tap.apply_fn, variables, example).shape[-1]
    return Teacher(tap.apply_fn, variables, image_shape, num_classes, mean, std, tap, tap.features, running_statistics)
