"""The tap of Flax NNX models: a clone of the model captures its BatchNorm inputs, and its weights are kept in plain dicts.

The model is split into a static graph and `variables`, {'params': ..., 'batch_stats': ...} like those of a Linen module,
which remain arguments of all functions; NNX objects exist only while JAX traces. Keys and counts of random streams are not
weights: they are discarded, and a network with logits that depend on them is refused.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Generic

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from dvinv.errors import DvinvError
from dvinv.inversion.tap import (
    DRAWS,
    KEPT,
    LEARNS,
    OUTPUT,
    SOWN,
    STATISTICS,
    Ears,
    Tap,
    answer_of,
    by_place,
    input_of,
    mask_of,
    normalises_batches,
    sown_name,
)
from dvinv.networks.classifier import join_names

GROUPS = {'params': nnx.Param, STATISTICS: nnx.BatchStat, 'others': ...}  # {group: its type}; the first match counts


class Heard(nnx.BatchStat):
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
    graph, noise, *groups = nnx.split(model, nnx.RngState, *GROUPS.values())
    noise = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in values(noise).items()}
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


def listen(model: nnx.Module, ears: Ears) -> '_Notes':
    """Makes the layers of `model` capture what `ears` specifies, in place; returns the record of their calls."""
    notes = _Notes(ears)
    for path, module in [*nnx.iter_modules(model)]:
        layer = join_names(path)
        if not ears.places.isdisjoint((layer, layer + OUTPUT)):
            if not hasattr(module, 'dvinv_notes'):
                module.__class__ = _listening(type(module))
            module.dvinv_notes = (layer, notes)
    return notes


class NnxTap(Tap):
    """The tap of an NNX model: layers with running statistics become instances of subclasses that sow their inputs."""

    def __init__(self, model: nnx.Module, variables, example, call_kwargs: dict, logits: Callable | None = None):
        """Takes the arguments of `Tap.__init__`. `model` must be in eval mode, and a clone, since the tap keeps it."""
        self._graph, _, self._noise = split(model)
        self._paths = paths_of(model)
        self._modules = {join_names(path): type(module) for path, module in nnx.iter_modules(model) if callable(module)}
        graph, state = nnx.split(model)
        self._whole = graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self._listening = {}  # {ears: (graph, notes)}: one graph per `ears`, because JAX may cache traces by the graph
        super().__init__(model, variables, example, call_kwargs, logits)
        self._check_silence(variables, example)

    def apply_fn(self, variables, x):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._logits(variables, x)

    def _logits(self, variables, x, noise=None):
        # Values that the network itself may sow are captured and discarded.
        returned = nnx.capture(self._model(self._graph, variables, noise))(x, **self._kwargs)
        return self._pick(returned)

    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of all modules of the model that can be called, in the order of its attributes."""
        return self._modules

    def _listen(self, variables, x, calls: Counter, ears: Ears):
        if ears not in self._listening:
            model = nnx.merge(*self._whole)
            notes = listen(model, ears)
            self._listening[ears] = nnx.graphdef(model), notes
        graph, notes = self._listening[ears]
        notes.calls, notes.within = calls, set()
        returned, sown = nnx.capture(self._model(graph, variables), Heard)(x, **self._kwargs)
        if notes.learning:
            raise self._in_training(*LEARNS)
        flat = values(sown)
        return self._pick(returned), by_place(flat, SOWN), by_place(flat, KEPT)

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


class _Notes:
    """What is captured, and the record of calls while JAX traces; a static part of the graph, compared by identity."""

    def __init__(self, ears: Ears):
        self.ears = ears
        self.calls = Counter()  # the number of calls of each place
        self.within = set()  # the layers that are being called
        self.learning = set()  # the layers that updated their statistics

    def mean_of(self, module: nnx.Module, layer: str):
        """Returns the running mean that a layer owns, whatever the name of the attribute, or None if it is not needed."""
        path = self.ears.running.get(layer)
        return _array(getattr(module, path[-1])) if path else None

    def hear(self, module: nnx.Module, place: str, mean, x, mask) -> None:
        """Sows the captured values of a place, and counts its call."""
        if place in self.ears.running:
            module.sow(Heard, sown_name(place, SOWN), self.ears.hear(module, mean, x, mask))
        if place in self.ears.kept:
            module.sow(Heard, sown_name(place, KEPT), x)
        self.calls[place] += 1


def _array(value):
    """Returns the array of an attribute that may be an nnx.Variable or the array itself."""
    return value.get_raw_value() if isinstance(value, nnx.Variable) else value


@functools.cache
def _listening(layer: type) -> type:
    """Returns a subclass of the class `layer` that captures before and after each `__call__` that it has or inherits."""
    inherited = [
        base for c in layer.__mro__[1:] if c is not Generic for base in ((_ear(), c) if '__call__' in vars(c) else (c,))
    ]
    return _ear(layer, *inherited)


def _ear(*bases: type) -> type:
    """Returns a class, derived from `bases`, with a `__call__` that sows captured values of the layer.

    If such classes inherit from each other, the innermost `__call__` sows the input and the outermost one the output.
    """

    class Ear(*bases):
        @functools.wraps(bases[0].__call__ if bases else object)  # for its signature
        def __call__(self, *args, **kwargs):
            layer, notes = self.dvinv_notes
            before, mean, nested = notes.calls[layer], notes.mean_of(self, layer), layer in notes.within
            notes.within.add(layer)
            try:
                result = super().__call__(*args, **kwargs)
            finally:
                if not nested:
                    notes.within.remove(layer)
            if notes.mean_of(self, layer) is not mean:
                notes.learning.add(layer)
            # A subclass that calls super().__call__ gets here twice; the innermost call is the normalisation itself.
            if layer in notes.ears.places and notes.calls[layer] == before:
                mask = mask_of(self, args, kwargs) if mean is not None or normalises_batches(self) else None
                notes.hear(self, layer, mean, input_of(args, kwargs), mask)
            # The layer's output is what the outermost call returns.
            if layer + OUTPUT in notes.ears.places and not nested:
                notes.hear(self, layer + OUTPUT, None, answer_of(result), None)
            return result

    Ear.__name__ = bases[0].__name__ if bases else Ear.__name__  # for messages
    return Ear
