"""The tap of Flax Linen modules: an interceptor of method calls sows what is captured into a collection of variables."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.errors import DvinvError, listed
from dvinv.inversion.capture import ARRAY, SOWN, CallRecorder, CaptureSpec, by_place, entire_input, input_of
from dvinv.inversion.statistics import PRIVATE, STATISTICS, non_intermediates, running_means
from dvinv.inversion.tap import Tap
from dvinv.networks.arrays import Images, Logits
from dvinv.networks.classifier import join_names

CAPTURED = jax.make_user_context()  # what is captured; nn.jit must not reuse a trace that captured something else


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
