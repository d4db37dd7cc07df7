"""The training loop of all networks: teachers and verifiers are trained from labels, students from a teacher.

Randomness is a function of the seed and the number of the update only, and a checkpoint holds everything that an update
depends on. A training that was killed and resumed therefore ends with the same bits as one that ran through.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.config import (
    LoggingSettings,
    StudentSettings,
    TeacherSettings,
    TrainingSettings,
    VerifierSettings,
    validate_devices,
)
from dvinv.data.batches import HostBatches, ResidentBatches, fits_on_devices
from dvinv.data.rows import RowArray
from dvinv.errors import DvinvError
from dvinv.inversion.augmentation import augmentation_of
from dvinv.inversion.linen_tap import features_in_training
from dvinv.networks import Classifier, apply_fn_of, initialise, load_classifier, module_of, save_network, shapes_of
from dvinv.networks.classifier import cast_floats, flatten, shapes_by_path, unflatten
from dvinv.networks.head import grown
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.checkpoints import Checkpoints
from dvinv.runtime.devices import AXIS, place, platform_of
from dvinv.runtime.processes import of_primary
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir
from dvinv.training.sampling import Rounds, chosen_images

Array = RowArray
RUNNING = 2  # dispatches that may be enqueued ahead, which limits the batches that occupy device memory
STREAMED_BYTES = 2**28  # most bytes of images in one dispatch, where images are streamed from the host


@flax.struct.dataclass
class TrainState:
    """The state that a train step updates.

    Attributes:
      params, batch_stats: the variables of the network, float32.
      auxiliary: parameters that are trained with the network and discarded afterwards, see `TrainJob`.
      opt_state: the state of the optimizer, for (params, auxiliary).
      step: the number of updates done, int32 scalar.
    """

    params: dict
    batch_stats: dict
    auxiliary: dict
    opt_state: optax.OptState
    step: jax.Array

    @property
    def variables(self) -> dict:
        """The variables of the network, in the form that a Linen module takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """The loss, settings and image schedule of a training.

    Attributes:
      settings: the settings of the training.
      loss_fn: (logits, features, x, labels, frozen, progress) -> scalar. x is the augmented, normalised batch [B, H, W, C];
        features are the BatchNorm inputs of the network (see `linen_tap.features_in_training`) or the features that
        `forward` returns; progress is the fraction of the updates that are done.
      rounds: the schedule by which the images become available.
      frozen: further variables that `loss_fn` needs, for instance those of a teacher.
      beside: the schedule of a second set of images, which follow the first ones in the arrays; the second half of every
        batch is drawn from them. None for a single set.
      head: the path of a layer that is captured too, see `linen_tap.features_in_training`.
      forward: (variables, auxiliary, x, rngs, frozen, progress) -> (logits, features for the loss, running statistics), the
        forward pass in train mode. None for `features_in_training`.
      auxiliary: initial values of the parameters that are trained with the network and discarded afterwards, for instance
        projections.
    """

    settings: TrainingSettings
    loss_fn: Callable
    rounds: Rounds
    frozen: dict | None = None
    beside: Rounds | None = None
    head: str = ''
    forward: Callable | None = None
    auxiliary: dict = dataclasses.field(default_factory=dict)

    def rows(self, seed: int, update: int) -> np.ndarray:
        """Returns the row numbers of the images in the batch of an update, int32 [B]."""
        size = self.settings.batch_size
        if self.beside is None:
            return chosen_images(seed, update, size, self.rounds)
        first = chosen_images(seed, update, size // 2, self.rounds)
        # Another seed, since two sets of equal size would be shuffled in the same order.
        second = chosen_images(2**32 + seed, update, size // 2, self.beside)
        return np.concatenate([first, self.rounds.images * self.rounds.count + second])

    @property
    def images(self) -> int:
        """The number of images that the training uses in all."""
        return self.come_by(self.settings.updates - 1)

    def dispatch_length(self, every: int, platform: str) -> int:
        """Returns the number of updates in a full dispatch on `platform`.

        It is the largest divisor of `every` that does not exceed the dispatch length of the settings.
        """
        most = self.settings.dispatch_length(platform)
        return max(count for count in range(1, min(most, every) + 1) if every % count == 0)

    def come_by(self, update: int) -> int:
        """Returns the number of images that must be available for this update."""
        if self.beside is None:
            return self.rounds.come_by(update)
        return self.rounds.images * self.rounds.count + self.beside.come_by(update)


def initial_state(settings: TrainingSettings, variables: dict, auxiliary: Mapping = MappingProxyType({})) -> TrainState:
    """Returns the state before the first update, for a network with these variables; for `auxiliary` see `TrainJob`."""
    params, batch_stats = variables['params'], variables.get('batch_stats', {})
    auxiliary = jax.device_get(dict(auxiliary))  # the buffers of a state are donated, those of a job are not
    opt_state = settings.make_optimizer().init((params, auxiliary))
    return TrainState(params, batch_stats, auxiliary, opt_state, np.zeros((), np.int32))


def _first_variables(module, key: jax.Array, image_shape, start: dict | None) -> dict:
    """Returns initial variables: those that `start` has, and random ones for the others."""
    if start is None:
        return initialise(module, key, image_shape)
    shapes, given = shapes_by_path(shapes_of(module, image_shape)), shapes_by_path(start)
    if given == shapes:
        return start
    if given.items() < shapes.items():
        return unflatten(flatten(jax.device_get(initialise(module, key, image_shape))) | flatten(start))
    return grown(jax.device_get(initialise(module, key, image_shape)), start)


def make_train_step(module, job: TrainJob, classifier: Classifier):
    """Returns the pure train step `(state, images, labels, frozen, key) -> (state, loss)`.

    With the precision 'bfloat16' the network runs forward and backward in bfloat16; its parameters, running statistics and
    gradients, the loss and the optimizer state are float32.

    Args:
      module: the Linen module of the network.
      job: the training. Its `frozen` variables are passed to the step as an argument.
      classifier: defines how pixels are normalised.

    Returns:
      The train step: images are uint8 [B, H, W, C], labels int [B], key is a random key; the loss is a float32 scalar.
    """
    settings, optimizer, forward = job.settings, job.settings.make_optimizer(), make_forward(module, job)

    def train_step(state: TrainState, images, labels, frozen, key):
        augmentation_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = augmentation_of(settings)(augmentation_key, classifier.normalise(images), classifier)

        trained = state.params, state.auxiliary

        def loss_of(trained):
            progress = state.step / settings.updates
            logits, features, batch_stats = forward(*trained, state.batch_stats, x, dropout_key, frozen, progress)
            return job.loss_fn(logits, features, x, labels, frozen, progress), batch_stats

        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        params, auxiliary = optax.apply_updates(trained, updates)
        return TrainState(params, batch_stats, auxiliary, opt_state, state.step + 1), loss

    return train_step


def make_forward(module, job: TrainJob):
    """Returns the forward pass in train mode, in the precision of the settings; logits and running statistics are float32.

    Returns:
      A function `(params, auxiliary, batch_stats, x, dropout_key, frozen, progress) -> (logits, features, batch_stats)`.
    """
    dtype = jnp.dtype(job.settings.precision)

    def plain(variables, auxiliary, x, rngs, frozen, progress):
        return features_in_training(module, variables, x, rngs, job.head)

    def forward(params, auxiliary, batch_stats, x, dropout_key, frozen, progress):
        params, auxiliary = cast_floats((params, auxiliary), dtype)
        variables = {'params': params, 'batch_stats': batch_stats}
        run = job.forward or plain
        rngs = {'dropout': dropout_key}
        logits, features, changed = run(variables, auxiliary, x.astype(dtype), rngs, frozen, progress)
        changed = jax.tree.map(lambda new, old: new.astype(old.dtype), changed, batch_stats)
        return logits.astype(jnp.float32), features, changed

    return forward


def make_reestimate(module, job: TrainJob, classifier: Classifier):
    """Returns `(state, images, key) -> state`, which updates running statistics from a batch and keeps the weights.

    The batch runs through the network in train mode.
    """
    settings, forward = job.settings, make_forward(module, dataclasses.replace(job, forward=None))

    def reestimate(state: TrainState, images, key):
        augmentation_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = augmentation_of(settings)(augmentation_key, classifier.normalise(images), classifier)
        _, _, batch_stats = forward(state.params, {}, state.batch_stats, x, dropout_key, None, 1.0)
        return state.replace(batch_stats=batch_stats, step=state.step + 1)

    return reestimate


class TrainStep:
    """The compiled train steps of one network, with several updates in a dispatch; it reads and writes no files.

    Dispatch is asynchronous: the devices may still be computing the returned arrays.

    Attributes:
      updates: the number of updates in a full dispatch.
      batches: the source of the batches, a `ResidentBatches` or `HostBatches`.
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
        self._step = make_train_step(module, job, like)
        self.updates = updates or job.settings.dispatch_length(platform_of(mesh))
        count, image_bytes = job.images, math.prod(like.image_shape)
        if fits_on_devices(mesh, count * (image_bytes + 4)):
            self.batches = ResidentBatches(mesh, count, like.image_shape)
        else:
            self.batches = HostBatches(mesh)
            most = max(1, STREAMED_BYTES // (job.settings.batch_size * image_bytes))
            self.updates = max(count for count in range(1, min(most, self.updates) + 1) if self.updates % count == 0)
        self.programs = {several: self._jitted(several) for several in (False, True)}

    def initial_state(self, key: jax.Array, start: dict | None = None) -> TrainState:
        """Returns the state before the first update: the variables that `start` has, and random ones for the others."""
        variables = _first_variables(self._module, key, self._image_shape, start)
        return initial_state(self._job.settings, variables, self._job.auxiliary)

    def place(self, tree):
        """Returns `tree` with its arrays replicated on every device."""
        return place(tree, self._everywhere)

    def __call__(self, state: TrainState, chosen, key: jax.Array) -> tuple[TrainState, jax.Array]:
        """Runs the updates of one dispatch.

        Args:
          state: the state, on the devices; its buffers are donated, so it must not be read afterwards.
          chosen: the batches of the dispatch, as `batches.each` yields them.
          key: the random key of augmentation and dropout, which is folded with the number of the update.

        Returns:
          The new state, and the losses: float32 [n], or a scalar where the dispatch is a single update.
        """
        leaves = jax.tree.leaves(chosen)
        several = leaves[-1].ndim > 1  # the last leaf holds row numbers or labels
        if several and platform_of(self._mesh) == 'cpu':
            # XLA runs convolutions in a loop body 12 times slower on CPU. Single calls also give the same bits.
            losses = []
            for i in range(len(leaves[-1])):
                state, loss = self(state, jax.tree.map(lambda array, i=i: array[i], chosen), key)
                losses.append(loss)
            return state, jnp.stack(losses)
        return self.programs[several](state, self.batches.arrays, chosen, self._frozen, key)

    def function(self, several: bool):
        """Returns the pure function `(state, arrays, chosen, frozen, key) -> (state, losses)` of a dispatch.

        Args:
          several: whether the function scans over several updates; otherwise the dispatch is a single update.
        """
        pick, step = self.batches.pick, self._step

        def single(state, arrays, chosen, frozen, key):
            return step(state, *pick(arrays, chosen), frozen, key)

        def scan(state, arrays, chosen, frozen, key):
            return jax.lax.scan(lambda state, batch: single(state, arrays, batch, frozen, key), state, chosen)

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


@dataclasses.dataclass(frozen=True)
class Records:
    """Where a training writes its metrics and checkpoints, and how often.

    Attributes:
      workdir: the work directory.
      task, series: the names of the task and of the series in the metrics; checkpoints are named by the series.
      logging: A line of metrics is written every `every` updates, a checkpoint every `checkpoint_every` updates.
    """

    workdir: Workdir
    task: str
    series: str
    logging: LoggingSettings


class Training:
    """The training of a network, run in one call or in several; a context manager that closes the progress display.

    A training that was killed resumes from its last checkpoint when the object is created again.

    Attributes:
      step: the number of updates done.
      apply_fn: (variables, x) -> logits, the network in eval mode.
    """

    def __init__(
        self,
        module,
        job: TrainJob,
        like: Classifier,
        seed: int,
        mesh: Mesh,
        records: Records,
        start: dict | None = None,
    ):
        """Starts from random variables, from `start`, or from the last checkpoint if there is one.

        Args:
          module: the Linen module of the network, called with x and `train`.
          job: the training.
          like: A classifier with the image shape, mean and std of the network; its variables are not used.
          seed: the seed of initial variables, batches, augmentation and dropout.
          mesh: the devices that batches are split over; BatchNorm sees the whole batch.
          records: where metrics and checkpoints are written.
          start: initial variables: all of them, those of some of the layers, or those of a network with fewer classes (see
            `networks.head.grown`). None for random variables.

        Raises:
          DvinvError: the batch size is not divisible by the number of devices, or a checkpoint is damaged.
        """
        settings, workdir, task, series = job.settings, records.workdir, records.task, records.series
        validate_devices(settings, series, mesh.size)
        self.apply_fn = apply_fn_of(module)
        self._job, self._seed, self._logging = job, seed, records.logging
        self._workdir, self._task, self._series = workdir, task, series
        self._train_step = TrainStep(module, job, like, mesh, job.dispatch_length(records.logging.every, platform_of(mesh)))
        everywhere, self._split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        self._reestimate = jax.jit(
            make_reestimate(module, job, like),
            in_shardings=(everywhere, self._split, everywhere),
            out_shardings=everywhere,
        )
        self._checkpoints = Checkpoints(workdir.path / 'checkpoints' / series)
        # The progress display starts here, because the next lines may compile.
        self._progress = Progress(task if task == series else f'{task}: {series}', settings.updates, 'updates')
        key = jax.random.key(seed)
        state = self._train_step.initial_state(jax.random.fold_in(key, 0), start)
        self.step, state = self._checkpoints.restore(state) or (0, state)
        self._saved = self.step  # the number of updates in the newest checkpoint
        self._progress.pass_over(self.step)
        self._losses = self._checkpoints.notes().get('losses', [])  # since the last line of metrics
        self._line = None  # (step, losses) of the line of metrics that is due to be written
        workdir.metrics.cut(task, series, self.step)
        self._state, self._key = self._train_step.place((of_primary(state), jax.random.fold_in(key, 1)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._progress.__exit__(*exception)

    @property
    def variables(self) -> dict:
        """The variables of the network after `step` updates, as numpy arrays."""
        return jax.device_get(self._state.variables)

    def advance(self, images: Array, labels: Array, until: int) -> None:
        """Trains up to update `until`, and saves a checkpoint there if it is not the last update.

        Args:
          images: all images that are available by then, in order, uint8 [N, H, W, C].
          labels: their labels, int [N].
          until: the update to train up to.

        Raises:
          DvinvError: A loss is not a finite number (the message names the update), or the disk is full.
          ValueError: there are fewer images than should be available by then.
          SystemExit: SIGTERM was received; a checkpoint was saved.
        """
        expected = self._job.come_by(max(until - 1, 0))
        if len(images) < expected:
            raise ValueError(f'by update {until} there should be {expected} images, not {len(images)}')
        self._train_step.batches.load(images, labels)
        dispatches, running = self._dispatches(until), collections.deque()
        with contextlib.closing(self._train_step.batches.each(self._rows(*dispatch) for dispatch in dispatches)) as batches:
            for (_, count), chosen in zip(dispatches, batches, strict=True):
                if preemption.asked():
                    self._write_line()
                    if self.step > self._saved:
                        self._checkpoint({'losses': _floats(self._losses)})
                    preemption.leave_if_asked(self._kept())
                self._state, losses = self._train_step(self._state, chosen, self._key)
                self._losses.append(losses)
                running.append(losses)
                if len(running) > RUNNING:
                    jax.block_until_ready(running.popleft())
                self.step += count
                self._write_line()  # the line of the previous dispatch, while the devices run this one
                if self.step % self._logging.every == 0 or self.step == until:
                    self._line, self._losses = (self.step, self._losses), []
                    pause = self.step % self._logging.checkpoint_every == 0 or self.step == until
                    if pause:
                        self._write_line()
                    if pause and self.step < self._job.settings.updates:
                        self._checkpoint()

    def _dispatches(self, until: int) -> list[tuple[int, int]]:
        """Returns (first update, number of updates) of every dispatch up to update `until`.

        A dispatch is full where a full one fits before `until` and before the next line of metrics. Otherwise it is a single
        update, because any other number of updates would have to be compiled separately.
        """
        dispatches, step, full, every = [], self.step, self._train_step.updates, self._logging.every
        while step < until:
            count = full if step % every + full <= every and step + full <= until else 1
            dispatches.append((step, count))
            step += count
        return dispatches

    def _rows(self, first: int, count: int) -> np.ndarray:
        """Returns the row numbers of the images in a dispatch, int32 [count, B], or [B] for a single update."""
        rows = [self._job.rows(self._seed, step) for step in range(first, first + count)]
        return np.stack(rows) if count > 1 else rows[0]

    def _write_line(self) -> None:
        """Writes the line of metrics that is due, if there is one; blocks until its losses are computed."""
        if self._line is not None:
            (step, losses), self._line = self._line, None
            mean = _checked_mean(losses, step, self._series)
            self._workdir.metrics.append(self._task, self._series, [{'step': step, 'loss': mean}])
            self._progress.update(step, loss=mean)

    def _checkpoint(self, notes: dict | None = None) -> None:
        self._checkpoints.save(self.step, jax.device_get(self._state), notes)
        self._saved = self.step

    def _kept(self) -> str:
        """Returns a main clause that says how many updates of the training are saved."""
        total = self._job.settings.updates
        if not self._saved:
            return f'no update of the {self._series} was made, so nothing had to be saved'
        return f'{self._saved:,} of {total:,} updates of the {self._series} are saved'

    def finish(self, images: Array, labels: Array) -> dict:
        """Trains to the last update and returns the variables.

        BatchNorm statistics are estimated again after the last update, if the settings ask for it.

        Args:
          images: all images of the training, in order, uint8 [N, H, W, C].
          labels: their labels, int [N].

        Raises:
          DvinvError: as for `advance`, or the weights are not finite.
        """
        settings = self._job.settings
        self.advance(images, labels, settings.updates)
        if settings.reestimate and self.step > self._saved:
            self._checkpoint()
        for step in range(settings.updates, settings.updates + settings.reestimate):
            preemption.leave_if_asked(self._kept())
            rows = self._job.rows(self._seed, step)
            self._state = self._reestimate(self._state, place(images[rows], self._split), self._key)
        variables = self.variables
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):  # no loss covers the last update
            raise DvinvError(
                f'The weights of the {self._series} are not finite after the last update: lower its learning_rate.'
            )
        return variables


@dataclasses.dataclass(frozen=True)
class TrainTarget:
    """A network of a run that is to be trained.

    Attributes:
      task: the task during which the network is trained.
      name: the name of its file, metrics and checkpoints.
      network: settings with the fields `network` and `width`.
      like: A classifier with the same image shape, classes, mean and std.
      role: A number from which, with the seed of the run, the seed of the training is computed. Students that are compared
        share it, and so share their initial variables and shuffles.
      part: the number of the training, for a network that is trained several times; each training shuffles differently.
      start: variables to start from (see `Training`); None for random variables.
      kept: the kept channels of a pruned network (see `networks.channels.PrunedModule`).
      own: the user's network (see `inversion.modules`), which is trained instead of `network`; None to train `network`.
    """

    task: str
    name: str
    network: TeacherSettings | VerifierSettings | StudentSettings
    like: Classifier
    role: int
    part: int = 0
    start: dict | None = None
    kept: dict[str, tuple[int, ...]] | None = None
    own: Any = None

    @property
    def about(self) -> dict:
        """The description of the network, as `networks.save_network` takes it."""
        about = {field: getattr(self.like, field) for field in ('num_classes', 'image_shape', 'mean', 'std')}
        pruned = {'kept': self.kept} if self.kept else {}
        network, width = ('', 1.0) if self.own is not None else (self.network.network, self.network.width)
        return {'network': network, 'width': width, **about, **pruned}

    @property
    def module(self):
        """The network: a Linen module that takes x and `train`, or an object with the same `init` and `apply`."""
        return module_of(self.about, self.own)


@dataclasses.dataclass(frozen=True)
class PlannedTraining:
    """Trainings of equal cost that a config asks for; `--plan` times one of them.

    Attributes:
      name: their name in the plan.
      module, job, like: see `Training`.
      networks: the number of networks that are trained in this way.
      teacher: A network that every update also runs forward, or None.
    """

    name: str
    module: Any
    job: TrainJob
    like: Classifier
    networks: int = 1
    teacher: Classifier | None = None


def training_of(run: Run, target: TrainTarget, job: TrainJob) -> Training:
    """Returns the `Training` of a network of a run."""
    seed = 16 * run.settings.seed + target.role
    if target.part:
        seed = int(np.random.SeedSequence([seed, target.part]).generate_state(1)[0])
    records = Records(run.workdir, target.task, target.name, run.settings.logging)
    return Training(target.module, job, target.like, seed, run.training_mesh, records, target.start)


def train_network(run: Run, target: TrainTarget, job: TrainJob, images: Array, labels: Array) -> Classifier:
    """Returns the trained network; reads it from its file if that exists, otherwise trains (or resumes) and saves it.

    Args:
      run: the run.
      target: the network.
      job: the training.
      images: training images, uint8 [N, H, W, C].
      labels: their labels, int [N].
    """
    path = run.workdir.network(target.name)
    if not run.workdir.has_network(target.name):
        with training_of(run, target, job) as training:
            variables = training.finish(images, labels)
        save_network(path, variables, target.about)
    return load_classifier(path, target.own)


def _floats(losses: list) -> list[float]:
    """Returns one number per update from the losses of single updates and of dispatches; blocks until they are computed."""
    return [float(loss) for loss in np.concatenate([np.ravel(x) for x in jax.device_get(losses)])] if losses else []


def _checked_mean(losses: list, step: int, series: str) -> float:
    """Returns the mean of the losses of the updates up to `step`.

    Raises:
      DvinvError: A loss is not a finite number; the message names the first such update.
    """
    values = np.asarray(_floats(losses), np.float64)
    if not np.isfinite(values).all():
        wrong = step - len(values) + int(np.argmin(np.isfinite(values))) + 1
        raise DvinvError(f'The loss of the {series} is not a finite number at update {wrong}: lower its learning_rate.')
    return float(values.mean())
