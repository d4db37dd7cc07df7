"""The compiled programs of an inversion, mapped over a device mesh: the first parameters, many iterations, the images.

`bn_stats = 'device'`: each device inverts whole batches of its own (what `pmap` meant), without any communication.
`bn_stats = 'global'`: one batch is split over the devices; its losses are those of the whole batch. The devices may be of
several processes, all of which then make the same calls.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.config import InversionConfig, Stage
from dvinv.inversion.execution import executed
from dvinv.inversion.parameterization import initial_parameters, make_decode, pixel_scale_of
from dvinv.inversion.step import InversionState, make_chunk, make_step
from dvinv.inversion.teacher import Teacher
from dvinv.runtime.devices import AXIS, fetch, place, platform_of

PROGRAMS_KEPT = 8  # of different inversions; they hold networks and compiled code, but no weights


def programs_of(teacher: Teacher, config: InversionConfig, mesh: Mesh, student_fn: Callable | None = None) -> 'Programs':
    """Returns `Programs` without variables; the last few are kept, so that the same inversion is compiled once a process.

    The same is one of a teacher with the same functions (the same `tap`), whatever its variables, with an equal config, on
    the same devices, against the same `student_fn`.
    """
    arguments = dataclasses.replace(teacher, variables=None), config, mesh, student_fn
    try:
        hash(arguments)
    except TypeError:  # stages in a list, say
        return Programs(*arguments)
    return _kept(*arguments)


class Programs:
    """What the devices of one mesh run for one teacher and one config; each program is compiled at its first call.

    In `device` mode all arrays but the weights have a leading axis, a batch a device.

    Attributes:
      dispatch: iterations that a chunk should have.
      variables: the teacher's, where `advance` wants them; None where it came without.
      checked: whether the network takes images of all stages' resolutions, as far as is known.
      advance: (stage, iterations) -> the program (state, labels, variables, student_variables) -> (state, metrics) of so
        many iterations. The state is donated; metrics are [n, iterations], or [iterations] of a batch that is split.
    """

    def __init__(self, teacher: Teacher, config: InversionConfig, mesh: Mesh, student_fn: Callable | None = None):
        """Compiles nothing yet; see `invert.make_inverter` for the arguments."""
        platform = platform_of(mesh)
        self._teacher, self._student_fn = executed(teacher, student_fn, config, platform)
        self._config, self._mesh, self._split = config, mesh, config.bn_stats == 'global'
        self._mapped = (_over_one_batch if self._split else _over_batches)(mesh)
        self._begin, self._restart, self.advance = map(functools.cache, (self._begin, self._restart, self._advance))
        self._finish = self._mapped(
            make_decode(config.parameterization, config.contrast, teacher, pixel_scale_of(config.pixel_scale, teacher))
        )
        self.dispatch = config.iterations_per_dispatch or (1 if platform == 'cpu' else 100)
        self.variables = self.everywhere(teacher.variables)
        self.checked = False

    def everywhere(self, variables):
        """Weights, on every device."""
        return place(variables, NamedSharding(self._mesh, P()))

    def labels(self, labels: np.ndarray) -> jax.Array:
        """Labels int [n, B], each on the device that has its image: [n, B], or [B] of a batch that is split."""
        return place(labels[0] if self._split else labels, NamedSharding(self._mesh, P(AXIS)))

    def begin(self, keys: jax.Array, batch_size: int) -> InversionState:
        """Before the first stage: initial parameters from the keys [n] of the batches."""
        # Everything is put where the programs leave it, or the first call would be compiled for another placement.
        batchwise = NamedSharding(self._mesh, P() if self._split else P(AXIS))
        iteration = np.zeros((), np.int32) if self._split else np.zeros(len(keys), np.int32)
        parameters, step_keys = self._begin(batch_size)(place(keys[0] if self._split else keys, batchwise))
        return InversionState(parameters, None, place(iteration, batchwise), step_keys)

    def restart(self, stage: Stage, state: InversionState) -> InversionState:
        """Adam anew, for the first iteration of `stage`."""
        return state.replace(opt_state=self._restart(stage)(state.parameters))

    def take(self, state: InversionState) -> list[list[np.ndarray]]:
        """What a state consists of, on the host: of each batch the leaves of parameters, optimizer state and iteration."""
        leaves = fetch(jax.tree.leaves((state.parameters, state.opt_state, state.iteration)), self._mesh)
        if self._split:
            leaves = [leaf[None] for leaf in leaves]
        # Copies: on CPU a fetched array is the buffer itself, which the next dispatch is given to overwrite.
        return [[np.array(leaf[row]) for leaf in leaves] for row in range(len(leaves[0]))]

    def put(self, stage: Stage, state: InversionState, taken: list[list[np.ndarray]]) -> InversionState:
        """The state in the middle of `stage` that was `taken`, of the batches that `state` is the beginning of."""
        state = self.restart(stage, state)  # tells where everything lies
        there, tree = jax.tree.flatten((state.parameters, state.opt_state, state.iteration))
        leaves = taken[0] if self._split else [np.stack(rows) for rows in zip(*taken, strict=True)]
        placed = [place(leaf, old.sharding) for leaf, old in zip(leaves, there, strict=True)]
        parameters, opt_state, iteration = jax.tree.unflatten(tree, placed)
        return state.replace(parameters=parameters, opt_state=opt_state, iteration=iteration)

    def _advance(self, stage: Stage, iterations: int) -> Callable:
        step = make_step(self._teacher, self._config, stage, self._student_fn, AXIS if self._split else None)
        return self._mapped(make_chunk(step, iterations), weights=2, donate=True)

    def finish(self, state: InversionState) -> np.ndarray:
        """The images [n, B, H, W, C] float32 that a state's parameters are decoded to."""
        images = fetch(self._finish(state.parameters), self._mesh)
        return images[None] if self._split else images

    def _begin(self, batch_size: int):
        return self._mapped(lambda key: initial_parameters(key, batch_size, self._teacher.image_shape))

    def _restart(self, stage: Stage):
        return self._mapped(stage.make_optimizer().init)


_kept = functools.lru_cache(PROGRAMS_KEPT)(Programs)


def _over_batches(mesh: Mesh):
    """Map a per-batch program over the mesh: every argument but the weights has a leading axis, one batch a device."""

    def wrap(program, weights: int = 0, donate: bool = False):
        def local(*args):
            mine = jax.tree.map(lambda a: a[0], args[: len(args) - weights])
            return jax.tree.map(lambda a: a[None], program(*mine, *args[len(args) - weights :]))

        def mapped(*args):
            specs = (P(AXIS),) * (len(args) - weights) + (P(),) * weights
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(AXIS))(*args)

        return jax.jit(mapped, donate_argnums=0 if donate else ())

    return wrap


def _over_one_batch(mesh: Mesh):
    """Split the images of one batch over the mesh: what is shaped like images [B, ...] is cut on its first axis."""

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
            return jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(specs[0], P()))(*args)

        return jax.jit(mapped, donate_argnums=0 if donate else ())

    return wrap
