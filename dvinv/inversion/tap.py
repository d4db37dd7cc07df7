"""The BatchNorm tap: the moments of every BatchNorm input of an unmodified Flax Linen module.

Any module that owns running statistics (`batch_stats/mean` and `batch_stats/var`) counts as a BatchNorm, whatever its
class. While the network runs, an interceptor sows the moments of what such a module is called with. They are taken in
one pass, shifted by the frozen running mean mu,

    d = E[x - mu],   s = E[(x - mu)^2],   mean = mu + d,   variance = s - d^2   (biased, float32)

which is as exact near the optimum as two passes (E[x^2] - E[x]^2 cancels), and is linear in the images, so that a batch
split over devices is reduced by one mean of (d, s).
"""

import contextlib
from collections import Counter
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from dvinv.errors import DvinvError
from dvinv.inversion.losses import pmean

PRIVATE = 'dvinv_tap'  # the collection that moments are sown into
STATISTICS = 'batch_stats'  # Flax's collection of running statistics; the second choice for sowing
SOWN = 'dvinv_moments'  # the name of the sown variable


def running_statistics(variables) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{layer: (running mean, running variance)}, each [..., C]; layers are module paths such as 'stage1/bn0'."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables).get(STATISTICS, {}))
    owners = dict.fromkeys(path[:-1] for path in flat)
    return {
        '/'.join(owner): (flat[(*owner, 'mean')], flat[(*owner, 'var')])
        for owner in owners
        if (*owner, 'mean') in flat and (*owner, 'var') in flat
    }


def _owns_statistics(module: nn.Module) -> bool:
    return module.has_variable(STATISTICS, 'mean') and module.has_variable(STATISTICS, 'var')


