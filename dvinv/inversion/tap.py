"""The tap: captures moments of the BatchNorm inputs of an unmodified Flax network, or of inputs and outputs of any layers.

Any layer that owns running statistics (`batch_stats/mean` and `batch_stats/var`, or variables with similar names, such as
`running_mean` and `running_var`, in any collection) counts as a BatchNorm, whatever its class. While the network runs,
the moments of the input of such a layer are sown. They are computed in one pass, shifted by the frozen running mean mu,

    d = E[x - mu],   s = E[(x - mu)^2],   mean = mu + d,   variance = s - d^2   (biased, float32)

which is as exact near the optimum as two passes (E[x^2] - E[x]^2 suffers from cancellation). (d, s) are means over the
images, so that those of a batch that is split over devices are the mean of (d, s) over the devices. The same mechanism can
capture the inputs themselves, which are the network's features. `LinenTap` is here, `NnxTap` in nnx_tap.py.

If moments were recorded (the collection `MOMENTS` of the variables, see moments.py), they replace all running statistics.
A place is the input of a layer, named by the layer's path ('blocks_0/norm1'), or its output ('blocks_0:output').
"""

import abc
import contextlib
import copy
import dataclasses
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, in_a_line, listed, say
from dvinv.graph.program import called_or_jaxs_own, program_of
from dvinv.inversion.losses import EPSILON, pmean
from dvinv.networks.classifier import MOMENTS, join_names, name_of

PRIVATE = 'dvinv_tap'  # the collection into which values are sown
STATISTICS = 'batch_stats'  # Flax's collection of running statistics; the second choice for sowing
SOWN, KEPT = 'dvinv_heard', 'dvinv_kept'  # names of the sown variables: moments (or inputs), and captured arrays
OUTPUT = ':output'  # follows the path of a layer and denotes the layer's output instead of its input

# Words by which the names of a running mean and a running variance differ, and a pattern that matches either name.
NAMES = ('mean', 'var'), ('mean', 'variance'), ('Mean', 'Var'), ('Mean', 'Variance')
STATISTIC = re.compile(r'(?:^|[\W\d_])(?:mean|var|variance)(?:$|[\W\d_])|Mean|Var(?:iance)?$')

LISTENING = jax.make_user_context()  # what is captured; nn.jit must not reuse a trace that captured something else

# Symptoms of a network in training mode, and arguments that may put it in eval mode.
LEARNS = 'wants to update its running statistics', {'train': False}
DRAWS = 'asks for random numbers (dropout?)', {'deterministic': True}


def find_statistics(variables) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Finds the running mean and variance of every layer that has them.

    A mean and a variance belong together if they are variables of one module, have the same shape, and their names differ
    only by the words in `NAMES`. If a module has several pairs, the pair with Flax's own collection and names is taken, or
    else the first one. Outside of Flax's collection, a module that contains other modules does not count as a normalization
    layer: it may be the network itself, with the mean and variance of pixels. If there are recorded moments, only these are
    returned.

    Returns:
      {layer: (path of its running mean, path of its running variance)}. Layers are module paths such as 'stage1/bn0'; the
      path of a variable is (collection, names of modules, name of the variable).
    """
    flat, found = _non_intermediates(variables), {}
    if recorded := [path[1] for path in flat if path[0] == MOMENTS and path[-1] == 'mean']:
        return {place: ((MOMENTS, place, 'mean'), (MOMENTS, place, 'var')) for place in recorded}
    outer = {path[1:end] for path in flat for end in range(1, len(path) - 1)}
    for path, leaf in sorted(flat.items(), key=lambda item: (item[0][0] != STATISTICS, item[0][-1] != 'mean')):
        for mean, variance in NAMES:
            mate = (*path[:-1], path[-1].replace(mean, variance))
            inner = path[0] == STATISTICS or path[1:-1] not in outer
            if inner and mate != path and np.shape(flat.get(mate)) == np.shape(leaf) != ():
                found.setdefault(join_names(path[1:-1]), (path, mate))
                break
    return found


def running_means(variables) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns (layer, path of its running mean) of each layer, for `Ears`."""
    return tuple((layer, mean) for layer, (mean, _) in find_statistics(variables).items())


