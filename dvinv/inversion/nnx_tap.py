"""The tap of Flax NNX models: a clone of the model captures its BatchNorm inputs, and its weights are kept in plain dicts.

The model is split into a static graph and `variables`, {'params': ..., 'batch_stats': ...} like those of a Linen module,
which remain arguments of all functions; NNX objects exist only while JAX traces. Keys and counts of random streams are not
weights: they are discarded, and a network with logits that depend on them is refused.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from dvinv.errors import DvinvError
from dvinv.inversion.capture import ARRAY, CallRecorder, CaptureSpec, by_place
from dvinv.inversion.statistics import STATISTICS
from dvinv.inversion.tap import DRAWS, LEARNS, Tap
from dvinv.networks.arrays import Images
from dvinv.networks.classifier import join_names

GROUPS = {'params': nnx.Param, STATISTICS: nnx.BatchStat, 'others': ...}  # {group: its type}; the first match counts


class Sown(nnx.BatchStat):
    """The type of sown variables: a subclass of BatchStat, so that transforms map them as they map running statistics."""


def refuse_bridged(model: nnx.Module) -> None:
    """Validates that no part of the model is a Linen module in an NNX wrapper.

    Raises:
      DvinvError: One is. The message says how to pass it instead.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.bridge.ToNNX):
            linen, where = type(module.to_nnx__module).__name__, '.'.join(map(str, path)) or 'The model'
            raise DvinvError(
                f'{where} is the Linen module {linen} in nnx.bridge.ToNNX, where its layers cannot be captured; pass the '
                'Linen module itself, with its variables, to dvinv.from_linen(module, variables, ...).'
            )


def in_eval_mode(model: nnx.Module) -> nnx.Module:
    """Returns a clone of the model in eval mode, without intermediates that may have been sown into the model."""
    clone = nnx.clone(model)
    nnx.pop(clone, nnx.Intermediate)
    clone.eval()
    return clone


def variables_of(model: nnx.Module) -> dict:
    """Returns the model's arrays as nested dicts {'params': ..., 'batch_stats': ...}, and 'others' if there are any."""
    _, groups, _ = split(model)
    return {
        name: unflatten_dict({tuple(map(str, path)): value for path, value in flat.items()})
        for name, flat in groups.items()
        if flat or name != 'others'
    }


def split(model: nnx.Module):
    """Returns (static graph, {group: {path: array}}, {path of a random key or count: its shape and dtype})."""
    graph, random_state, *groups = cast(tuple, nnx.split(model, nnx.RngState, *GROUPS.values()))
    noise = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in values(random_state).items()}
    return graph, dict(zip(GROUPS, map(values, groups), strict=True)), noise


def values(state) -> dict:
    """Returns {path: value} of an NNX state."""
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in nnx.to_flat_state(state)}


def paths_of(model: nnx.Module) -> list[tuple[str, tuple]]:
    """Returns (group, path) of each of the model's variables."""
    return [(group, path) for group, flat in split(model)[1].items() for path in flat]


def merged(graph, paths: list[tuple[str, tuple]], variables, noise: dict) -> nnx.Module:
    """Returns a model made from its static graph and its arrays.

    Args:
      graph: The static graph, as returned by `split`.
      paths: The paths of the weights, as returned by `paths_of`.
      variables: The weights, as returned by `variables_of`.
      noise: {path: array} of random keys and counts.
    """
    weights = {path: functools.reduce(operator.getitem, map(str, path), variables[group]) for group, path in paths}
    return nnx.merge(graph, nnx.from_flat_state(weights | noise))


def record_calls(model: nnx.Module, spec: CaptureSpec) -> 'NnxRecorder':
    """Makes the layers of `model` capture what `spec` specifies, in place; returns the recorder of their calls."""
    recorder = NnxRecorder(spec)
    for path, module in [*nnx.iter_modules(model)]:
        if spec.names(layer := join_names(path)):
            if not hasattr(module, 'dvinv_recorder'):
                module.__class__ = _recording_subclass(type(module))
            module.dvinv_recorder = layer, recorder  # type: ignore[attr-defined]  # of the subclass
    return recorder


