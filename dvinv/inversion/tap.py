"""The BatchNorm tap: the moments of every BatchNorm input of an unmodified Flax network.

Any layer that owns running statistics (`batch_stats/mean` and `batch_stats/var`, or others with such names, as
`running_mean` and `running_var`, in any collection) counts as a BatchNorm, whatever its class. While the network runs,
the moments of what such a layer is called with are sown. They are taken in one pass, shifted by the frozen running mean mu,

    d = E[x - mu],   s = E[(x - mu)^2],   mean = mu + d,   variance = s - d^2   (biased, float32)

which is as exact near the optimum as two passes (E[x^2] - E[x]^2 cancels), and is linear in the images, so that a batch
split over devices is reduced by one mean of (d, s). The same ears can hand out the inputs themselves, the network's
features. `LinenTap` is here, `NnxTap` in nnx_tap.py.
"""

import abc
import contextlib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.errors import DvinvError, in_a_line, listed, say
from dvinv.inversion.losses import EPSILON, pmean
from dvinv.networks.channels.flat import flat_program
from dvinv.networks.classifier import join_names, name_of

PRIVATE = 'dvinv_tap'  # the collection that is sown into
STATISTICS = 'batch_stats'  # Flax's collection of running statistics; the second choice for sowing
SOWN = 'dvinv_heard'  # the name of the sown variable

# Words by which the names of a running mean and a running variance differ, and how either is known by its name alone.
NAMES = ('mean', 'var'), ('mean', 'variance'), ('Mean', 'Var'), ('Mean', 'Variance')
STATISTIC = re.compile(r'(?:^|[\W\d_])(?:mean|var|variance)(?:$|[\W\d_])|Mean|Var(?:iance)?$')

LISTENING = jax.make_user_context()  # what is heard: nn.jit must not take what it traced for one thing for the other

# Symptoms of a network in training mode, and what may put it right.
LEARNS = 'wants to update its running statistics', {'train': False}
DRAWS = 'asks for random numbers (dropout?)', {'deterministic': True}


def find_statistics(variables) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{layer: (path of its running mean, path of its running variance)}; layers are module paths such as 'stage1/bn0'.

    A path is (collection, names of modules, name of the variable). A mean and a variance are of one module and of one shape,
    and their names differ in these words alone. Of several pairs of a module that with Flax's own collection and names is
    taken, else the first. Outside of Flax's collection a module that has others within is none that normalises: there it may
    be the network, with the mean and variance of pixels.
    """
    flat, found = _non_intermediates(variables), {}
    outer = {path[1:end] for path in flat for end in range(1, len(path) - 1)}
    for path, leaf in sorted(flat.items(), key=lambda item: (item[0][0] != STATISTICS, item[0][-1] != 'mean')):
        for mean, variance in NAMES:
            mate = (*path[:-1], path[-1].replace(mean, variance))
            inner = path[0] == STATISTICS or path[1:-1] not in outer
            if inner and mate != path and np.shape(flat.get(mate)) == np.shape(leaf) != ():
                found.setdefault(join_names(path[1:-1]), (path, mate))
                break
    return found


def unpaired_statistics(variables) -> list[str]:
    """Paths of what is named as running statistics are, and is in no pair of `find_statistics`.

    The network's own constants, outside of all modules, are left out: those are of pixels.
    """
    paired = {path for pair in find_statistics(variables).values() for path in pair}
    return [
        join_names(path)
        for path in _non_intermediates(variables)
        if path not in paired
        and path[0] != 'params'
        and STATISTIC.search(path[-1])
        and (path[0] == STATISTICS or len(path) > 2)
    ]


def _non_intermediates(variables) -> dict:
    """{path: leaf} of all variables but the intermediates; those in `batch_stats` first."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables))
    kept = [item for item in flat.items() if item[0][0] not in ('intermediates', PRIVATE)]
    return dict(sorted(kept, key=lambda item: item[0][0] != STATISTICS))


