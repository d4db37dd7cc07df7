"""The compiled programs of an inversion, mapped over a device mesh: initial parameters, many iterations, final images.

`bn_stats = 'device'`: each device inverts a whole batch of its own, as under `pmap`, without any communication.
`bn_stats = 'global'`: one batch is split over the devices, and its losses are those of the whole batch. The devices may
belong to several processes, which must then all make the same calls.

`executed` and `in_precision` change how a network's function is computed, not the function itself; the user's network stays
unmodified.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.config import InversionConfig, Stage
from dvinv.graph.program import recomputed
from dvinv.inversion import losses
from dvinv.inversion.step import InversionState, initial_parameters, make_chunk, make_decode, make_step, pixel_scale_of, view
from dvinv.inversion.teacher import Teacher
from dvinv.networks.classifier import Classifier, cast_floats
from dvinv.networks.suited import suited_to
from dvinv.runtime.devices import AXIS, fetch, place, platform_of
from dvinv.runtime.errors import DvinvError

Network = TypeVar('Network', bound=Classifier)
PROGRAMS_KEPT = 16  # cached programs; each holds networks and compiled code, but no weights


def executed(teacher: Teacher, student_fn: Callable | None, config: InversionConfig, platform: str):
    """Returns (teacher, student_fn) with forward passes run as set in `config` and in a form that suits the platform.

    Args:
      teacher: The network to invert.
      student_fn: (student_variables, x) -> logits, or None.
      config: The settings; `recompute` and `precision` are applied.
      platform: 'cpu', 'gpu' or 'tpu'.
    """

    def run(fn: Callable) -> Callable:
        fn = suited_to(platform, fn)
        if config.recompute:
            fn = recomputed(fn, config.recompute)
        return in_bfloat16(fn) if config.precision == 'bfloat16' else fn

    return dataclasses.replace(teacher, tap=teacher.tap.rewritten(run)), student_fn and run(student_fn)


def in_precision(network: Network, precision: str) -> Network:
    """Returns `network`, a Classifier or Teacher, with its logits and features computed in `precision`."""
    if precision == 'float32':
        return network
    fields: dict[str, Any] = {
        name: in_bfloat16(getattr(network, name)) for name in ('apply_fn', 'features') if hasattr(network, name)
    }
    return dataclasses.replace(network, **fields)


def in_bfloat16(fn: Callable) -> Callable:
    """Returns `fn(variables, x)` computed with images and trained weights in bfloat16.

    Running statistics stay float32, and so do the moments that are compared with them: the tap computes its sums in float32.
    """

    def run(variables, x):
        params = cast_floats(variables['params'], jnp.bfloat16)
        return fn({**variables, 'params': params}, x.astype(jnp.bfloat16))

    return run


def programs_of(teacher: Teacher, config: InversionConfig, mesh: Mesh, student_fn: Callable | None = None) -> 'Programs':
    """Returns `Programs` without variables; the last few are cached, so that a process compiles the same inversion once.

    Two inversions are the same if the teachers have the same functions (the same `tap`), whatever their variables, the
    configs are equal, and the devices and `student_fn` are the same.
    """
    return _kept(Programs, dataclasses.replace(teacher, variables=None), config, mesh, student_fn)


def make_feature_loss(teacher: Teacher, stage: Stage) -> Callable:
    """Returns a compiled function that computes R_feature, with layer weights of 1, of images augmented as in `stage`.

    The last few are cached, as by `programs_of`.

    Returns:
      `(variables, images [B, H, W, C] normalised, key) -> R_feature`, a float32 scalar. It is NaN for a network without
      statistics.
    """
    return _kept(_feature_loss, dataclasses.replace(teacher, variables=None), stage, jax.default_backend())


def _feature_loss(teacher: Teacher, stage: Stage, backend: str) -> Callable:
    tap = suited_to(backend, teacher.tap)

    @jax.jit
    def measure(variables, images, key):
        _, shown = view(teacher, stage, images, key)
        _, moments = tap(variables, shown)
        return losses.feature_loss(losses.feature_terms(moments, teacher.statistics(variables)))

    return measure


def _kept(make: Callable, *arguments):
    """Returns `make(*arguments)`; the results of the last few calls are cached."""
    try:
        hash(arguments)
    except TypeError:  # for example, stages in a list
        return make(*arguments)
    return _cached(make, *arguments)


@functools.lru_cache(PROGRAMS_KEPT)
def _cached(make: Callable, *arguments):
    return make(*arguments)


class Programs:
    """The programs that the devices of one mesh run for one teacher and one config; each is compiled at its first call.

    In `device` mode all arrays but the weights have a leading axis with one batch per device.

    Attributes:
      dispatch: The number of iterations in a chunk.
      variables: The teacher's variables, placed as `advance` takes them, or None if the teacher has none.
      checked: Whether the network is known to take images of the resolutions of all stages.
      advance: (stage, iterations) -> program. The program (state, labels, variables, student_variables) -> (state, metrics)
        runs that many iterations. The state is donated; metrics are [n, iterations], or [iterations] if the batch is split.
    """

    def __init__(self, teacher: Teacher, config: InversionConfig, mesh: Mesh, student_fn: Callable | None = None):
        """Prepares the programs without compiling them; see `invert.make_inverter` for the arguments."""
        platform = platform_of(mesh)
        self._teacher, self._student_fn = executed(teacher, student_fn, config, platform)
        self._config, self._mesh, self._split = config, mesh, config.bn_stats == 'global'
        self._mapped = (_over_one_batch if self._split else _over_batches)(mesh)
        self.advance = functools.cache(self._advance)
        self._make_begin, self._make_restart = functools.cache(self._begin_program), functools.cache(self._restart_program)
        self._finish = self._mapped(
            make_decode(config.parameterization, config.contrast, teacher, pixel_scale_of(config.pixel_scale, teacher))
        )
        self.dispatch = config.iterations_per_dispatch or (1 if platform == 'cpu' else 100)
        self.variables = self.everywhere(teacher.variables)
        self.checked = False

    def everywhere(self, variables):
        """Places weights on every device."""
        return place(variables, NamedSharding(self._mesh, P()))

    def labels(self, labels: np.ndarray) -> jax.Array:
        """Places labels int [n, B] on the devices of their images; returns [n, B], or [B] if the batch is split."""
        return place(labels[0] if self._split else labels, NamedSharding(self._mesh, P(AXIS)))

    def begin(self, keys: jax.Array, batch_size: int) -> InversionState:
        """Returns the state before the first stage, with initial parameters drawn from the keys [n] of the batches."""
        # Arrays are placed as the programs return them, since the first call would otherwise compile for another placement.
        batchwise = NamedSharding(self._mesh, P() if self._split else P(AXIS))
        iteration = np.zeros((), np.int32) if self._split else np.zeros(len(keys), np.int32)
        parameters, step_keys = self._make_begin(batch_size)(place(keys[0] if self._split else keys, batchwise))
        return InversionState(parameters, None, place(iteration, batchwise), step_keys)

    def restart(self, stage: Stage, state: InversionState) -> InversionState:
        """Returns the state with a new optimizer state, for the first iteration of `stage`."""
        return state.replace(opt_state=self._make_restart(stage)(state.parameters))

    def take(self, state: InversionState) -> list[list[np.ndarray]]:
        """Copies a state to the host; returns for each batch the leaves of parameters, optimizer state and iteration."""
        leaves = fetch(jax.tree.leaves((state.parameters, state.opt_state, state.iteration)), self._mesh)
        if self._split:
            leaves = [leaf[None] for leaf in leaves]
        # Copies, because on CPU a fetched array is the buffer itself, which is donated to the next dispatch.
        return [[np.array(leaf[row]) for leaf in leaves] for row in range(len(leaves[0]))]

    def put(self, stage: Stage, state: InversionState, taken: list[list[np.ndarray]]) -> InversionState:
        """Returns the state in the middle of `stage` that `take` returned as `taken`.

        Args:
          stage: The stage of that state.
          state: The state of the same batches before the first stage, as returned by `begin`.
          taken: The result of `take`.
        """
        state = self.restart(stage, state)  # a state of the right structure, placed on the right devices
        placed_leaves, tree = jax.tree.flatten((state.parameters, state.opt_state, state.iteration))
        leaves = taken[0] if self._split else [np.stack(rows) for rows in zip(*taken, strict=True)]
        leaves = [place(leaf, placed.sharding) for leaf, placed in zip(leaves, placed_leaves, strict=True)]
        parameters, opt_state, iteration = jax.tree.unflatten(tree, leaves)
        return state.replace(parameters=parameters, opt_state=opt_state, iteration=iteration)

    def _advance(self, stage: Stage, iterations: int) -> jax.stages.Wrapped:
        step = make_step(self._teacher, self._config, stage, self._student_fn, AXIS if self._split else None)
        return self._mapped(make_chunk(step, iterations), weights=2, donate=True)

    def finish(self, state: InversionState) -> np.ndarray:
        """Decodes a state's parameters; returns images [n, B, H, W, C] float32 on the host."""
        images = fetch(self._finish(state.parameters), self._mesh)
        return images[None] if self._split else images

    def _begin_program(self, batch_size: int) -> Callable:
        return self._mapped(lambda key: initial_parameters(key, batch_size, self._teacher.image_shape))

    def _restart_program(self, stage: Stage) -> Callable:
        return self._mapped(stage.make_optimizer().init)


