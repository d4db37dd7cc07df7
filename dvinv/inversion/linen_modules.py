"""Flax Linen modules: their tap, and adapters that give a user's module the interface that training uses.

The networks of dvinv are Linen modules that take x and `train`. A user's module may switch to eval mode by another argument
or by a field, and an NNX model does so by `train()` and `eval()` (nnx_models.py). Variables and their paths stay those of
the module itself.
"""

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.inversion.capture import ARRAY, SOWN, CallRecorder, CaptureSpec, by_place, entire_input, input_of
from dvinv.inversion.statistics import PRIVATE, STATISTICS, non_intermediates, running_means
from dvinv.inversion.tap import Tap
from dvinv.networks.classifier import Images, Logits, flatten, join_names, shapes_of
from dvinv.runtime.errors import DvinvError, in_a_line, listed, shape_text

CAPTURED = jax.make_user_context()  # what is captured; nn.jit must not reuse a trace that captured something else
# Names of arguments and fields that switch between train and eval mode, and their values in eval mode.
EVAL_MODE = {
    **dict.fromkeys(('train', 'training', 'is_train', 'is_training', 'train_mode'), False),
    **dict.fromkeys(('deterministic', 'use_running_average', 'inference', 'is_inference', 'eval_mode', 'is_eval'), True),
}
TRAINED = ('params', STATISTICS)  # the collections that are trained, checkpointed and saved


class LinenTap(Tap):
    """The tap of a Linen module."""

    # Lifted transforms (nn.scan, nn.vmap) silently drop collections that they do not name, but they carry batch_stats, and
    # the parameters in networks without batch_stats.
    collections, last_collections = (PRIVATE, STATISTICS), ('params',)

    def __init__(self, module, variables, example, call_kwargs: dict, logits: Callable | None = None):
        """Takes the arguments of `Tap.__init__`."""
        self._module = module
        super().__init__(module, variables, example, call_kwargs, logits)

    def _refuse_incomplete(self, variables, example) -> None:
        try:
            complete = jax.eval_shape(functools.partial(self._module.init, **self._kwargs), jax.random.key(0), example)
        except Exception:  # the user's network runs here; if it fails, another message states the reason
            return
        expected, given = non_intermediates(complete), non_intermediates(variables)
        if missing := [join_names(p) for p in expected if p[0] in ('params', STATISTICS) and p not in given]:
            raise DvinvError(
                f'The variables of {self._name} are incomplete: they do not have {listed(missing, 4)}. Pass all that '
                "module.init returned, as they are after training: {'params': ..., 'batch_stats': ...}."
            )

    def apply_fn(self, variables, x: Images):
        """Computes the logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._pick(self._module.apply(variables, x, **self._kwargs))

    def modules(self, variables) -> dict[str, type]:
        """Returns {path: class} of the modules that a forward pass calls, in the order of their first calls."""
        found: dict[str, type] = {}

        def intercept(call, args, kwargs, context):
            if context.method_name == '__call__':
                found.setdefault(join_names(context.module.path), type(context.module))
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept), jax.disable_jit():
            # A new function, because JAX caches the traces of a known one.
            jax.eval_shape(lambda v, x: self.apply_fn(v, x), variables, self._example)
        return found

    def _capture(self, variables, x: Images, spec: CaptureSpec, calls: Counter[str]):
        with _sowing(_LinenRecorder(spec, calls, self._collection)):
            returned, sown = self._module.apply(variables, x, mutable=[self._collection], **self._kwargs)
        flat = _flat(sown, self._collection)
        return self._pick(returned), by_place(flat), by_place(flat, ARRAY)


def features_in_training(module, variables, x: Images, rngs: dict, head: str = '') -> tuple[Logits, dict, dict]:
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
    recorder = _LinenRecorder(CaptureSpec(entire_input, running_means(variables)), Counter(), PRIVATE)
    with _sowing(recorder, head), _sowing_head(head):
        logits, changed = module.apply(variables, x, train=True, mutable=[STATISTICS, PRIVATE], rngs=rngs)
    return logits, by_place(_flat(changed, PRIVATE)), changed.get(STATISTICS, {})


class _LinenRecorder(CallRecorder):
    """The `CallRecorder` of Linen modules, which sows into one collection."""

    def __init__(self, spec: CaptureSpec, calls: Counter[str], collection: str):
        super().__init__(spec, calls)
        self._collection = collection

    def owns_statistics(self, module: nn.Module, layer: str) -> bool:
        path = self.spec.measured.get(layer)
        return not path or module.has_variable(path[0], path[-1])

    def running_mean(self, module: nn.Module, layer: str):
        path = self.spec.measured.get(layer)
        return module.get_variable(path[0], path[-1]) if path else None

    def sow(self, module: nn.Module, name: str, value) -> None:
        module.sow(self._collection, name, value)


@contextlib.contextmanager
def _sowing(recorder: _LinenRecorder, head: str = '') -> Iterator[None]:
    """Makes the calls of Linen layers go through `recorder` while the context is open; `head` is part of the trace's key."""

    def intercept(call, args, kwargs, context):
        layer = join_names(context.module.path)
        if context.method_name != '__call__' or not recorder.spec.names(layer):
            return call(*args, **kwargs)
        return recorder.call(context.module, layer, call, args, kwargs)

    with CAPTURED((recorder.spec, head)), nn.intercept_methods(intercept):
        yield