def running_statistics(variables) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{layer: (running mean, running variance)}, each [..., C]; see `find_statistics`."""
    flat = _non_intermediates(variables)
    return {layer: (flat[mean], flat[variance]) for layer, (mean, variance) in find_statistics(variables).items()}


def input_of(args, kwargs) -> jax.Array:
    """What a layer that was called with these arguments normalises."""
    return args[0] if args else kwargs['x'] if 'x' in kwargs else next(iter(kwargs.values()))


def mask_of(layer, args, kwargs) -> jax.Array | None:
    """Returns the argument `mask` of a call of `layer`: the places that count in its moments, as of Flax's BatchNorm.

    Raises:
      DvinvError: the call has another array as argument, which may change the moments; names it. What has a number a
        channel, as scales and shifts have, is taken to be applied after the normalisation.
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
    """Whether an array of this shape cannot choose among the places of `x`, [B, ..., C]: it is [C], or [B, 1, ..., C].

    [B, D] neither, where that is no mask of the places of an image.
    """
    if len(shape) == 1 or len(x) < 3:
        return shape[-1] == x[-1] and set(shape[:-1]) <= {1}
    if len(shape) == 2 and shape[-1] != x[-1] and len(x) == 3:
        return False
    return len(shape) in (2, len(x)) and shape[0] in (1, x[0]) and set(shape[1:-1]) <= {1} and shape[-1] > 1


