"""The tap: runs an unmodified Flax network and returns the moments of its BatchNorm inputs, or captures any other layers.

`Tap` is what all kinds of networks share: which layers are captured, into which collection of variables their values are
sown, and the sentences for users about networks for which that fails. `LinenTap` is in linen_modules.py, `NnxTap` in
nnx_models.py; statistics.py finds the layers, capture.py measures them.
"""

import abc
import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from dvinv.graph.program import called_or_jaxs_own, program_of
from dvinv.inversion.capture import (
    OUTPUT,
    CaptureSpec,
    entire_input,
    joint_moments_of_calls,
    moments_of_calls,
    shifted_moments,
)
from dvinv.inversion.losses import pmean
from dvinv.inversion.statistics import (
    STATISTICS,
    VariablePath,
    find_statistics,
    running_statistics,
    unpaired_statistics,
)
from dvinv.networks.classifier import MOMENTS, Images, Logits, Moment, join_names, name_of
from dvinv.runtime.errors import DvinvError, in_a_line, listed, say, shape_text

# Symptoms of a network in training mode, and arguments that may put it in eval mode.
LEARNS = 'wants to update its running statistics', {'train': False}
DRAWS = 'asks for random numbers (dropout?)', {'deterministic': True}


class Tap(abc.ABC):
    """Runs a network in eval mode and returns the moments of its BatchNorm inputs, or of the places with recorded moments.

    A subclass defines how to run its kind of network: `apply_fn`, `_capture` and `modules`.

    Attributes:
      layers: The tapped layers in forward order.
      num_classes: The number of logits per image.
    """

    # The collections into which values may be sown, first choice first, and further ones for places of arbitrary layers.
    collections: tuple[str, ...] = ('',)
    last_collections: tuple[str, ...] = ()
    layers: tuple[str, ...]
    _rewrites: tuple[Callable[[Callable], Callable], ...] = ()  # see `rewritten`

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
        self.num_classes = self._check_call(variables, example)
        self._select_layers(variables)

    def for_variables(self, variables) -> 'Tap':
        """Returns the tap of the same network for variables with other statistics, for instance recorded moments."""
        tap = copy.copy(self)
        tap._select_layers(variables)
        return tap

    def _select_layers(self, variables) -> None:
        """Chooses the collection to sow into, and determines `layers`: those with statistics that are captured.

        Raises:
          DvinvError: A layer that should be captured is not; the message names it.
        """
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

    def rewritten(self, rewrite: Callable[[Callable], Callable]) -> 'Tap':
        """Returns a copy of this tap that computes its function `fn(variables, x)` as `rewrite(fn)`.

        Args:
          rewrite: Changes how a function is computed, for instance `programs.in_bfloat16`, on top of earlier rewrites.
        """
        tap = copy.copy(self)
        tap._rewrites = (*self._rewrites, rewrite)
        return tap

    def reaching(self, variables, places: Iterable[str]) -> 'Tap':
        """Returns a copy of this tap that captures these places, as returned by `find`, in `moments` and by `capture`.

        Raises:
          DvinvError: Some places cannot be captured; the message names them.
        """
        tap, places = copy.copy(self), tuple(places)
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(places)
        _, missed, reason = tap._reach(variables, shapes, lambda v, x, c: tap.moments(v, x, places, c), any_place=True)
        if missed:
            raise DvinvError(
                f'{self._name} has layers that the tap cannot reach: {listed(missed, 4)}. Each must take and return arrays '
                f'with the channels last, called as module(x).{reason}'
            )
        return tap

    def _reach(
        self, variables, shapes: Mapping[str, tuple[int, ...] | None], run: Callable, any_place: bool
    ) -> tuple[Counter[str], list[str], str]:
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
        attempts: list[tuple[list[str], str, Counter[str]]] = []
        reason = ''
        for collection in (*self.collections, *(self.last_collections if any_place else ())):
            self._collection, calls, moments = collection, Counter[str](), {}
            try:
                # Functions under nn.jit that were traced before would not be traced again, and their layers not be counted.
                with jax.disable_jit():
                    moments = jax.eval_shape(lambda v, x: run(v, x, calls), variables, self._example)  # noqa: B023
            except DvinvError:
                raise
            except Exception as error:  # Flax and JAX raise many kinds here; the caller reports the last one
                reason = f' ({in_a_line(error)})'
            missed = [p for p, shape in shapes.items() if p not in moments or shape not in (None, moments[p][0].shape)]
            attempts.append((missed, collection, calls))
            if not missed:
                break
        missed, self._collection, calls = min(attempts, key=lambda attempt: len(attempt[0]))
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
    def apply_fn(self, variables, x: Images):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""

    @abc.abstractmethod
    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of the modules inside the network, those of a forward pass in the order of their calls."""

    @abc.abstractmethod
    def _capture(self, variables, x: Images, spec: CaptureSpec, calls: Counter[str]) -> tuple[Any, dict, dict]:
        """Runs the network and captures values as `spec` specifies, sown into the collection `self._collection`.

        Args:
          variables: The network's variables.
          x: Normalised images [B, H, W, C].
          spec: What is captured.
          calls: Counts the calls of each place while JAX traces; its keys are in the order of the first calls.

        Returns:
          (logits, {place: the result of `spec.measure` for each of its calls}, {place: the captured array of each of its
          calls}).
        """

    def __call__(self, variables, x: Images, axis: str | None = None, capture: tuple[str, ...] = ()):
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

        def run(variables, x):
            logits, moments, *captured = self._run(variables, x, Counter(), axis, tuple(capture))
            return logits, {layer: moments[layer] for layer in self.layers}, *captured

        for rewrite in self._rewrites:
            run = rewrite(run)
        return run(variables, x)

    def features(self, variables, x: Images) -> tuple[Logits, dict[str, tuple]]:
        """Computes the logits and the inputs of the tapped layers.

        Returns:
          (logits [B, K], {layer: a tuple of its BatchNorm inputs, one per call} in forward order). An input is [B, ...]; the
          input of layers that are stacked by nn.scan or nn.vmap has the stacking axis first.
        """
        logits, inputs, _ = self._capture(variables, x, CaptureSpec(entire_input, self._means()), Counter())
        return logits, {layer: inputs[layer] for layer in self.layers}

    def moments(
        self, variables, x: Images, places: tuple[str, ...], calls: Counter[str] | None = None
    ) -> dict[str, tuple[Moment, Moment]]:
        """Computes {place: (mean, variance)}, each float32 [..., C], of a batch x [B, H, W, C].

        Call it on the tap that `reaching` returns for these places.
        """
        spec = CaptureSpec(shifted_moments, tuple((place, ()) for place in places))
        _, sown, _ = self._capture(variables, x, spec, Counter() if calls is None else calls)
        return {place: joint_moments_of_calls(values, None) for place, values in sown.items()}

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

    def _means(self) -> tuple[tuple[str, VariablePath], ...]:
        return tuple((place, mean if mean[0] != MOMENTS else ()) for place, (mean, _) in self._places.items())

    def _run(self, variables, x, calls: Counter[str], axis: str | None = None, capture: tuple[str, ...] = ()):
        logits, sown, arrays = self._capture(variables, x, CaptureSpec(shifted_moments, self._means(), capture), calls)
        if MOMENTS in variables:
            moments = {place: joint_moments_of_calls(values, axis) for place, values in sown.items()}
        else:
            means = {layer: mean for layer, (mean, _) in running_statistics(variables).items()}
            moments = {layer: moments_of_calls(means[layer], values) for layer, values in pmean(sown, axis).items()}
        return (logits, moments, arrays) if capture else (logits, moments)

    def _check_call(self, variables, example) -> int:
        """Traces the network once, in eval mode, validates its result, and returns the number of classes.

        Raises:
          DvinvError: It cannot be run, is not in eval mode, or does not return logits of two classes or more.
        """
        shape = shape_text(example.shape[1:])
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
                f'{self._name} returns {logits.shape[1]} logit per image, and the softmax of one logit is always 1. A '
                'classifier with one logit z (a sigmoid) must return two, [0, z]: jnp.concatenate([0 * z, z], -1).'
            )
        return logits.shape[1]

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