@contextlib.contextmanager
def _sowing_head(path: str) -> Iterator[None]:
    """Makes the layer at `path` sow (its input, its output for the detached input) while the context is open."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__' or join_names(module.path) != path:
            return call(*args, **kwargs)
        x = input_of(args, kwargs)
        # Both inputs in one call, because Flax allows only one.
        outputs, detached = jnp.split(call(jnp.concatenate([x, jax.lax.stop_gradient(x)])), 2)
        module.sow(PRIVATE, SOWN, (x, detached))
        return outputs

    with nn.intercept_methods(intercept) if path else contextlib.nullcontext():
        yield


def _flat(sown, collection: str) -> dict[tuple[str, ...], Any]:
    """Returns {path without the collection: variable, or the sown values of all calls} of one collection."""
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(sown).get(collection, {}))


def eval_arguments(network) -> dict[str, bool]:
    """Returns arguments that put a network in eval mode, e.g. {'train': False}, from the signature of its `__call__`."""
    parameters = inspect.signature(network.__call__).parameters if callable(network) else {}
    return {name: value for name, value in EVAL_MODE.items() if name in parameters}


def in_training(arguments: Mapping) -> dict:
    """Returns arguments of eval mode with those in `EVAL_MODE` switched to train mode."""
    return {name: not value if name in EVAL_MODE else value for name, value in arguments.items()}


def trained_part(variables: Mapping) -> dict:
    """Returns the collections `TRAINED` of a network's variables, which leaves out sown values, for instance."""
    return {name: variables[name] for name in TRAINED if name in variables}


def unboxed(node):
    """Returns nested mappings as nested dicts without Flax's boxes; Flax's `unbox` would shard under a caller's mesh."""
    if isinstance(node, Mapping):
        return {name: unboxed(child) for name, child in node.items()}
    return jax.tree.leaves(node)[0] if isinstance(node, flax.core.meta.AxisMetadata) else node


