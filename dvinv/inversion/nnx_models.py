"""Flax NNX models: their tap, and an adapter that gives a model the interface of a Linen module.

The model is split into a static graph, for training one for each mode, and `variables`, {'params': ..., 'batch_stats': ...}
like those of a Linen module, which remain arguments of all functions; NNX objects exist only while JAX traces. Keys and
counts of random streams are not weights: they are discarded, and a network with logits that depend on them is refused. The
layers with running statistics sow their inputs, as Linen layers do under `linen_modules.LinenTap`.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Generic, cast

import flax
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from dvinv.inversion.capture import ARRAY, SOWN, CallRecorder, CaptureSpec, by_place, entire_input
from dvinv.inversion.linen_modules import in_training, trained_part
from dvinv.inversion.statistics import PRIVATE, STATISTICS, running_means
from dvinv.inversion.tap import DRAWS, LEARNS, Tap
from dvinv.networks.classifier import Images, flatten, join_names, unflatten
from dvinv.runtime.errors import DvinvError

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


def is_model(network) -> bool:
    """Returns whether `network` is an NNX model."""
    return isinstance(network, nnx.Module)


class NnxModule:
    """A user's NNX model with the interface of a Linen module that takes x and `train`.

    Attributes:
      label: The network's name in messages.
      head: The path of a layer that has `outputs` outputs instead of the model's own number; '' for none.
      switches: Whether the network can be switched to train mode; always true.
    """

    switches = True

    def __init__(
        self,
        model: nnx.Module,
        arguments: Mapping,
        make: Callable | None,
        pick: Callable | None,
        head: str = '',
        outputs: int = 0,
    ):
        """Clones the model, which stays unchanged; see `linen_modules.trainable` for the arguments.

        Raises:
          DvinvError: The model contains a Linen module in an NNX wrapper.
        """
        refuse_bridged(model)
        self.label, self.head, self.outputs = type(model).__name__, head, outputs
        self._make, self.pick, self.arguments = make, pick, arguments
        self.model = in_eval_mode(model)
        self._paths = paths_of(self.model)
        self._programs: dict[bool, tuple] = {}  # {whether in train mode: the result of `_prepared`}

    def _program(self, train: bool):
        """Returns the cached result of `_prepared`."""
        if train not in self._programs:
            self._programs[train] = self._prepared(train)
        return self._programs[train]

    def _prepared(self, train: bool):
        """Returns (static graph, {path of a random key or count: its shape and dtype}, recorder, arguments) for a mode."""
        model = nnx.clone(self.model)
        if train:  # the model may have an attribute named train in place of the method
            model.train() if callable(model.train) else nnx.Module.train(model)
        spec = CaptureSpec(entire_input, running_means(variables_of(model)))
        _, _, noise = split(model)
        recorder = record_calls(model, spec)
        return nnx.graphdef(model), noise, recorder, in_training(self.arguments) if train else dict(self.arguments)

    def init(self, key: jax.Array, x, train: bool = False) -> dict:
        """Returns the trained collections of `initial`."""
        return trained_part(self.initial(key, x))

    def initial(self, key: jax.Array, x) -> dict:
        """Returns random variables of all collections if a function makes models from rngs, else those of the model."""
        variables = variables_of(self._make(nnx.Rngs(key)) if self._make else self.model)
        if not self.head:
            return variables
        flat = flatten(variables)
        for name in ('kernel', 'bias'):
            path = f'params/{self.head}/{name}'
            if path in flat:
                shape, dtype = (*flat[path].shape[:-1], self.outputs), flat[path].dtype
                draw = jax.nn.initializers.lecun_normal() if name == 'kernel' else jax.nn.initializers.zeros
                flat[path] = draw(jax.random.fold_in(key, 1), shape, dtype)
        return unflatten(flat)

    def apply(self, variables, x, train: bool = False, mutable=False, rngs: Mapping | None = None):
        """Returns logits [B, K]; with `mutable`, a pair of logits and changed collections, as Linen's `apply` does."""
        graph, noise, recorder, arguments = self._program(train)
        key = (rngs or {}).get('dropout')
        keys = [_noise(leaf, key, number) for number, leaf in enumerate(noise.values())]
        variables = jax.tree.map(jnp.asarray, variables)  # NNX would write new statistics into arrays of NumPy
        model = merged(graph, self._paths, variables, dict(zip(noise, keys, strict=True)))
        recorder.restart(Counter())
        returned, sown = nnx.capture(model, Sown)(x, **arguments)
        logits = self.pick(returned) if self.pick else returned
        if mutable is False:
            return logits
        changed = {}
        if flax.core.scope.in_filter(mutable, STATISTICS):
            after = values(nnx.state(model, nnx.BatchStat))
            own = {path for group, path in self._paths if group == STATISTICS}
            changed[STATISTICS] = unflatten_dict({tuple(map(str, path)): after[path] for path in after if path in own})
        if flax.core.scope.in_filter(mutable, PRIVATE):
            inputs = {(*map(str, path[:-1]), SOWN): calls for path, calls in values(sown).items()}
            changed[PRIVATE] = unflatten_dict(inputs)
        return logits, changed

    def with_outputs(self, path: str, outputs: int) -> 'NnxModule':
        """Returns the network with `outputs` outputs of the layer at `path`."""
        return NnxModule(self.model, self.arguments, self._make, self.pick, path, outputs)


def _noise(leaf, key: jax.Array | None, number: int) -> jax.Array:
    """Returns a random key derived from `key`, or zeros if `key` is None or `leaf` is a count."""
    if key is None or not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key
