"""The train step of all networks: the job that defines it, the images of each update, the state, and its compiled programs.

Randomness is a function of the seed and the number of the update only, so a state and its job determine all later states.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32

from dvinv.config import Settings, TrainingSettings
from dvinv.data.dataset import HostBatches, ResidentBatches, fits_on_devices
from dvinv.inversion.augmentation import augmentation_of
from dvinv.inversion.linen_modules import features_in_training
from dvinv.networks import Classifier, initialise, shapes_of
from dvinv.networks.classifier import Images, Labels, Pixels, Scalar, cast_floats, flatten, shapes_by_path, unflatten
from dvinv.networks.naming import grown
from dvinv.networks.suited import suited_to
from dvinv.runtime.devices import AXIS, place, platform_of

STREAMED_BYTES = 2**28  # most bytes of images in one dispatch, where images are streamed from the host


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The schedule by which images become available to a training.

    `images` new images are added at the start of each of `count` rounds. A round lasts `updates` updates, and the last round
    lasts to the end of the training. A single round stands for a pool that is finished before the student's first update.
    """

    images: int
    count: int = 1
    updates: int = 1

    @property
    def total(self) -> int:
        """The number of images of all rounds."""
        return self.count * self.images

    def round_of(self, update: int) -> int:
        """Returns the number of the round that an update belongs to."""
        return min(update // self.updates, self.count - 1)

    def available_at(self, update: int) -> int:
        """Returns the number of images that are available when an update is made."""
        return (self.round_of(update) + 1) * self.images

    def first_update(self, round_number: int) -> int:
        """Returns the update before which the images of a round are made."""
        return round_number * self.updates


def rounds_of(settings: Settings) -> Rounds:
    """Returns the schedule by which the images of the run's own pool become available to the student."""
    size = settings.round_images
    count = settings.synthesis.images // size
    return Rounds(size - settings.held_out_of(size), count, max(1, settings.distillation.updates_per_round))


def chosen_images(seed: int, update: int, batch_size: int, rounds: Rounds) -> Int32[np.ndarray, ' B']:
    """Returns the row numbers of the images in the batch of an update, int32 [B].

    A round begins with one shuffled epoch of its new images, and continues with shuffled epochs of all images that are
    available so far.
    """
    number = rounds.round_of(update)
    earlier, available = number * rounds.images, (number + 1) * rounds.images
    first = (update - rounds.first_update(number)) * batch_size  # position of the batch in the sequence of the round

    def epoch_of(position: int) -> int:
        return max(0, 1 + (position - rounds.images) // available)

    chosen = []
    for epoch in range(epoch_of(first), epoch_of(first + batch_size - 1) + 1):
        start = rounds.images + (epoch - 1) * available if epoch else 0  # position of the epoch's first image
        part = slice(max(0, first - start), first + batch_size - start)
        count, offset = (available, 0) if epoch else (rounds.images, earlier)
        chosen.append(offset + _shuffled(count, seed, epoch, number)[part])
    return np.concatenate(chosen).astype(np.int32)


@functools.lru_cache(maxsize=4)  # the end of an epoch and the start of the next one, for two sets of images
def _shuffled(count: int, *seeds: int) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(count)


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """The loss, settings and image schedule of a training.

    Attributes:
      settings: the settings of the training.
      loss_fn: (logits, features, x, labels, frozen, progress) -> scalar. x is the augmented, normalised batch [B, H, W, C];
        features are the BatchNorm inputs of the network (see `linen_modules.features_in_training`) or the features that
        `forward` returns; progress is the fraction of the updates that are done.
      rounds: the schedule by which the images become available.
      frozen: further variables that `loss_fn` needs, for instance those of a teacher.
      second_rounds: the schedule of a second set of images, which follow the first ones in the arrays; the second half of
        every batch is drawn from them. None for a single set.
      head: the path of a layer that is captured too, see `inversion.linen_modules.features_in_training`.
      forward: (variables, auxiliary, x, rngs, frozen, progress) -> (logits, features for the loss, running statistics), the
        forward pass in train mode. None for `features_in_training`.
      auxiliary: initial values of the parameters that are trained with the network and discarded afterwards, for instance
        projections.
    """

    settings: TrainingSettings
    loss_fn: Callable
    rounds: Rounds
    frozen: dict | None = None
    second_rounds: Rounds | None = None
    head: str = ''
    forward: Callable | None = None
    auxiliary: Mapping = dataclasses.field(default_factory=dict)

    def rows(self, seed: int, update: int) -> Int32[np.ndarray, ' B']:
        """Returns the row numbers of the images in the batch of an update, int32 [B]."""
        size = self.settings.batch_size
        if self.second_rounds is None:
            return chosen_images(seed, update, size, self.rounds)
        first = chosen_images(seed, update, size // 2, self.rounds)
        # Another seed, since two sets of equal size would be shuffled in the same order.
        second = chosen_images(2**32 + seed, update, size // 2, self.second_rounds)
        return np.concatenate([first, self.rounds.total + second])

    @property
    def images(self) -> int:
        """The number of images that the training uses in all."""
        return self.available_at(self.settings.updates - 1)

    def available_at(self, update: int) -> int:
        """Returns the number of images that must be available for this update."""
        if self.second_rounds is None:
            return self.rounds.available_at(update)
        return self.rounds.total + self.second_rounds.available_at(update)

    def dispatch_length(self, every: int, platform: str) -> int:
        """Returns the number of updates in a full dispatch on `platform`.

        It is the largest divisor of `every` that does not exceed the dispatch length of the settings.
        """
        return _largest_divisor(every, self.settings.dispatch_length(platform))


def _largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in range(1, min(most, number) + 1) if number % divisor == 0)


@flax.struct.dataclass
class TrainState:
    """The state that a train step updates.

    Attributes:
      params, batch_stats: the variables of the network, float32.
      auxiliary: parameters that are trained with the network and discarded afterwards, see `TrainJob`.
      opt_state: the state of the optimizer, for (params, auxiliary).
      step: the number of updates done, int32 scalar.
    """

    # Dicts of arrays, or what JAX and Orbax put in their places in trees of the same structure.
    params: Any
    batch_stats: Any
    auxiliary: Any
    opt_state: Any
    step: Any

    @property
    def variables(self) -> dict:
        """The variables of the network, in the form that a Linen module takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def initial_variables(module, key: jax.Array, image_shape, start: dict | None) -> dict:
    """Returns the variables of a network before its training.

    Args:
      module: the Linen module of the network.
      key: the random key of the initialisation.
      image_shape: H, W, C.
      start: variables to start from: all of them, those of some of the layers, or those of a network with fewer classes
        (see `networks.naming.grown`). All others are random. None for random variables only.
    """
    if start is None:
        return initialise(module, key, image_shape)
    shapes, start_shapes = shapes_by_path(shapes_of(module, image_shape)), shapes_by_path(start)
    if start_shapes == shapes:
        return start
    drawn = jax.device_get(initialise(module, key, image_shape))
    if start_shapes.items() < shapes.items():
        return unflatten(flatten(drawn) | flatten(start))
    return grown(drawn, start)


def initial_state(settings: TrainingSettings, variables: dict, auxiliary: Mapping | None = None) -> TrainState:
    """Returns the state before the first update, for a network with these variables; for `auxiliary` see `TrainJob`."""
    params, batch_stats = variables['params'], variables.get('batch_stats', {})
    projections = jax.device_get(dict(auxiliary or {}))  # the buffers of a state are donated, those of a job are not
    opt_state = settings.make_optimizer().init((params, projections))
    return TrainState(params, batch_stats, projections, opt_state, np.zeros((), np.int32))


def make_train_step(module, job: TrainJob, classifier: Classifier, mesh: Mesh) -> Callable:
    """Returns the pure train step `(state, images, labels, frozen, key) -> (state, loss)`.

    With the precision 'bfloat16' the network runs forward and backward in bfloat16; its parameters, running statistics and
    gradients, the loss and the optimizer state are float32.

    Args:
      module: the Linen module of the network.
      job: the training. Its `frozen` variables are passed to the step as an argument.
      classifier: defines how pixels are normalised.
      mesh: the devices that the step runs on. On a CPU some operations are replaced by faster ones, see `networks.suited`.

    Returns:
      The train step: images are uint8 [B, H, W, C], labels int [B], key is a random key; the loss is a float32 scalar.
    """
    settings, optimizer, forward = job.settings, job.settings.make_optimizer(), make_forward(module, job)

    def train_step(state: TrainState, images: Pixels, labels: Labels, frozen, key: jax.Array) -> tuple[TrainState, Scalar]:
        x, dropout_key = _augmented(settings, classifier, images, state, key)
        trained = state.params, state.auxiliary

        def loss_of(trained):
            progress = state.step / settings.updates
            logits, features, batch_stats = forward(*trained, state.batch_stats, x, dropout_key, frozen, progress)
            return job.loss_fn(logits, features, x, labels, frozen, progress), batch_stats

        suited = suited_to(platform_of(mesh), loss_of, trained=mesh.size == 1)
        (loss, batch_stats), gradient = jax.value_and_grad(suited, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        params, auxiliary = optax.apply_updates(trained, updates)
        return TrainState(params, batch_stats, auxiliary, opt_state, state.step + 1), loss

    return train_step


def make_reestimate(module, job: TrainJob, classifier: Classifier, mesh: Mesh) -> Callable:
    """Returns `(state, images, key) -> state`, which updates running statistics from a batch and keeps the weights.

    The batch runs through the network in train mode.
    """
    settings, forward = job.settings, make_forward(module, dataclasses.replace(job, forward=None))
    run = suited_to(platform_of(mesh), functools.partial(forward, frozen=None, progress=1.0))

    def reestimate(state: TrainState, images: Pixels, key: jax.Array) -> TrainState:
        x, dropout_key = _augmented(settings, classifier, images, state, key)
        _, _, batch_stats = run(state.params, {}, state.batch_stats, x, dropout_key)
        return dataclasses.replace(state, batch_stats=batch_stats, step=state.step + 1)

    return reestimate


def _augmented(
    settings: TrainingSettings, classifier: Classifier, images: Pixels, state: TrainState, key: jax.Array
) -> tuple[Images, jax.Array]:
    """Returns the augmented, normalised batch [B, H, W, C] of the next update, and the random key of its dropout."""
    augmentation_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    return augmentation_of(settings)(augmentation_key, classifier.normalise(images), classifier), dropout_key


def make_forward(module, job: TrainJob) -> Callable:
    """Returns the forward pass in train mode, in the precision of the settings; logits and running statistics are float32.

    Returns:
      A function `(params, auxiliary, batch_stats, x, dropout_key, frozen, progress) -> (logits, features, batch_stats)`.
    """
    dtype = jnp.dtype(job.settings.precision)

    def plain(variables, auxiliary, x: Images, rngs, frozen, progress):
        return features_in_training(module, variables, x, rngs, job.head)

    def forward(params, auxiliary, batch_stats, x: Images, dropout_key, frozen, progress):
        params, auxiliary = cast_floats((params, auxiliary), dtype)
        variables = {'params': params, 'batch_stats': batch_stats}
        run = job.forward or plain
        rngs = {'dropout': dropout_key}
        logits, features, changed = run(variables, auxiliary, x.astype(dtype), rngs, frozen, progress)
        changed = jax.tree.map(lambda new, old: new.astype(old.dtype), changed, batch_stats)
        return logits.astype(jnp.float32), features, changed

    return forward


class TrainStep:
    """The compiled train steps of one network, with several updates in a dispatch; it reads and writes no files.

    Dispatch is asynchronous: the devices may still be computing the returned arrays.

    Attributes:
      updates: the number of updates in a full dispatch.
      batches: the source of the batches.
      programs: {whether a dispatch has several updates: the jitted function behind `__call__`}; see `function`.
    """

    def __init__(self, module, job: TrainJob, like: Classifier, mesh: Mesh, updates: int = 0):
        """Creates the programs; each is compiled at its first call.

        Args:
          module: the Linen module of the network, called with x and `train`.
          job: the training.
          like: A classifier with the image shape, mean and std of the network; its variables are not used.
          mesh: the devices that batches are split over; BatchNorm sees the whole batch.
          updates: the number of updates in a full dispatch; 0 for that of the settings.
        """
        self._mesh, self._everywhere = mesh, NamedSharding(mesh, P())
        self._job, self._module, self._image_shape = job, module, like.image_shape
        self._frozen = self.place(job.frozen)
        self._step = make_train_step(module, job, like, mesh)
        self.updates = updates or job.settings.dispatch_length(platform_of(mesh))
        self.batches: ResidentBatches | HostBatches
        count, image_bytes = job.images, math.prod(like.image_shape)
        if fits_on_devices(mesh, count * (image_bytes + 4)):
            self.batches = ResidentBatches(mesh, count, like.image_shape)
        else:
            self.batches = HostBatches(mesh)
            self.updates = _largest_divisor(self.updates, max(1, STREAMED_BYTES // (job.settings.batch_size * image_bytes)))
        self.programs = {several: self._jitted(several) for several in (False, True)}

    def initial_state(self, key: jax.Array, start: dict | None = None) -> TrainState:
        """Returns the state before the first update: the variables that `start` has, and random ones for the others."""
        variables = initial_variables(self._module, key, self._image_shape, start)
        return initial_state(self._job.settings, variables, self._job.auxiliary)

    def place(self, tree):
        """Returns `tree` with its arrays replicated on every device."""
        return place(tree, self._everywhere)

    def __call__(self, state: TrainState, batch, key: jax.Array) -> tuple[TrainState, jax.Array]:
        """Runs the updates of one dispatch.

        Args:
          state: the state, on the devices; its buffers are donated, so it must not be read afterwards.
          batch: the batch of the dispatch, or its batches along a leading axis, as `batches.each` yields them.
          key: the random key of augmentation and dropout, which is folded with the number of the update.

        Returns:
          The new state, and the losses: float32 [n], or a scalar where the dispatch is a single update.
        """
        leaves = jax.tree.leaves(batch)
        several = leaves[-1].ndim > 1  # the last leaf holds row numbers or labels
        if several and platform_of(self._mesh) == 'cpu':
            # XLA runs convolutions in a loop body 12 times slower on CPU. Single calls also give the same bits.
            losses = []
            for i in range(len(leaves[-1])):
                state, loss = self(state, jax.tree.map(lambda array, i=i: array[i], batch), key)
                losses.append(loss)
            return state, jnp.stack(losses)
        return self.programs[several](state, self.batches.arrays, batch, self._frozen, key)

    def function(self, several: bool):
        """Returns the pure function `(state, arrays, batch, frozen, key) -> (state, losses)` of a dispatch.

        Args:
          several: whether the function scans over several updates; otherwise the dispatch is a single update.
        """
        pick, step = self.batches.pick, self._step

        def single(state, arrays, batch, frozen, key):
            return step(state, *pick(arrays, batch), frozen, key)

        def scan(state, arrays, batches, frozen, key):
            return jax.lax.scan(lambda state, batch: single(state, arrays, batch, frozen, key), state, batches)

        return scan if several else single

    def _jitted(self, several: bool):
        """Returns `function` jitted for the mesh; the buffers of the state are donated."""
        everywhere, split = self._everywhere, NamedSharding(self._mesh, P(*[None] * several, AXIS))
        return jax.jit(
            self.function(several),
            donate_argnums=0,
            in_shardings=(everywhere, everywhere, split, everywhere, everywhere),
            out_shardings=everywhere,
        )