@dataclasses.dataclass(frozen=True, eq=False)
class LinenModule:
    """A user's Linen module with the interface of a module that takes x and `train`.

    Attributes:
      module: The user's module.
      arguments: The arguments that put it in eval mode, in addition to x.
      head: The path of a layer that has `outputs` outputs instead of the module's own number; '' for none.
      outputs: The number of outputs of `head`.
      pick: A function that extracts the logits from the module's result; None if the result is the logits.
    """

    module: nn.Module
    arguments: Mapping
    head: str = ''
    outputs: int = 0
    pick: Callable | None = None

    @property
    def label(self) -> str:
        """The network's name in messages."""
        return type(self.module).__name__

    @functools.cached_property
    def _modes(self) -> dict[bool, tuple[nn.Module, dict]]:
        """{whether in train mode: (the module, its arguments)}."""
        fields = {field.name for field in dataclasses.fields(self.module)} & EVAL_MODE.keys() - self.arguments.keys()
        evaluating = {name: EVAL_MODE[name] for name in fields if isinstance(getattr(self.module, name), bool | None)}
        return {
            train: (self.module.clone(**change(evaluating)) if evaluating else self.module, change(self.arguments))
            for train, change in ((False, dict), (True, in_training))
        }

    @property
    def switches(self) -> bool:
        """Whether an argument or a field switches the module to train mode."""
        return self._modes[False] != self._modes[True]

    def init(self, key: jax.Array, x, train: bool = False) -> dict:
        """Returns random variables of the collections `TRAINED`."""
        return trained_part(self.initial(key, x))

    def initial(self, key: jax.Array, x) -> dict:
        """Returns random variables of all collections."""
        module, arguments = self._modes[False]
        with self._with_outputs():
            return {'params': {}} | unboxed(module.init(key, x, **arguments))

    def apply(self, variables, x, train: bool = False, mutable=False, rngs: dict | None = None):
        """Returns logits [B, K]; with `mutable`, a pair of logits and changed collections, as Linen's `apply` does."""
        module, arguments = self._modes[train]
        if rngs and 'dropout' in rngs:
            rngs = {'params': jax.random.fold_in(rngs['dropout'], 2), **rngs}  # for streams of other names
        with self._with_outputs():
            returned = module.apply(variables, x, mutable=mutable, rngs=rngs, **arguments)
        pick = self.pick or (lambda returned: returned)
        return pick(returned) if mutable is False else (pick(returned[0]), returned[1])

    def with_outputs(self, path: str, outputs: int) -> 'LinenModule':
        """Returns the network with `outputs` outputs of the layer at `path`."""
        return dataclasses.replace(self, head=path, outputs=outputs)

    @contextlib.contextmanager
    def _with_outputs(self):
        """Gives the layer `head` its number of outputs while the context is open."""

        def intercept(call, args, kwargs, context):
            module = context.module
            if context.method_name == '__call__' and join_names(module.path) == self.head:
                object.__setattr__(module, 'features', self.outputs)  # changes this call's copy; modules are frozen
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept) if self.head else contextlib.nullcontext():
            yield


def trainable(network, arguments: Mapping | None = None, make: Callable | None = None, pick: Callable | None = None):
    """Returns a user's Flax network with the interface of a Linen module that takes x and `train`.

    Args:
      network: A Linen module or an NNX model.
      arguments: The arguments that put it in eval mode; None finds them by `eval_arguments`.
      make: rngs -> a new NNX model of the same kind with random weights; if None, `init` returns the model's own weights.
      pick: A function that extracts the logits from the network's result; None if the result is the logits.

    Returns:
      A `LinenModule` or an `NnxModule`, or None if `network` is neither a Linen module nor an NNX model.
    """
    arguments = eval_arguments(network) if arguments is None else arguments
    if isinstance(network, nn.Module):
        return LinenModule(network, arguments, pick=pick)
    if 'flax.nnx' not in sys.modules:  # its import takes a third of a second that no other run should pay
        return None
    from dvinv.inversion import nnx_models

    return nnx_models.NnxModule(network, arguments, make, pick) if nnx_models.is_model(network) else None