def unpaired_statistics(variables) -> list[str]:
    """Returns the paths of variables that are named like running statistics but are in no pair of `find_statistics`.

    Constants of the network itself, outside of all its modules, are left out: they are the mean and variance of pixels.
    """
    paired = {path for pair in find_statistics(variables).values() for path in pair}
    return [
        join_names(path)
        for path in _non_intermediates(variables)
        if path not in paired
        and path[0] not in ('params', MOMENTS)
        and STATISTIC.search(path[-1])
        and (path[0] == STATISTICS or len(path) > 2)
    ]


def _non_intermediates(variables) -> dict:
    """Returns {path: leaf} of all variables except intermediates, with those in `batch_stats` first."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables))
    kept = [item for item in flat.items() if item[0][0] not in ('intermediates', PRIVATE)]
    return dict(sorted(kept, key=lambda item: item[0][0] != STATISTICS))


def running_statistics(variables) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns {layer: (running mean, running variance)}, each [..., C]; see `find_statistics`."""
    flat = _non_intermediates(variables)
    return {layer: (flat[mean], flat[variance]) for layer, (mean, variance) in find_statistics(variables).items()}


def input_of(args, kwargs) -> jax.Array:
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


def answer_of(returned) -> jax.Array | None:
    """Returns the first floating-point array with at least two axes among the results of a layer, or None."""
    leaves = (leaf for leaf in jax.tree.leaves(returned) if getattr(leaf, 'ndim', 0) > 1)
    return next((leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), None)