def whole_input(layer, running_mean: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """To hear the input x itself."""
    return x


def shifted_moments(layer, running_mean: jax.Array, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
    """To hear (d, s) of the file's docstring, float32, of the input x of `layer`, over all but its feature axes (`axis`).

    With a mask, over the places where it is true: (p d, p s, p), where p is their share.
    """
    axes = getattr(layer, 'axis', -1)
    features = {a % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    shifted = x.astype(jnp.float32) - jnp.expand_dims(running_mean.astype(jnp.float32), reduced)
    if mask is None:
        return shifted.mean(reduced), jnp.square(shifted).mean(reduced)
    mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
    shifted = jnp.where(mask, shifted, 0)
    return shifted.mean(reduced), jnp.square(shifted).mean(reduced), mask.mean(reduced, dtype=jnp.float32)


def _moments(running_mean, calls):
    """(mean, variance) of a layer from the (d, s) of its calls, or (p d, p s, p) of masked ones.

    The statistics of a layer called more than once a forward pass are running means over its calls: so are these.
    """
    calls = [tuple(x / jnp.maximum(p[0], EPSILON) for x in (d, s)) if p else (d, s) for d, s, *p in calls]
    mean = sum(running_mean.astype(jnp.float32) + d for d, _ in calls) / len(calls)
    variance = sum(s - jnp.square(d) for d, s in calls) / len(calls)
    return mean, variance


class Tap(abc.ABC):
    """Runs a network in eval mode and hands out the moments of its BatchNorm inputs.

    A subclass knows how to run its kind of network: `apply_fn` and `_listen`.

    Attributes:
      layers: the tapped layers in forward order.
    """

    ways = (None,)  # what may be sown into, first choice first

    def __init__(self, network, variables, example, call_kwargs: dict, logits: Callable | None):
        """Finds, without computing anything, the way of tapping that reaches every layer with running statistics.

        Args:
          network: a module or model; for what the sentences call it see `name_of`.
          variables: its variables (arrays or shapes), with `batch_stats`.
          example: the shape and dtype of an input, a `jax.ShapeDtypeStruct`.
          call_kwargs: what it takes beside x in eval mode, for instance {'train': False}.
          logits: finds the logits in what it returns; None: these are the logits.

        Raises:
          DvinvError: incomplete variables, no running statistics, not in eval mode, wrong input shape, no logits of two
            classes or more, or layers out of reach (named). What is left out instead, since it is not used in eval mode or
            is not in Flax's own place, is printed to stderr.
        """
        self._name, self._kwargs, self._places = (name := name_of(network)), call_kwargs, find_statistics(variables)
        call = inspect.signature(type(network).__call__) if callable(network) else inspect.Signature()
        self._parameters = [*call.parameters.values()][2:]  # after the network itself and x
        self._pick = logits or (lambda returned: returned)
        wanted = running_statistics(variables)
        if not wanted:
            self._refuse_incomplete(variables, example)
            raise DvinvError(
                f'{name} has no running statistics (nothing under batch_stats has a mean and a '
                'variance), so there is nothing to match; DeepInversion needs a network with BatchNorm.'
            )
        self._check_call(variables, example)
        tries = []
        for way in self.ways:
            self._way, calls, moments, reason = way, Counter(), {}, ''
            try:
                # What nn.jit has traced before would not be traced again, nor its layers counted.
                with jax.disable_jit():
                    _, moments = jax.eval_shape(lambda v, x: self._run(v, x, calls), variables, example)  # noqa: B023
            except DvinvError:
                raise
            except Exception as error:  # Flax and JAX raise many kinds here; the last one is told below
                reason = f' ({in_a_line(error)})'
            missed = [layer for layer in wanted if layer not in moments or moments[layer][0].shape != wanted[layer][0].shape]
            tries.append((len(missed), way, calls, missed, reason))
            if not missed:
                break
        _, self._way, calls, missed, _ = min(tries, key=lambda one: one[0])
        idle = self._idle(variables, example) if missed else set()
        foreign = [layer for layer in missed if layer not in idle and not self._is_of_flax(layer)]
        unreached = [layer for layer in missed if layer not in idle and layer not in foreign]
        self.layers = tuple(layer for layer in calls if layer in wanted and layer not in missed)
        if unreached or not self.layers:
            raise DvinvError(
                f'{name} keeps running statistics that the tap cannot reach: {", ".join(unreached or missed)}. Call each '
                'of these layers as module(x) once in the forward pass, and let lifted transforms carry batch_stats on a '
                f'mapped axis.{tries[-1][-1]}'
            )
        if idle:
            say(f'{name} does not use {listed(sorted(idle))} in eval mode, so their running statistics are left out.')
        foreign = [join_names(path) for layer in foreign for path in self._places[layer]]
        if others := [*foreign, *unpaired_statistics(variables)]:
            say(f'{name} has {listed(others)}, named as running statistics, but no layer is known to use them: left out.')
        self._places = {layer: self._places[layer] for layer in self.layers}

    def _refuse_incomplete(self, variables, example) -> None:
        """Refuses variables without some of the network's parameters or running statistics."""
        return  # an NNX model has all of its

    def _is_of_flax(self, layer: str) -> bool:
        mean, variance = self._places[layer]
        return (mean[0], mean[-1], variance[-1]) == (STATISTICS, 'mean', 'var')

    def _idle(self, variables, example) -> set[str]:
        """The layers with running statistics that no logit depends on: those that training alone calls."""
        program = flat_program(jax.make_jaxpr(self.apply_fn)(variables, example))
        needed = {value for value in program.outputs if isinstance(value, int)}
        for operation in reversed(program.operations):
            if needed.intersection(operation.outputs):
                needed.update(value for value in operation.inputs if isinstance(value, int))
        paths = [
            tuple(getattr(key, 'key', None) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)
        ]
        used = {path for path, value in zip(paths, program.inputs[: len(paths)], strict=True) if value in needed}
        return {layer for layer, pair in self._places.items() if not used.intersection(pair)}

    @abc.abstractmethod
    def apply_fn(self, variables, x):
        """Logits [B, K] of normalised images x [B, H, W, C], in eval mode."""

    @abc.abstractmethod
    def _listen(self, variables, x, calls: Counter, hear: Callable):
        """(logits, {layer: what is heard of each of its calls}), sown in `self._way`.

        `hear` is `shifted_moments` or `whole_input`. While JAX traces, `calls` counts the calls of each layer, the first to
        be called first.
        """

    def __call__(self, variables, x, axis: str | None = None):
        """(logits [B, K], {layer: (mean, variance)} in forward order); moments over the mesh axis `axis` too, if named."""
        logits, moments = self._run(variables, x, Counter(), axis)
        return logits, {layer: moments[layer] for layer in self.layers}

    def features(self, variables, x):
        """(logits [B, K], {layer: its BatchNorm input at each of its calls} in forward order).

        An input is [B, ...]; that of layers stacked by nn.scan or nn.vmap has their axis before it.
        """
        logits, heard = self._listen(variables, x, Counter(), whole_input)
        return logits, {layer: heard[layer] for layer in self.layers}

    def _run(self, variables, x, calls: Counter, axis: str | None = None):
        logits, sown = self._listen(variables, x, calls, shifted_moments)
        statistics = running_statistics(variables)
        return logits, {layer: _moments(statistics[layer][0], heard) for layer, heard in pmean(sown, axis).items()}

    def _check_call(self, variables, example) -> None:
        """Trace the network once, in eval mode, and say in a sentence why it cannot be run."""
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
        """{name: default, or `inspect.Parameter.empty`} of what the network takes beside x and `call_kwargs`."""
        named = [p for p in self._parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: p.default for p in named if p.name not in self._kwargs}

    def _call_hint(self) -> str:
        """Returns the end of a sentence, which names what the network must be called with besides x; '' for nothing."""
        needed = [name for name, default in self._arguments().items() if default is inspect.Parameter.empty]
        values = ', '.join(f'{name!r}: ...' for name in needed)
        return (
            f'. It takes {listed(needed)} beside x; give the value of eval mode: call_kwargs={{{values}}}.' if needed else ''
        )


def _way_out(returned) -> str:
    """Returns how the logits [B, K] can be found in what a network returned."""
    found = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(returned)
        if getattr(leaf, 'ndim', None) == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if not found or not found[0]:
        return 'Wrap it in a module that returns the logits alone.'
    return f'Say which of these are the logits: logits=lambda out: out{jax.tree_util.keystr(found[0])}, for instance.'


class LinenTap(Tap):
    """The tap of a Linen module: an interceptor sows what every owner of running statistics is called with."""

    # Lifted transforms (nn.scan, nn.vmap) silently drop collections that they were not told of, but carry batch_stats.
    ways = (PRIVATE, STATISTICS)

    def __init__(self, module: nn.Module, variables, example, call_kwargs: dict, logits: Callable | None = None):
        """See `Tap`."""
        self._module = module
        super().__init__(module, variables, example, call_kwargs, logits)

    def _refuse_incomplete(self, variables, example) -> None:
        try:
            whole = jax.eval_shape(functools.partial(self._module.init, **self._kwargs), jax.random.key(0), example)
        except Exception:  # the user's network runs; where it fails, another sentence tells why
            return
        expected, there = (_non_intermediates(tree) for tree in (whole, variables))
        if missing := [join_names(p) for p in expected if p[0] in ('params', STATISTICS) and p not in there]:
            raise DvinvError(
                f'The variables of {self._name} are incomplete: they do not have {listed(missing, 4)}. Pass all that '
                "module.init returned, as they are after training: {'params': ..., 'batch_stats': ...}."
            )

    def apply_fn(self, variables, x):
        """Logits [B, K] of normalised images x [B, H, W, C], in eval mode."""
        return self._pick(self._module.apply(variables, x, **self._kwargs))

    def _listen(self, variables, x, calls: Counter, hear: Callable):
        with LISTENING(hear), _sowing(self._way, calls, hear, self._places):
            returned, sown = self._module.apply(variables, x, mutable=[self._way], **self._kwargs)
        return self._pick(returned), _heard(sown, self._way)


def features_in_training(module: nn.Module, variables, x, rngs: dict, head: str = ''):
    """A forward pass in train mode: (logits [B, K], features as of `Tap.features`, the new running statistics).

    Args:
      module: takes x and `train`.
      rngs: {'dropout': key}.
      head: path of a layer, 'Dense_1' for instance, that is heard beside the BatchNorm layers: features[head] is one pair,
        what it is called with, and what it answers to that, detached (gradients reach its weights and nothing before it).
    """
    places = find_statistics(variables)
    with LISTENING((whole_input, head)), _sowing(PRIVATE, Counter(), whole_input, places), _hearing_head(head):
        logits, changed = module.apply(variables, x, train=True, mutable=[STATISTICS, PRIVATE], rngs=rngs)
    return logits, _heard(changed, PRIVATE), changed.get(STATISTICS, {})


@contextlib.contextmanager
def _hearing_head(path: str):
    """While open, the layer at `path` sows (its input, its answer to the detached input)."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__' or join_names(module.path) != path:
            return call(*args, **kwargs)
        x = input_of(args, kwargs)
        answers, detached = jnp.split(call(jnp.concatenate([x, jax.lax.stop_gradient(x)])), 2)  # Flax allows one call
        module.sow(PRIVATE, SOWN, (x, detached))
        return answers

    with nn.intercept_methods(intercept) if path else contextlib.nullcontext():
        yield


def _heard(sown, collection: str) -> dict:
    """{layer: what was heard of each of its calls} in what a Linen module has sown."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(sown).get(collection, {}))
    return {join_names(path[:-1]): heard for path, heard in flat.items() if path[-1] == SOWN}


@contextlib.contextmanager
def _sowing(collection: str, calls: Counter, hear: Callable, places: dict):
    """Sows what `hear` returns for each call of a Linen layer in `places` into `collection`, and counts it in `calls`."""

    def intercept(call, args, kwargs, context):
        module = context.module
        layer = join_names(module.path)
        if context.method_name != '__call__' or not _owns_statistics(module, places.get(layer)):
            return call(*args, **kwargs)
        before = calls[layer]
        result = call(*args, **kwargs)
        # A subclass that calls super().__call__ passes here twice; the innermost call is the normalisation itself.
        if calls[layer] == before:
            mean, _ = places[layer]
            mask = mask_of(module, args, kwargs)
            module.sow(collection, SOWN, hear(module, module.get_variable(mean[0], mean[-1]), input_of(args, kwargs), mask))
            calls[layer] += 1
        return result

    with nn.intercept_methods(intercept):
        yield


def _owns_statistics(module: nn.Module, places) -> bool:
    return places is not None and all(module.has_variable(path[0], path[-1]) for path in places)