def with_classes(module, image_shape, num_classes: int):
    """Returns a user's `trainable` network with `num_classes` outputs of its head, which is found by shapes.

    Raises:
      DvinvError: No layer is found that has one output per class and can be changed without changing other layers.
    """
    if module.head:
        return module.with_outputs(module.head, num_classes)
    classes = _outputs(module, image_shape)
    if classes == num_classes:
        return module
    shapes = {path: leaf.shape for path, leaf in flatten(shapes_of(module, image_shape)['params']).items()}
    layers = [
        path.removesuffix('/kernel') for path, shape in shapes.items() if path.endswith('/kernel') and shape[-1] == classes
    ]
    for layer in reversed(layers):
        wider = module.with_outputs(layer, classes + 1)
        try:
            outputs, wide = _outputs(wider, image_shape), flatten(shapes_of(wider, image_shape)['params'])
        except Exception:  # other layers of the user's network depend on this one; Flax and JAX raise many kinds
            continue
        changed = {path.rpartition('/')[0] for path in shapes if wide[path].shape != shapes[path]}
        if outputs == classes + 1 and changed == {layer}:
            return module.with_outputs(layer, num_classes)
    raise DvinvError(
        f'The head of {module.label}, which is to grow from {classes} to {num_classes} classes, is not found: no single '
        'layer has exactly one output per class. End the network with a dense layer (nn.Dense, nnx.Linear) that '
        'returns the logits.'
    )


def _outputs(module, image_shape) -> int:
    x = jax.ShapeDtypeStruct((2, *image_shape), np.float32)
    return jax.eval_shape(lambda v, x: module.apply(v, x, train=False), shapes_of(module, image_shape), x).shape[-1]


def validate_trainable(module, image_shape, num_classes: int, name: str, from_scratch: bool = True) -> None:
    """Validates, by shapes alone, that a user's `trainable` network can be trained.

    Args:
      module: The network.
      image_shape: (H, W, C) of the images.
      num_classes: The number of classes of its logits.
      name: Its name in messages.
      from_scratch: Whether its BatchNorm statistics are still to be computed.

    Raises:
      DvinvError: It does not take such images, returns other logits, cannot be run in train mode, has variables besides
        params and batch_stats, or has BatchNorms that cannot be switched to train mode.
    """
    shape = shape_text(image_shape)
    x = jax.ShapeDtypeStruct((2, *image_shape), np.float32)
    try:
        variables = jax.eval_shape(module.initial, jax.random.key(0), x)
        kept = trained_part(variables)
        logits = jax.eval_shape(lambda v, x: module.apply(v, x, train=False), variables, x)
    except DvinvError:
        raise
    except Exception as error:  # the user's network runs here, and Flax and JAX raise many kinds
        raise DvinvError(f'{name} cannot take images of {shape}: {in_a_line(error)}') from error
    if getattr(logits, 'shape', None) != (2, num_classes):
        found = jax.tree.map(lambda leaf: leaf.shape, logits)
        raise DvinvError(
            f'{name} must return logits [B, {num_classes}], a class each; for 2 images of {shape} it returns {found}. A '
            'function that takes num_classes is given their number.'
        )
    others = [collection for collection in variables if collection not in (*TRAINED, 'intermediates', PRIVATE)]
    if any(jax.tree.leaves(variables[collection]) for collection in others):
        raise DvinvError(
            f"{name} keeps variables in {listed(others)}, and a network that is trained here has those of 'params' and "
            "'batch_stats' alone (of NNX: nnx.Param and nnx.BatchStat); make constants of the others."
        )
    if from_scratch and kept.get(STATISTICS) and not module.switches:
        raise DvinvError(
            f'{name} has BatchNorm layers, but nothing tells them that it trains; give its __call__ an argument train (or '
            f'{listed([*EVAL_MODE][1:])}), and pass it on: nn.BatchNorm(use_running_average=not train).'
        )
    try:
        jax.eval_shape(functools.partial(features_in_training, module), kept, x, {'dropout': jax.random.key(0)})
    except DvinvError:
        raise
    except Exception as error:
        raise DvinvError(f'{name} cannot be run in train mode: {in_a_line(error)}') from error