class NnxTap(Tap):
    """The tap of an NNX model: layers with running statistics become instances of subclasses that sow their inputs."""

    def __init__(self, model: nnx.Module, variables, example, call_kwargs: dict, logits: Callable | None = None):
        """Takes the arguments of `Tap.__init__`. `model` must be in eval mode, and a clone, since the tap keeps it."""
        self._graph, _, self._noise = split(model)
        self._paths = paths_of(model)
        self._modules = {join_names(path): type(module) for path, module in nnx.iter_modules(model) if callable(module)}
        graph, state = nnx.split(model)
        self._split = graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        # One graph per specification, because JAX may cache traces by the graph.
        self._graphs: dict[CaptureSpec, tuple[Any, NnxRecorder]] = {}
        super().__init__(model, variables, example, call_kwargs, logits)
        self._check_silence(variables, example)

    def apply_fn(self, variables, x: Images):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._logits(variables, x)

    def _logits(self, variables, x, noise=None):
        # Values that the network itself may sow are captured and discarded.
        returned = nnx.capture(self._model(self._graph, variables, noise))(x, **self._kwargs)
        return self._pick(returned)

    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of all modules of the model that can be called, in the order of its attributes."""
        return self._modules

    def _capture(self, variables, x: Images, spec: CaptureSpec, calls: Counter[str]):
        if spec not in self._graphs:
            model = nnx.merge(*self._split)
            recorder = record_calls(model, spec)
            self._graphs[spec] = nnx.graphdef(model), recorder
        graph, recorder = self._graphs[spec]
        recorder.restart(calls)
        returned, sown = nnx.capture(self._model(graph, variables), Sown)(x, **self._kwargs)
        if recorder.learning:
            raise self._in_training(*LEARNS)
        flat = values(sown)
        return self._pick(returned), by_place(flat), by_place(flat, ARRAY)

    def _model(self, graph, variables, noise=None) -> nnx.Module:
        """Returns the model with these weights, and with `noise` or zeros as random keys, on which no logit may depend."""
        noise = noise or [jnp.zeros(leaf.shape, leaf.dtype) for leaf in self._noise.values()]
        return merged(graph, self._paths, variables, dict(zip(self._noise, noise, strict=True)))

    def _check_silence(self, variables, example) -> None:
        """Validates that the logits do not depend on random keys: under `vmap` over the keys alone, they must be unmapped.

        Raises:
          DvinvError: They depend on random keys.
        """
        noise = [jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype) for leaf in self._noise.values()]
        if not noise:
            return
        try:
            jax.eval_shape(jax.vmap(self._logits, in_axes=(None, None, 0), out_axes=None), variables, example, noise)
        except ValueError as error:
            if 'out_axes' in str(error):
                raise self._in_training(*DRAWS) from error


class NnxRecorder(CallRecorder):
    """The `CallRecorder` of NNX layers; a static part of the model's graph, compared by identity.

    Attributes:
      learning: The layers that updated their statistics.
    """

    def __init__(self, spec: CaptureSpec):
        super().__init__(spec)
        self.learning: set[str] = set()

    def running_mean(self, module: nnx.Module, layer: str):
        path = self.spec.measured.get(layer)
        if not path:
            return None
        mean = getattr(module, path[-1])
        return mean.get_raw_value() if isinstance(mean, nnx.Variable) else mean

    def sow(self, module: nnx.Module, name: str, value) -> None:
        module.sow(Sown, name, value)

    def call(self, module: nnx.Module, layer: str, call: Callable, args: tuple, kwargs: dict):
        mean = self.running_mean(module, layer)
        result = super().call(module, layer, call, args, kwargs)
        if self.running_mean(module, layer) is not mean:
            self.learning.add(layer)
        return result


@functools.cache
def _recording_subclass(layer: type) -> type:
    """Returns a subclass of the class `layer` that records each `__call__` that it has or inherits."""
    inherited = [
        base
        for c in layer.__mro__[1:]
        if c is not Generic
        for base in ((_recording_class(), c) if '__call__' in vars(c) else (c,))
    ]
    return _recording_class(layer, *inherited)


def _recording_class(*bases: type) -> type:
    """Returns a class, derived from `bases`, with a `__call__` that goes through the recorder of the layer."""

    class Recorded(*bases):  # type: ignore[misc]  # the bases are known at run time only
        @functools.wraps(bases[0].__call__ if bases else object)  # for its signature
        def __call__(self, *args, **kwargs):
            layer, recorder = self.dvinv_recorder
            return recorder.call(self, layer, super().__call__, args, kwargs)

    Recorded.__name__ = bases[0].__name__ if bases else Recorded.__name__  # for messages
    return Recorded
