"""What the tap captures when a network calls a layer: moments of its input, or its input or output; for Linen and NNX alike.

The moments of a layer's input are computed in one pass, shifted by the frozen running mean mu,

    d = E[x - mu],   s = E[(x - mu)^2],   mean = mu + d,   variance = s - d^2   (biased, float32)

which is as exact near the optimum as two passes (E[x^2] - E[x]^2 suffers from cancellation). (d, s) are means over the
images, so that those of a batch that is split over devices are the mean of (d, s) over the devices.

A place is the input of a layer, named by the layer's path ('blocks_0/norm1'), or its output ('blocks_0:output').
"""

import abc
import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dvinv.inversion.losses import EPSILON, pmean
from dvinv.inversion.statistics import VariablePath
from dvinv.networks.classifier import AnyArray, LayerInput, Moment, join_names
from dvinv.runtime.errors import DvinvError

OUTPUT = ':output'  # follows the path of a layer and denotes the layer's output instead of its input
SOWN, ARRAY = 'dvinv_sown', 'dvinv_array'  # names of the sown variables: measured values (moments, say), and whole arrays


@dataclasses.dataclass(frozen=True)
class CaptureSpec:
    """The specification of what is captured in a forward pass; hashable, for the caches of traced functions.

    Attributes:
      measure: (layer, running mean or None, x, mask) -> the value that is sown for each place in `means`: `entire_input` or
        `shifted_moments`.
      means: A pair (place, path of its running mean) for each place; the path is () if no mean is needed.
      arrays: The places at which the array itself is captured as well.
    """

    measure: Callable
    means: tuple[tuple[str, VariablePath], ...]
    arrays: tuple[str, ...] = ()

    @functools.cached_property
    def measured(self) -> dict[str, VariablePath]:
        """{place: path of its running mean, or ()}."""
        return dict(self.means)

    @functools.cached_property
    def places(self) -> frozenset[str]:
        """All places, those in `means` and those in `arrays`."""
        return frozenset({*self.measured, *self.arrays})

    def names(self, layer: str) -> bool:
        """Returns whether the input or the output of the layer at this path is captured."""
        return not self.places.isdisjoint((layer, layer + OUTPUT))


class CallRecorder(abc.ABC):
    """Calls the layers of a network and sows what a `CaptureSpec` specifies; a subclass implements `sow` and `running_mean`.

    Attributes:
      spec: What is captured.
      calls: Counts the calls of each place while JAX traces; its keys are in the order of the first calls.
    """

    def __init__(self, spec: CaptureSpec, calls: Counter[str] | None = None):
        """Takes the attributes; `calls` may be a counter of the caller, which is filled."""
        self.spec = spec
        self.restart(Counter() if calls is None else calls)

    def restart(self, calls: Counter[str]) -> None:
        """Starts another forward pass, in which calls are counted in `calls`."""
        self.calls = calls
        self._active: set[str] = set()  # the layers that are being called

    @abc.abstractmethod
    def sow(self, module, name: str, value) -> None:
        """Sows a value into a variable of the layer `module`."""

    @abc.abstractmethod
    def running_mean(self, module, layer: str) -> Any:
        """Returns the running mean of the layer at the path `layer`, or None if no mean is needed."""

    def owns_statistics(self, module, layer: str) -> bool:
        """Returns whether `module` itself owns the running mean of the layer, if a mean is needed."""
        return True

    def call(self, module, layer: str, call: Callable, args: tuple, kwargs: dict):
        """Returns `call(*args, **kwargs)`, the call of a layer, and sows its input and output if they are specified.

        If the class of the layer calls super().__call__, several calls are nested. The innermost one captures the input,
        because it is the normalization itself, and the outermost one captures the output.
        """
        calls_before, nested = self.calls[layer], layer in self._active
        owner = self.owns_statistics(module, layer)
        self._active.add(layer)
        try:
            result = call(*args, **kwargs)
        finally:
            if not nested:
                self._active.remove(layer)
        innermost = self.calls[layer] == calls_before
        if layer in self.spec.places and owner and innermost:
            mean = self.running_mean(module, layer)
            mask = mask_of(module, args, kwargs) if mean is not None or _has_batchnorm_fields(module) else None
            self._capture(module, layer, mean, input_of(args, kwargs), mask)
        if layer + OUTPUT in self.spec.places and not nested:
            self._capture(module, layer + OUTPUT, None, output_of(result), None)
        return result

    def _capture(self, module, place: str, mean, x, mask) -> None:
        if place in self.spec.measured:
            self.sow(module, sown_name(place, SOWN), self.spec.measure(module, mean, x, mask))
        if place in self.spec.arrays:
            self.sow(module, sown_name(place, ARRAY), x)
        self.calls[place] += 1


def sown_name(place: str, name: str) -> str:
    """Returns the name of the variable that is sown in the layer of `place`."""
    return f'{name}_output' if place.endswith(OUTPUT) else name


def by_place(flat: Mapping[tuple, Any], name: str = SOWN) -> dict[str, tuple]:
    """Returns {place: the sown value of each of its calls} from {path: value}, for the variables that `sown_name` names."""
    ends = {sown_name('', name): '', sown_name(OUTPUT, name): OUTPUT}
    return {join_names(path[:-1]) + ends[path[-1]]: values for path, values in flat.items() if path[-1] in ends}


def input_of(args, kwargs) -> Any:
    """Returns the array that a layer called with these arguments normalises, or None if there is none."""
    return args[0] if args else kwargs['x'] if 'x' in kwargs else next(iter(kwargs.values()), None)