def _shifted_moments(module: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(d, s) of the module docstring, over all axes of x but the module's feature axes."""
    axes = getattr(module, 'axis', -1)
    features = {a % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    mu = module.get_variable(STATISTICS, 'mean').astype(jnp.float32)
    shifted = x.astype(jnp.float32) - jnp.expand_dims(mu, reduced)
    return shifted.mean(reduced), jnp.square(shifted).mean(reduced)


@contextlib.contextmanager
def _sowing(collection: str, order: list[str]):
    """While open, every BatchNorm that is called sows its (d, s) into `collection`; `order` collects the layers."""
    calls = Counter()

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__' or not _owns_statistics(module):
            return call(*args, **kwargs)
        path = '/'.join(module.path)
        before = calls[path]
        result = call(*args, **kwargs)
        # A subclass that calls super().__call__ passes here twice; the innermost call is the normalisation itself.
        if calls[path] == before:
            x = args[0] if args else kwargs['x'] if 'x' in kwargs else next(iter(kwargs.values()))
            module.sow(collection, SOWN, _shifted_moments(module, x))
            calls[path] += 1
            order.append(path)
        return result

    with nn.intercept_methods(intercept):
        yield


class LinenTap:
    """Runs a Linen module in eval mode and hands out the moments of its BatchNorm inputs.

    Attributes:
      layers: the tapped layers in forward order.
      apply_fn: (variables, x [B, H, W, C]) -> logits [B, K].
    """

    def __init__(self, module: nn.Module, variables, example, call_kwargs: dict):
        """Finds, without computing anything, the way of tapping that reaches every layer with running statistics.

        Args:
          module: the network; `call_kwargs` are what it takes beside x in eval mode, for instance {'train': False}.
          variables: its variables (arrays or shapes), with `batch_stats`.
          example: the shape and dtype of an input, a `jax.ShapeDtypeStruct`.

        Raises:
          DvinvError: no running statistics, not in eval mode, wrong input shape, or layers out of reach (named).
        """
        self._module, self._kwargs = module, call_kwargs
        wanted = running_statistics(variables)
        if not wanted:
            raise DvinvError(
                f'{type(module).__name__} has no running statistics (nothing under batch_stats has a mean and a '
                'variance), so there is nothing to match; DeepInversion needs a network with BatchNorm.'
            )
        _check_call(self.apply_fn, variables, example, module, call_kwargs)
        missed, reasons = [], []
        # Lifted transforms (nn.scan, nn.vmap) silently drop collections that they were not told of, but carry batch_stats.
        for self._collection in (PRIVATE, STATISTICS):
            order = []
            try:
                _, moments = jax.eval_shape(lambda v, x: self._run(v, x, order), variables, example)  # noqa: B023
            except Exception as error:  # Flax and JAX raise many kinds here; the last one is told below
                reasons.append(f'{type(error).__name__}: {str(error).splitlines()[0]}')
                missed = list(wanted)
                continue
            missed = [layer for layer in wanted if layer not in moments or moments[layer][0].shape != wanted[layer][0].shape]
            if not missed:
                self.layers = tuple(dict.fromkeys(layer for layer in order if layer in wanted))
                return
        raise DvinvError(
            f'{type(module).__name__} keeps running statistics that the tap cannot reach: {", ".join(missed)}. Call each '
            'of these layers as module(x) once in the forward pass, and let lifted transforms carry batch_stats on a '
            f'mapped axis.{" (" + reasons[-1] + ")" if reasons else ""}'
        )

    def apply_fn(self, variables, x):
        """Logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._module.apply(variables, x, **self._kwargs)

    def __call__(self, variables, x, axis: str | None = None):
        """(logits [B, K], {layer: (mean, variance)} in forward order); moments over the mesh axis `axis` too, if named."""
        logits, moments = self._run(variables, x, [], axis)
        return logits, {layer: moments[layer] for layer in self.layers}

    def _run(self, variables, x, order: list[str], axis: str | None = None):
        with _sowing(self._collection, order):
            logits, sown = self._module.apply(variables, x, mutable=[self._collection], **self._kwargs)
        flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(sown).get(self._collection, {}))
        shifted = pmean({'/'.join(path[:-1]): calls for path, calls in flat.items() if path[-1] == SOWN}, axis)
        statistics = running_statistics(variables)
        return logits, {layer: _moments(statistics[layer][0], calls) for layer, calls in shifted.items()}


def _moments(running_mean, calls):
    """(mean, variance) of a layer from the (d, s) of its calls.

    The statistics of a layer called more than once a forward pass are running means over its calls: so are these.
    """
    mean = sum(running_mean.astype(jnp.float32) + d for d, _ in calls) / len(calls)
    variance = sum(s - jnp.square(d) for d, s in calls) / len(calls)
    return mean, variance


def _check_call(apply_fn: Callable, variables, example, module, call_kwargs) -> None:
    """Trace the network once, in eval mode, and say in a sentence why it cannot be run."""
    name, shape = type(module).__name__, 'x'.join(map(str, example.shape[1:]))
    try:
        logits = jax.eval_shape(apply_fn, variables, example)
    except flax.errors.ModifyScopeVariableError as error:
        raise DvinvError(
            f'{name} wants to update its running statistics, so it is not in eval mode: pass call_kwargs, for '
            "instance {'train': False} (now " + f'{call_kwargs}).'
        ) from error
    except flax.errors.InvalidRngError as error:
        raise DvinvError(
            f'{name} asks for random numbers (dropout?), so it is not in eval mode: pass call_kwargs, for '
            "instance {'deterministic': True} (now " + f'{call_kwargs}).'
        ) from error
    except Exception as error:
        raise DvinvError(
            f'{name} cannot be applied to images of shape {shape} with {call_kwargs}: '
            f'{type(error).__name__}: {str(error).splitlines()[0]}'
        ) from error
    if getattr(logits, 'ndim', None) != 2:
        raise DvinvError(
            f'{name} must return logits [B, K]; for images of shape {shape} it returns '
            f'{jax.tree.map(lambda a: tuple(a.shape), logits)}.'
        )