def whole_input(layer, running_mean: jax.Array | None, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the input x itself: the function `hear` of `Ears` that captures inputs."""
    return x


def shifted_moments(layer, running_mean: jax.Array | None, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
    """Computes moments of the input x of `layer`: the function `hear` of `Ears` that captures moments.

    Returns:
      (d, s) as defined in the module's docstring, float32, over all axes except the layer's feature axes (`axis`). With a
      mask they are taken over the positions where it is true, and the result is (p d, p s, p), where p is the share of these
      positions. Without a running mean it is (p mean, p variance, p), computed in two passes.
    """
    axes = layer.axis if (running_mean is not None and hasattr(layer, 'axis')) or normalises_batches(layer) else -1
    features = {a % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    if running_mean is None:
        mask = jnp.broadcast_to(True if mask is None else jnp.asarray(mask, bool), x.shape)
        share, x = mask.mean(reduced, dtype=jnp.float32), x.astype(jnp.float32)
        mean = jnp.where(mask, x, 0).mean(reduced)
        centre = jnp.expand_dims(mean / jnp.maximum(share, EPSILON), reduced)
        return mean, jnp.where(mask, jnp.square(x - centre), 0).mean(reduced), share
    shifted = x.astype(jnp.float32) - jnp.expand_dims(running_mean.astype(jnp.float32), reduced)
    if mask is None:
        return shifted.mean(reduced), jnp.square(shifted).mean(reduced)
    mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
    shifted = jnp.where(mask, shifted, 0)
    return shifted.mean(reduced), jnp.square(shifted).mean(reduced), mask.mean(reduced, dtype=jnp.float32)


def _moments(running_mean, calls):
    """Computes (mean, variance) of a layer from the (d, s) of its calls, or (p d, p s, p) of calls with a mask.

    If a layer is called more than once in a forward pass, the result is the mean over its calls, because its running
    statistics are means over its calls as well.
    """
    calls = [tuple(x / jnp.maximum(p[0], EPSILON) for x in (d, s)) if p else (d, s) for d, s, *p in calls]
    mean = sum(running_mean.astype(jnp.float32) + d for d, _ in calls) / len(calls)
    variance = sum(s - jnp.square(d) for d, s in calls) / len(calls)
    return mean, variance


def _joint_moments(calls, axis: str | None):
    """Computes (mean, variance) over all shards, the mean over calls, from `shifted_moments` without a running mean."""
    means, variances = [], []
    for mean, variance, share in calls:
        total = jnp.maximum(pmean(share, axis), EPSILON)
        joint = pmean(mean, axis) / total
        apart = jnp.square(mean / jnp.maximum(share, EPSILON) - joint)  # squared distance of this shard's mean
        means.append(joint)
        variances.append(pmean(variance + share * apart, axis) / total)
    return sum(means) / len(means), sum(variances) / len(variances)


def normalises_batches(layer) -> bool:
    """Returns whether a layer has the fields of Flax's BatchNorm, which determine the axes and positions of its moments."""
    return hasattr(layer, 'use_running_average') and hasattr(layer, 'axis')


@dataclasses.dataclass(frozen=True)
class Ears:
    """The specification of what is captured in a forward pass; hashable, for the caches of traced functions.

    Attributes:
      hear: (layer, running mean or None, x, mask) -> the value that is sown for each place in `means`.
      means: A pair (place, path of its running mean) for each place; the path is () where no mean is needed.
      kept: The places at which the array itself is captured as well.
    """

    hear: Callable
    means: tuple[tuple[str, tuple[str, ...]], ...]
    kept: tuple[str, ...] = ()

    @functools.cached_property
    def running(self) -> dict[str, tuple[str, ...]]:
        """{place: path of its running mean, or ()}."""
        return dict(self.means)

    @functools.cached_property
    def places(self) -> frozenset[str]:
        """All places, those in `means` and those in `kept`."""
        return frozenset({*self.running, *self.kept})


class Tap(abc.ABC):
    """Runs a network in eval mode and returns the moments of its BatchNorm inputs, or of the places with recorded moments.

    A subclass defines how to run its kind of network: `apply_fn`, `_listen` and `modules`.

    Attributes:
      layers: The tapped layers in forward order.
    """

    # The collections into which values may be sown, first choice first; and further ones for places of arbitrary layers.
    ways, last_ways = (None,), ()

    def __init__(self, network, variables, example, call_kwargs: dict, logits: Callable | None):
        """Finds, by shapes alone, the collection to sow into that reaches every layer with running statistics.

        Statistics that cannot be captured are left out, with a message on stderr, if they are not used in eval mode or are
        not in Flax's own collection.

        Args:
          network: A module or model; messages call it by its `name_of`.
          variables: Its variables (arrays or shapes), with `batch_stats`.
          example: The shape and dtype of an input, a `jax.ShapeDtypeStruct`.
          call_kwargs: The arguments that it takes besides x in eval mode, for instance {'train': False}.
          logits: A function that extracts the logits from the network's result; None if the result is the logits.

        Raises:
          DvinvError: The variables are incomplete, the network is not in eval mode or does not take such an input, it does
            not return logits of two classes or more, or layers cannot be captured (the message names them).
        """
        self._name, self._kwargs, self._example = name_of(network), call_kwargs, example
        call = inspect.signature(type(network).__call__) if callable(network) else inspect.Signature()
        self._parameters = [*call.parameters.values()][2:]  # those after the network itself and x
        self._pick = logits or (lambda returned: returned)
        if not find_statistics(variables):
            self._refuse_incomplete(variables, example)
        self._check_call(variables, example)
        self._tune(variables)

    def of(self, variables) -> 'Tap':
        """Returns the tap of the same network for variables with other statistics, for instance recorded moments."""
        tap = copy.copy(self)
        tap._tune(variables)
        return tap

    def _tune(self, variables) -> None:
        """Finds the collection to sow into that reaches every layer with statistics, and the order of the layers."""
        name, self._places = self._name, find_statistics(variables)
        wanted, recorded = running_statistics(variables), MOMENTS in variables
        shapes = {layer: mean.shape for layer, (mean, _) in wanted.items()}
        calls, missed, reason = self._reach(variables, shapes, lambda v, x, c: self._run(v, x, c)[1], recorded)
        self.layers = tuple(layer for layer in calls if layer in wanted and layer not in missed)
        if recorded:
            if missed:
                raise DvinvError(
                    f'The moments are of layers that {name} does not have, or not with so many channels: '
                    f'{listed(missed, 4)}. Record those of this network.'
                )
            return
        idle = self._idle(variables, self._example) if missed else set()
        foreign = [layer for layer in missed if layer not in idle and not self._is_of_flax(layer)]
        unreached = [layer for layer in missed if layer not in idle and layer not in foreign]
        if unreached or (wanted and not self.layers):
            raise DvinvError(
                f'{name} keeps running statistics that the tap cannot reach: {", ".join(unreached or missed)}. Call each '
                'of these layers as module(x) once in the forward pass, and let lifted transforms carry batch_stats on a '
                f'mapped axis.{reason}'
            )
        if idle:
            say(f'{name} does not use {listed(sorted(idle))} in eval mode, so their running statistics are left out.')
        foreign = [join_names(path) for layer in foreign for path in self._places[layer]]
        if others := [*foreign, *unpaired_statistics(variables)]:
            say(f'{name} has {listed(others)}, named as running statistics, but no layer is known to use them: left out.')
        self._places = {layer: self._places[layer] for layer in self.layers}

    def reaching(self, variables, places: Iterable[str]) -> 'Tap':
        """Returns a copy of this tap that captures these places, as returned by `find`, in `moments` and by `capture`.

        Raises:
          DvinvError: Some places cannot be captured; the message names them.
        """
        tap, places = copy.copy(self), tuple(places)
        shapes = dict.fromkeys(places)
        _, missed, reason = tap._reach(variables, shapes, lambda v, x, c: tap.moments(v, x, places, c), any_place=True)
        if missed:
            raise DvinvError(
                f'{self._name} has layers that the tap cannot reach: {listed(missed, 4)}. Each must take and return arrays '
                f'with the channels last, called as module(x).{reason}'
            )
        return tap

    def _reach(self, variables, shapes: dict, run: Callable, any_place: bool) -> tuple[Counter, list[str], str]:
        """Chooses the first collection to sow into by which all places are captured, or else the one that misses fewest.

        Args:
          variables: The network's variables (arrays or shapes).
          shapes: {place: the shape of its mean, or None for any shape}.
          run: (variables, x, calls) -> {place: (mean, variance)}.
          any_place: Whether the places may be of any layers, also in a network without running statistics, in which lifted
            transforms may carry only the parameters.

        Returns:
          The number of calls of each place, the places that are not captured, and the end of a sentence with the reason.
        """
        tries, reason = [], ''
        for way in (*self.ways, *(self.last_ways if any_place else ())):
            self._way, calls, moments = way, Counter(), {}
            try:
                # Functions under nn.jit that were traced before would not be traced again, and their layers not be counted.
                with jax.disable_jit():
                    moments = jax.eval_shape(lambda v, x: run(v, x, calls), variables, self._example)  # noqa: B023
            except DvinvError:
                raise
            except Exception as error:  # Flax and JAX raise many kinds here; the caller reports the last one
                reason = f' ({in_a_line(error)})'
            missed = [p for p, shape in shapes.items() if p not in moments or shape not in (None, moments[p][0].shape)]
            tries.append((len(missed), way, calls, missed))
            if not missed:
                break
        _, self._way, calls, missed = min(tries, key=lambda one: one[0])
        return calls, missed, reason

    def _refuse_incomplete(self, variables, example) -> None:
        """Raises a DvinvError if some of the network's parameters or running statistics are not among the variables."""
        return  # the variables of an NNX model are always complete

    def _is_of_flax(self, layer: str) -> bool:
        mean, variance = self._places[layer]
        return (mean[0], mean[-1], variance[-1]) == (STATISTICS, 'mean', 'var')

    def _idle(self, variables, example) -> set[str]:
        """Returns the layers with running statistics that no logit depends on: those that are called in training only."""
        program = program_of(jax.make_jaxpr(self.apply_fn)(variables, example), called_or_jaxs_own)
        needed = {*program.outputs}
        for operation in reversed(program.operations):
            if needed.intersection(operation.outputs):
                needed.update(operation.inputs)
        paths = [
            tuple(getattr(key, 'key', None) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
        ]
        used = {path for path, value in zip(paths, program.inputs[: len(paths)], strict=True) if value in needed}
        return {layer for layer, pair in self._places.items() if not used.intersection(pair)}

    @abc.abstractmethod
    def apply_fn(self, variables, x):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""

    @abc.abstractmethod
    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of the modules inside the network, those of a forward pass in the order of their calls."""

    @abc.abstractmethod
    def _listen(self, variables, x, calls: Counter, ears: Ears):
        """Runs the network and captures values as `ears` specifies, sown into the collection `self._way`.

        Args:
          variables: The network's variables.
          x: Normalised images [B, H, W, C].
          calls: Counts the calls of each place while JAX traces; its keys are in the order of the first calls.
          ears: What is captured.

        Returns:
          (logits, {place: the result of `ears.hear` for each of its calls}, {place: the captured array of each of its
          calls}).
        """

    def __call__(self, variables, x, axis: str | None = None, capture: tuple[str, ...] = ()):
        """Computes the logits and the moments of the inputs of the tapped layers.

        Args:
          variables: The network's variables.
          x: Normalised images [B, H, W, C].
          axis: The mesh axis over which the batch is split, or None. If named, moments are those of the whole batch.
          capture: Places, as returned by `find`, at which arrays are captured.

        Returns:
          (logits [B, K], {layer: (mean, variance)} in forward order). With `capture`, a third item {place: its arrays, one
          per call}.
        """
        logits, moments, *captured = self._run(variables, x, Counter(), axis, tuple(capture))
        return logits, {layer: moments[layer] for layer in self.layers}, *captured

    def features(self, variables, x):
        """Computes the logits and the inputs of the tapped layers.

        Returns:
          (logits [B, K], {layer: a tuple of its BatchNorm inputs, one per call} in forward order). An input is [B, ...]; the
          input of layers that are stacked by nn.scan or nn.vmap has the stacking axis first.
        """
        logits, heard, _ = self._listen(variables, x, Counter(), Ears(whole_input, self._means()))
        return logits, {layer: heard[layer] for layer in self.layers}

    def moments(self, variables, x, places: tuple[str, ...], calls: Counter | None = None) -> dict:
        """Computes {place: (mean, variance)}, each float32 [..., C], of a batch x [B, H, W, C].

        Call it on the tap that `reaching` returns for these places.
        """
        ears = Ears(shifted_moments, tuple((place, ()) for place in places))
        _, sown, _ = self._listen(variables, x, Counter() if calls is None else calls, ears)
        return {place: _joint_moments(heard, None) for place, heard in sown.items()}

    def find(self, variables, patterns: Iterable[str]) -> tuple[str, ...]:
        """Returns the places that patterns name, in forward order.

        Args:
          variables: The network's variables (arrays or shapes).
          patterns: Patterns of a layer's path ('blocks_*/norm1') or class ('LayerNorm', or a class that it inherits from).
            * stands for any characters except a slash, ** for any characters. A pattern names the layer's input, or with
            ':output' after it the layer's output.

        Raises:
          DvinvError: A pattern fits no layer.
        """
        modules, wanted = self.modules(variables), {}
        for pattern in patterns:
            layer, output = pattern.removesuffix(OUTPUT), OUTPUT * pattern.endswith(OUTPUT)
            found = [path for path, module in modules.items() if path and _fits(path, module, layer)]
            if not found:
                classes = dict.fromkeys(module.__name__ for path, module in modules.items() if path)
                raise DvinvError(
                    f'The pattern {pattern!r} fits no layer of {self._name}. A pattern is a path, for instance '
                    f'{listed([*filter(None, modules)], 3)}, or a class, {listed([*classes], 6)}, with * for any '
                    f'characters, and {OUTPUT!r} after it for what the layer returns.'
                )
            wanted.update(dict.fromkeys(path + output for path in found))
        return in_order(modules, wanted)

    def _means(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return tuple((place, mean if mean[0] != MOMENTS else ()) for place, (mean, _) in self._places.items())

    def _run(self, variables, x, calls: Counter, axis: str | None = None, capture: tuple[str, ...] = ()):
        logits, sown, kept = self._listen(variables, x, calls, Ears(shifted_moments, self._means(), capture))
        if MOMENTS in variables:
            moments = {place: _joint_moments(heard, axis) for place, heard in sown.items()}
        else:
            statistics = running_statistics(variables)
            moments = {layer: _moments(statistics[layer][0], heard) for layer, heard in pmean(sown, axis).items()}
        return (logits, moments, kept) if capture else (logits, moments)

    def _check_call(self, variables, example) -> None:
        """Traces the network once, in eval mode, and validates its result.

        Raises:
          DvinvError: It cannot be run, is not in eval mode, or does not return logits of two classes or more.
        """
        shape = 'x'.join(map(str, example.shape[1:]))
        try:
            logits = jax.eval_shape(self.apply_fn, variables, example)
        except flax.errors.ModifyScopeVariableError as error:
            raise self._in_training(*LEARNS) from error
        except flax.errors.InvalidRngError as error:
            raise self._in_training(*DRAWS) from error
        except Exception as error:
            self._refuse_incomplete(variables, example)
            raise DvinvError(
                f'{self._name} cannot be applied to images of shape {shape} with {self._kwargs}: {in_a_line(error)}'
                f'{self._call_hint()}'
            ) from error
        if getattr(logits, 'ndim', None) != 2:
            raise DvinvError(
                f'{self._name} must return logits [B, K]; for images of shape {shape} it returns '
                f'{jax.tree.map(lambda a: getattr(a, "shape", a), logits)}. {_way_out(logits)}'
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise DvinvError(f'{self._name} returns {logits.dtype} numbers; logits must be floating-point numbers.')
        if logits.shape[1] < 2:
            raise DvinvError(
                f'{self._name} returns {logits.shape[1]} logit an image, and the softmax of one logit is always 1. A '
                'classifier with one logit z (a sigmoid) must return two, [0, z]: jnp.concatenate([0 * z, z], -1).'
            )

    def _in_training(self, symptom: str, remedy: dict) -> DvinvError:
        flags = {name: not default for name, default in self._arguments().items() if isinstance(default, bool)}
        return DvinvError(
            f'{self._name} {symptom}, so it is not in eval mode: pass call_kwargs, for instance {flags or remedy} '
            f'(now {self._kwargs}).'
        )

    def _arguments(self) -> dict:
        """Returns {name: default or `inspect.Parameter.empty`} of the network's arguments besides x and `call_kwargs`."""
        named = [p for p in self._parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: p.default for p in named if p.name not in self._kwargs}

    def _call_hint(self) -> str:
        """Returns the end of a sentence that names the arguments that the network needs besides x; '' if there are none."""
        needed = [name for name, default in self._arguments().items() if default is inspect.Parameter.empty]
        values = ', '.join(f'{name!r}: ...' for name in needed)
        return (
            f'. It takes {listed(needed)} beside x; give the value of eval mode: call_kwargs={{{values}}}.' if needed else ''
        )


def _way_out(returned) -> str:
    """Returns a sentence on how to extract the logits [B, K] from what a network returned."""
    found = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(returned)
        if getattr(leaf, 'ndim', None) == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if not found or not found[0]:
        return 'Wrap it in a module that returns the logits alone.'
    return f'Say which of these are the logits: logits=lambda out: out{jax.tree_util.keystr(found[0])}, for instance.'


def in_order(modules: Iterable[str], places: Iterable[str]) -> tuple[str, ...]:
    """Returns places in forward order: the output of a layer comes after everything inside the layer.

    Args:
      modules: The paths of modules in the order of their calls.
      places: The places to sort.
    """
    order = {path: index for index, path in enumerate(modules)}

    def position(place: str) -> tuple[int, int]:
        path = place.removesuffix(OUTPUT)
        if path == place:
            return order[path], 0
        return max(index for other, index in order.items() if f'{other}/'.startswith(f'{path}/')), 1

    return tuple(sorted(places, key=position))


def _fits(path: str, module: type, pattern: str) -> bool:
    """Returns whether a pattern of `Tap.find` names the layer with this path and class."""
    parts = {'**': '.*', '*': '[^/]*'}
    expression = ''.join(parts.get(part, re.escape(part)) for part in re.split(r'(\*\*|\*)', pattern))
    return any(re.fullmatch(expression, name) for name in (path, *(base.__name__ for base in module.__mro__)))


class LinenTap(Tap):
    """The tap of a Linen module: an interceptor sows the moments of the input of every layer with running statistics."""

    # Lifted transforms (nn.scan, nn.vmap) silently drop collections that they do not name, but they carry batch_stats, and
    # the parameters in networks without batch_stats.
    ways, last_ways = (PRIVATE, STATISTICS), ('params',)

    def __init__(self, module: nn.Module, variables, example, call_kwargs: dict, logits: Callable | None = None):
        """Takes the arguments of `Tap.__init__`."""
        self._module = module
        super().__init__(module, variables, example, call_kwargs, logits)

    def _refuse_incomplete(self, variables, example) -> None:
        try:
            whole = jax.eval_shape(functools.partial(self._module.init, **self._kwargs), jax.random.key(0), example)
        except Exception:  # the user's network runs here; if it fails, another message states the reason
            return
        expected, there = (_non_intermediates(tree) for tree in (whole, variables))
        if missing := [join_names(p) for p in expected if p[0] in ('params', STATISTICS) and p not in there]:
            raise DvinvError(
                f'The variables of {self._name} are incomplete: they do not have {listed(missing, 4)}. Pass all that '
                "module.init returned, as they are after training: {'params': ..., 'batch_stats': ...}."
            )

    def apply_fn(self, variables, x):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._pick(self._module.apply(variables, x, **self._kwargs))

    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of the modules that a forward pass calls, in the order of their first calls."""
        found = {}

        def intercept(call, args, kwargs, context):
            if context.method_name == '__call__':
                found.setdefault(join_names(context.module.path), type(context.module))
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept), jax.disable_jit():
            # A new function, because JAX caches the traces of a known one.
            jax.eval_shape(lambda v, x: self.apply_fn(v, x), variables, self._example)
        return found

    def _listen(self, variables, x, calls: Counter, ears: Ears):
        with LISTENING(ears), _sowing(self._way, calls, ears):
            returned, sown = self._module.apply(variables, x, mutable=[self._way], **self._kwargs)
        return self._pick(returned), _heard(sown, self._way), _heard(sown, self._way, KEPT)


def features_in_training(module: nn.Module, variables, x, rngs: dict, head: str = ''):
    """Runs a forward pass in train mode and captures the BatchNorm inputs.

    Args:
      module: A module that takes x and `train`.
      variables: Its variables.
      x: Normalised images [B, H, W, C].
      rngs: {'dropout': key}.
      head: The path of a layer, for instance 'Dense_1', that is captured in addition to the BatchNorm layers. features[head]
        is a tuple with one pair: the layer's input, and its output for the detached input (gradients of that output reach
        the layer's weights and nothing before them).

    Returns:
      (logits [B, K], features as returned by `Tap.features`, the new running statistics).
    """
    ears = Ears(whole_input, running_means(variables))
    with LISTENING((ears, head)), _sowing(PRIVATE, Counter(), ears), _hearing_head(head):
        logits, changed = module.apply(variables, x, train=True, mutable=[STATISTICS, PRIVATE], rngs=rngs)
    return logits, _heard(changed, PRIVATE), changed.get(STATISTICS, {})


@contextlib.contextmanager
def _hearing_head(path: str):
    """Makes the layer at `path` sow (its input, its output for the detached input) while the context is open."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__' or join_names(module.path) != path:
            return call(*args, **kwargs)
        x = input_of(args, kwargs)
        # Both inputs in one call, because Flax allows only one.
        answers, detached = jnp.split(call(jnp.concatenate([x, jax.lax.stop_gradient(x)])), 2)
        module.sow(PRIVATE, SOWN, (x, detached))
        return answers

    with nn.intercept_methods(intercept) if path else contextlib.nullcontext():
        yield


def _heard(sown, collection: str, name: str = SOWN) -> dict:
    """Returns {place: the sown value of each of its calls} from what a Linen module has sown under this name."""
    return by_place(flax.traverse_util.flatten_dict(flax.core.unfreeze(sown).get(collection, {})), name)


def by_place(flat: Mapping[tuple, tuple], name: str) -> dict[str, tuple]:
    """Returns {place: the sown value of each of its calls} from {path: value}, for the variables that `sown_name` names."""
    ends = {sown_name('', name): '', sown_name(OUTPUT, name): OUTPUT}
    return {join_names(path[:-1]) + ends[path[-1]]: heard for path, heard in flat.items() if path[-1] in ends}


def sown_name(place: str, name: str) -> str:
    """Returns the name of the variable that is sown in the layer of `place`."""
    return f'{name}_output' if place.endswith(OUTPUT) else name


@contextlib.contextmanager
def _sowing(collection: str, calls: Counter, ears: Ears):
    """Makes each call of a Linen layer sow what `ears` specifies into `collection`, and counts the calls in `calls`."""
    within = set()  # the layers that are being called

    def intercept(call, args, kwargs, context):
        module = context.module
        layer = join_names(module.path)
        output, mean = layer + OUTPUT, ears.running.get(layer, ())
        if context.method_name != '__call__' or ears.places.isdisjoint((layer, output)):
            return call(*args, **kwargs)
        owner = not mean or module.has_variable(mean[0], mean[-1])
        before, nested = calls[layer], layer in within
        within.add(layer)
        try:
            result = call(*args, **kwargs)
        finally:
            if not nested:
                within.remove(layer)
        # A subclass that calls super().__call__ gets here twice; the innermost call is the normalisation itself.
        if layer in ears.places and owner and calls[layer] == before:
            x = input_of(args, kwargs)
            mask = mask_of(module, args, kwargs) if mean or normalises_batches(module) else None
            sow(module, layer, module.get_variable(mean[0], mean[-1]) if mean else None, x, mask)
        # The layer's output is what the outermost call returns.
        if output in ears.places and not nested:
            sow(module, output, None, answer_of(result), None)
        return result

    def sow(module, place: str, mean, x, mask) -> None:
        if place in ears.running:
            module.sow(collection, sown_name(place, SOWN), ears.hear(module, mean, x, mask))
        if place in ears.kept:
            module.sow(collection, sown_name(place, KEPT), x)
        calls[place] += 1

    with nn.intercept_methods(intercept):
        yield