def mask_of(layer, args, kwargs) -> jax.Array | None:
    """Returns the argument `mask` of a call of `layer`, which selects the positions for its moments, as in Flax's BatchNorm.

    Raises:
      DvinvError: The call has another array as an argument, which may change the moments; the message names it. Arrays with
        one number per channel, such as scales and shifts, are assumed to be applied after the normalisation.
    """
    names = list(inspect.signature(type(layer).__call__).parameters)[1:]
    given = {names[i] if i < len(names) else f'number {i + 1}': value for i, value in enumerate(args)} | kwargs
    x = input_of(args, kwargs)
    for name, value in given.items():
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(value) if value is not x]
        if name != 'mask' and any(shape and not _is_of_channels(shape, x.shape) for shape in shapes):
            raise DvinvError(
                f'A {type(layer).__name__}, a layer with running statistics, is called with the array {name}, and how it '
                'changes the moments of the layer is not known: only x and mask (as of nn.BatchNorm) are. Apply it outside '
                'of the layer.'
            )
    return given.get('mask')


def _is_of_channels(shape: tuple[int, ...], x: tuple[int, ...]) -> bool:
    """Returns whether an array of this shape cannot select positions of `x` [B, ..., C], for instance [C] or [B, 1, ..., C].

    An array [B, D] cannot either, unless x is [B, N, C] and D is not C: it may then be a mask of the N positions.
    """
    if len(shape) == 1 or len(x) < 3:
        return shape[-1] == x[-1] and set(shape[:-1]) <= {1}
    if len(shape) == 2 and shape[-1] != x[-1] and len(x) == 3:
        return False
    return len(shape) in (2, len(x)) and shape[0] in (1, x[0]) and set(shape[1:-1]) <= {1} and shape[-1] > 1


def output_of(returned) -> Any:
    """Returns the first floating-point array with at least two axes among the results of a layer, or None."""
    leaves = (leaf for leaf in jax.tree.leaves(returned) if getattr(leaf, 'ndim', 0) > 1)
    return next((leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), None)


def entire_input(layer, running_mean: Moment | None, x: LayerInput, mask: AnyArray | None) -> LayerInput:
    """Returns the input x itself: the `measure` of a `CaptureSpec` that captures features."""
    return x


def shifted_moments(
    layer, running_mean: Float[AnyArray, '...'] | None, x: LayerInput, mask: AnyArray | None
) -> tuple[Float[jax.Array, '*S'], ...]:
    """Computes moments of the input x of `layer`: the `measure` of a `CaptureSpec` that captures moments.

    Returns:
      (d, s) as defined in the module's docstring, float32, over all axes except the layer's feature axes (`axis`). With a
      mask they are taken over the positions where it is true, and the result is (p d, p s, p), where p is the share of these
      positions. Without a running mean it is (p mean, p variance, p), computed in two passes.
    """
    axes = layer.axis if (running_mean is not None and hasattr(layer, 'axis')) or _has_batchnorm_fields(layer) else -1
    feature_axes = {a % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}
    reduced = tuple(a for a in range(x.ndim) if a not in feature_axes)
    if running_mean is None:
        mask = jnp.broadcast_to(True if mask is None else jnp.asarray(mask, bool), x.shape)
        share, x = mask.mean(reduced, dtype=jnp.float32), x.astype(jnp.float32)
        mean = jnp.where(mask, x, 0).mean(reduced)
        centre = jnp.expand_dims(mean / jnp.maximum(share, EPSILON), reduced)
        return mean, jnp.where(mask, jnp.square(x - centre), 0).mean(reduced), share
    shifted = jnp.asarray(x, jnp.float32) - jnp.expand_dims(running_mean.astype(jnp.float32), reduced)
    if mask is None:
        return shifted.mean(reduced), jnp.square(shifted).mean(reduced)
    mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
    shifted = jnp.where(mask, shifted, 0)
    return shifted.mean(reduced), jnp.square(shifted).mean(reduced), mask.mean(reduced, dtype=jnp.float32)


def moments_of_calls(
    running_mean: Float[AnyArray, '...'], calls: Sequence[tuple]
) -> tuple[Float[jax.Array, '...'], Float[jax.Array, '...']]:
    """Computes (mean, variance) of a layer from the (d, s) of its calls, or (p d, p s, p) of calls with a mask.

    If a layer is called more than once in a forward pass, the result is the mean over its calls, because its running
    statistics are means over its calls as well.
    """
    calls = [tuple(x / jnp.maximum(p[0], EPSILON) for x in (d, s)) if p else (d, s) for d, s, *p in calls]
    mean = sum(running_mean.astype(jnp.float32) + d for d, _ in calls) / len(calls)
    variance = sum(s - jnp.square(d) for d, s in calls) / len(calls)
    return mean, variance


def joint_moments_of_calls(calls: Sequence[tuple], axis: str | None) -> tuple[Moment, Moment]:
    """Computes (mean, variance) over all shards, the mean over calls, from `shifted_moments` without a running mean."""
    means, variances = [], []
    for mean, variance, share in calls:
        total = jnp.maximum(pmean(share, axis), EPSILON)
        joint = pmean(mean, axis) / total
        offset = jnp.square(mean / jnp.maximum(share, EPSILON) - joint)  # squared distance of this shard's mean
        means.append(joint)
        variances.append(pmean(variance + share * offset, axis) / total)
    return sum(means) / len(means), sum(variances) / len(variances)


def _has_batchnorm_fields(layer) -> bool:
    """Returns whether a layer has the fields of Flax's BatchNorm, which determine the axes and positions of its moments."""
    return hasattr(layer, 'use_running_average') and hasattr(layer, 'axis')
