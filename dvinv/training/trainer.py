"""The training loop of all networks, and the networks that the tasks train, each from its start to its network file.

A checkpoint holds everything that a later update depends on (see `training.step`). A training that was killed and resumed
therefore ends with the same bits as one that ran through.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.config import LoggingSettings, StudentSettings, TeacherSettings, VerifierSettings, validate_devices
from dvinv.data.dataset import RowArray
from dvinv.networks import Classifier, apply_fn_of, load_classifier, module_of, save_network
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.checkpoints import Checkpoints
from dvinv.runtime.devices import AXIS, of_primary, place, platform_of
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir
from dvinv.training.step import TrainJob, TrainStep, make_reestimate

RUNNING = 2  # dispatches that may be enqueued ahead, which limits the batches that occupy device memory


@dataclasses.dataclass(frozen=True)
class Records:
    """Where a training writes its metrics and checkpoints, and how often.

    Attributes:
      workdir: the work directory.
      task, series: the names of the task and of the series in the metrics; checkpoints are named by the series.
      logging: A line of metrics is written every `every` updates, a checkpoint every `checkpoint_every` updates.
      snapshots: numbers of updates, ascending and before the last, after which `save_snapshot` is called.
      save_snapshot: (number of updates, variables of the network) -> None; called again if the training was killed there.
    """

    workdir: Workdir
    task: str
    series: str
    logging: LoggingSettings
    snapshots: tuple[int, ...] = ()
    save_snapshot: Callable[[int, dict], None] | None = None


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
          start: variables to start from, see `step.initial_variables`.

        Raises:
          DvinvError: the batch size is not divisible by the number of devices, or a checkpoint is damaged.
        """
        task, series = records.task, records.series
        validate_devices(job.settings, series, mesh.size)
        self.apply_fn = apply_fn_of(module)
        self._job, self._seed, self._records = job, seed, records
        self._train_step = TrainStep(module, job, like, mesh, job.dispatch_length(records.logging.every, platform_of(mesh)))
        everywhere, self._split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        self._reestimate = jax.jit(
            make_reestimate(module, job, like, mesh),
            in_shardings=(everywhere, self._split, everywhere),
            out_shardings=everywhere,
        )
        self._checkpoints = Checkpoints(records.workdir.path / 'checkpoints' / series)
        # The progress display starts here, because the next lines may compile.
        self._progress = Progress(task if task == series else f'{task}: {series}', job.settings.updates, 'updates')
        key = jax.random.key(seed)
        state = self._train_step.initial_state(jax.random.fold_in(key, 0), start)
        self.step = 0
        if restored := self._checkpoints.restore(state):
            self.step, state = restored
        self._saved = self.step  # the number of updates in the newest checkpoint
        self._progress.pass_over(self.step)
        self._losses: list = self._checkpoints.metadata().get('losses', [])  # since the last line of metrics
        self._line: tuple[int, list] | None = None  # (step, losses) of the line of metrics that is due to be written
        records.workdir.metrics.cut(task, series, self.step)
        self._state, self._key = self._train_step.place((of_primary(state), jax.random.fold_in(key, 1)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._progress.__exit__(*exception)

    @property
    def variables(self) -> dict:
        """The variables of the network after `step` updates, as numpy arrays."""
        return jax.device_get(self._state.variables)

    def advance(self, images: RowArray, labels: RowArray, until: int) -> None:
        """Trains up to update `until`; saves a checkpoint there, unless it is the last update, and at each snapshot.

        Args:
          images: all images that are available by then, in order, uint8 [N, H, W, C].
          labels: their labels, int [N].
          until: the update to train up to.

        Raises:
          DvinvError: A loss is not a finite number (the message names the update), or the disk is full.
          ValueError: there are fewer images than should be available by then.
          SystemExit: SIGTERM was received; a checkpoint was saved.
        """
        for snapshot in self._records.snapshots:
            # That of the current update too: the training may have been killed between its checkpoint and its snapshot.
            if self._records.save_snapshot and self.step <= snapshot < until:
                self._advance(images, labels, snapshot)
                self._records.save_snapshot(snapshot, self.variables)
        self._advance(images, labels, until)

    def _advance(self, images: RowArray, labels: RowArray, until: int) -> None:
        """Trains up to update `until`, without snapshots."""
        expected = self._job.available_at(max(until - 1, 0))
        if len(images) < expected:
            raise ValueError(f'by update {until} there should be {expected} images, not {len(images)}')
        source, dispatches = self._train_step.batches, self._dispatches(until)
        source.load(images, labels)
        running: collections.deque[jax.Array] = collections.deque()
        with contextlib.closing(source.each(self._rows(*dispatch) for dispatch in dispatches)) as batches:
            for (_, count), batch in zip(dispatches, batches, strict=True):
                self._leave_if_asked()
                self._state, losses = self._train_step(self._state, batch, self._key)
                self._losses.append(losses)
                running.append(losses)
                if len(running) > RUNNING:
                    jax.block_until_ready(running.popleft())
                self.step += count
                self._write_line()  # the line of the previous dispatch, while the devices run this one
                self._record(until)

    def _dispatches(self, until: int) -> list[tuple[int, int]]:
        """Returns (first update, number of updates) of every dispatch up to update `until`.

        A dispatch is full where a full one fits before `until` and before the next line of metrics. Otherwise it is a single
        update, because any other number of updates would have to be compiled separately.
        """
        dispatches, step, full, every = [], self.step, self._train_step.updates, self._records.logging.every
        while step < until:
            count = full if step % every + full <= every and step + full <= until else 1
            dispatches.append((step, count))
            step += count
        return dispatches

    def _rows(self, first: int, count: int) -> np.ndarray:
        """Returns the row numbers of the images in a dispatch, int32 [count, B], or [B] for a single update."""
        rows = [self._job.rows(self._seed, step) for step in range(first, first + count)]
        return np.stack(rows) if count > 1 else rows[0]

    def _record(self, until: int) -> None:
        """Schedules the line of metrics and writes the checkpoint that are due after `step` updates."""
        logging = self._records.logging
        if self.step % logging.every and self.step != until:
            return
        self._line, self._losses = (self.step, self._losses), []
        if self.step % logging.checkpoint_every and self.step != until:
            return
        self._write_line()
        if self.step < self._job.settings.updates:
            self._checkpoint()

    def _write_line(self) -> None:
        """Writes the line of metrics that is due, if there is one; blocks until its losses are computed."""
        if self._line is not None:
            (step, losses), self._line = self._line, None
            mean = _checked_mean(losses, step, self._records.series)
            self._records.workdir.metrics.append(self._records.task, self._records.series, [{'step': step, 'loss': mean}])
            self._progress.update(step, loss=mean)

    def _checkpoint(self, metadata: dict | None = None) -> None:
        self._checkpoints.save(self.step, jax.device_get(self._state), metadata)
        self._saved = self.step

    def _leave_if_asked(self) -> None:
        """Saves a checkpoint and exits if SIGTERM was received."""
        if preemption.asked():
            self._write_line()
            if self.step > self._saved:
                self._checkpoint({'losses': _floats(self._losses)})
            preemption.leave_if_asked(self._saved_clause())

    def _saved_clause(self) -> str:
        """Returns a main clause that says how many updates of the training are saved."""
        series, total = self._records.series, self._job.settings.updates
        if not self._saved:
            return f'no update of the {series} was made, so nothing had to be saved'
        return f'{self._saved:,} of {total:,} updates of the {series} are saved'

    def finish(self, images: RowArray, labels: RowArray) -> dict:
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
            preemption.leave_if_asked(self._saved_clause())
            rows = self._job.rows(self._seed, step)
            self._state = self._reestimate(self._state, place(images[rows], self._split), self._key)
        variables = self.variables
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):  # no loss covers the last update
            raise DvinvError(
                f'The weights of the {self._records.series} are not finite after the last update: lower its learning_rate.'
            )
        return variables


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


@dataclasses.dataclass(frozen=True)
class TrainTarget:
    """A network of a run that is to be trained.

    Attributes:
      task: the task during which the network is trained.
      name: the name of its file, metrics and checkpoints.
      network: settings with the fields `network` and `width`.
      like: A classifier with the same image shape, classes, mean and std.
      role: A number from which, with the seed of the run, `seed_of` computes the seed of the training. Students that are
        compared share it, and so share their initial variables and shuffles.
      part: the number of the training, for a network that is trained several times; each training shuffles differently.
      start: variables to start from (see `Training`); None for random variables.
      kept: the kept channels of a pruned network (see `networks.pruned.PrunedModule`).
      user_module: the user's network (see `inversion.linen_modules`), trained instead of `network`; None to train `network`.
      snapshots: the numbers of updates after which the network is saved too, see `snapshot_name`.
    """

    task: str
    name: str
    network: TeacherSettings | VerifierSettings | StudentSettings
    like: Classifier
    role: int
    part: int = 0
    start: dict | None = None
    kept: Mapping[str, tuple[int, ...]] | None = None
    user_module: Any = None
    snapshots: tuple[int, ...] = ()

    @property
    def about(self) -> dict:
        """The description of the network, as `networks.save_network` takes it."""
        about = {field: getattr(self.like, field) for field in ('num_classes', 'image_shape', 'mean', 'std')}
        pruned = {'kept': self.kept} if self.kept else {}
        network, width = ('', 1.0) if self.user_module is not None else (self.network.network, self.network.width)
        return {'network': network, 'width': width, **about, **pruned}

    @property
    def module(self):
        """The network: a Linen module that takes x and `train`, or an object with the same `init` and `apply`."""
        return module_of(self.about, self.user_module)


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


def snapshot_name(name: str, update: int) -> str:
    """Returns the name of the file of a network after a number of updates of its training."""
    return f'{name}_after_{update}'


def seed_of(run: Run, role: int, part: int = 0) -> int:
    """Returns the seed of a training from that of the run; for `role` and `part` see `TrainTarget`."""
    seed = 16 * run.settings.seed + role
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0]) if part else seed


def training_of(run: Run, target: TrainTarget, job: TrainJob) -> Training:
    """Returns the `Training` of a network of a run."""

    def save_snapshot(update: int, variables: dict) -> None:
        save_network(run.workdir.network(snapshot_name(target.name, update)), variables, target.about)

    records = Records(run.workdir, target.task, target.name, run.settings.logging, target.snapshots, save_snapshot)
    seed = seed_of(run, target.role, target.part)
    return Training(target.module, job, target.like, seed, run.training_mesh, records, target.start)


def train_network(run: Run, target: TrainTarget, job: TrainJob, images: RowArray, labels: RowArray) -> Classifier:
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
    return load_classifier(path, target.user_module)