def _over_batches(mesh: Mesh):
    """Returns a transform that maps a program for one batch over the mesh, with one batch per device.

    Every argument but the weights, which come last, has a leading axis for the batches.
    """

    def wrap(program, weights: int = 0, donate: bool = False):
        def local(*args):
            batch = jax.tree.map(lambda a: a[0], args[: len(args) - weights])
            return jax.tree.map(lambda a: a[None], program(*batch, *args[len(args) - weights :]))

        def mapped(*args):
            specs = (P(AXIS),) * (len(args) - weights) + (P(),) * weights
            # Devices that communicate nothing need no check of it, which JAX 0.12.0 fails for exact GELUs (lax.polynomial).
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)(*args)

        return jax.jit(mapped, donate_argnums=0 if donate else ())

    return wrap


def _over_one_batch(mesh: Mesh):
    """Returns a transform that splits one batch over the mesh: arrays [B, H, W, C], of 4 axes, are split on the first."""

    def spec(a):
        return P(AXIS) if a.ndim == 4 else P()

    def wrap(program, weights: int = 0, donate: bool = False):
        def mapped(*args):
            if not weights:  # the programs that make images and optimizer states have nothing to communicate
                return jax.tree.map(
                    lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec(a))), program(*args)
                )
            state, _, *frozen = args
            specs = (jax.tree.map(spec, state), P(AXIS), *(P() for _ in frozen))
            try:
                return jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(specs[0], P()))(*args)
            except ValueError as error:
                if 'polynomial requires varying manual axes' not in str(error):
                    raise
                raise DvinvError(
                    f'JAX {jax.__version__} cannot split a network with exact GELUs over devices: its lax.polynomial fails '
                    "there. Take bn_stats='device', which inverts whole batches, or another version of JAX."
                ) from error

        return jax.jit(mapped, donate_argnums=0 if donate else ())

    return wrap
