"""Synthesizes numbered batches of images from a teacher, by one of the methods, into a pool.

Round r begins with the student after `r * distillation.updates_per_round` updates, which is a checkpoint. The batches of the
round compete with that student. After that the student is trained further, first on the new images. The task `distillation`
makes the remaining updates after the last round, if the student is its own.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np

import dvinv
from dvinv.config import Settings, nested
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import hints_of, job_of, print_hints
from dvinv.evaluation import logits_of, training_set
from dvinv.inversion import (
    Inversion,
    Teacher,
    attention_of,
    balanced_labels,
    make_feature_loss,
    make_inverter,
    validate_labels,
    validate_resolutions,
    validate_statistics,
)
from dvinv.inversion.step import initial_parameters, make_decode, pixel_scale_of
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.devices import decide, is_primary, make_mesh, meet, platform_of
from dvinv.runtime.errors import DvinvError, listed, say
from dvinv.runtime.progress import Progress
from dvinv.synthesis.pools import BatchCheckpoints, missing_batches, open_control, quarantine_damaged
from dvinv.training.step import rounds_of
from dvinv.training.trainer import TrainTarget, training_of

VOTE = 20  # dispatches between two checks of process 0's clock, where several processes save a batch together


def validate_synthesis(run: Run) -> None:
    """Validates that the images of a run can be made.

    Raises:
      DvinvError: the batch size is not divisible by the number of devices, the teacher does not support a resolution or a
        class, or there are too few images.
    """
    settings, group, teacher = run.settings, run.settings.synthesis, run.planned_teacher
    split = make_mesh(settings.devices, of_all=True).size
    if settings.bn_stats == 'global' and group.batch_size % split:
        raise DvinvError(
            f"synthesis.batch_size is {group.batch_size}, which {split} devices do not divide; with bn_stats='global' "
            'one batch is split over all devices: choose a multiple of their number.'
        )
    idle = split - group.batches if settings.bn_stats == 'device' else 0
    virtual = split == run.mesh.size and platform_of(run.mesh) == 'cpu'  # virtual devices share the CPU's cores
    if idle > 0 and is_primary() and not virtual:
        say(f'There are {group.batches} batches, one per device, so {idle} of {split} devices are idle in synthesis.')
    validate_stages(run)
    config = settings.inversion_config()
    if group.method != 'noise':
        validate_statistics(teacher, config)
    if config.weights.patch_similarity:
        attention_of(teacher, config)
    validate_labels(np.array(group.classes, int), teacher.num_classes)
    validate_count(run, 'synthesis.images', group.images, teacher.num_classes)


def validate_stages(run: Run) -> None:
    """Validates that the teacher takes images at the resolutions of all stages.

    Raises:
      DvinvError: it does not; the message names the stage and its resolution.
    """
    config = run.settings.inversion_config()
    config.validate_for(run.planned_teacher.image_shape)
    validate_resolutions(run.planned_teacher, config)


def validate_count(run: Run, field: str, images: int, num_classes: int) -> None:
    """Validates that there are at least as many images as classes, so that every class gets an image.

    Args:
      run: the run.
      field: the field of the config that sets the number of images, for the error message.
      images: the number of images.
      num_classes: the number of classes of the network that the images are made from.

    Raises:
      DvinvError: there are too few images; the message says how to choose the classes.
    """
    named = len(run.settings.synthesis.classes)
    if images < (named or num_classes):
        classes = f'{named} classes that synthesis.classes names' if named else f'{num_classes} classes of the network'
        raise DvinvError(
            f'{field} makes {images} images, fewer than the {classes}, so the last of these would have no image; make at '
            'least one of each, or set synthesis.classes to those that images are made of.'
        )


def control_pool(run: Run, method: str, task: str) -> ImagePool:
    """Returns the image pool of a control; `task` makes it, from the same noise and with the budget of the synthesis."""
    pool = open_control(run.workdir, method, run.teacher.digest(), quarantine=True)
    fill_pool(run, run.teacher, pool, method, task, f'{method}_images')
    return pool


def batches_side_by_side(settings: Settings, devices: int, method: str = '') -> int:
    """Returns the number of batches that a process inverts side by side.

    Args:
      settings: the settings of the run.
      devices: the number of devices of the process.
      method: the synthesis method; '' for that of the settings.
    """
    group = settings.synthesis
    if settings.bn_stats == 'global':
        return 1
    # The competitor is trained between rounds, so the batches of one round are the most that can be made at a time.
    adaptive = (method or group.method) == 'adaptive'
    at_a_time = group.batches_per_round if adaptive else group.batches
    return min(devices, -(-at_a_time // jax.process_count()))


class Synthesizer:
    """Fills a pool with batches; a context manager that closes the progress display.

    Batch i depends only on the teacher, the settings, fold_in(key(seed), i) and the student that competes, if there is one.
    It does not depend on the devices or on interruptions. (A student that was trained on several GPUs or TPUs differs by
    rounding from one that was trained on a single device.) No real image is read.

    If there are several processes, all of them make the same calls. With `bn_stats` 'device' every process inverts and
    writes its own batches, one batch per device. With 'global' all processes share every batch, and process 0 writes it.
    """

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        pool: ImagePool,
        method: str,
        task: str,
        series: str,
        student_fn=None,
    ):
        """Prepares the synthesis; compiles nothing yet.

        Args:
          run: the run.
          teacher: the network that is inverted.
          pool: the pool that batches are written to.
          method: 'deepinversion', 'adaptive', 'prior_only' (no feature term) or 'noise' (the initial images themselves).
          task, series: the names of the task and of the series in progress, messages and checkpoints.
          student_fn: (variables, x) -> logits in eval mode, the competitor of 'adaptive'.

        Raises:
          DvinvError: the settings do not fit the teacher.
        """
        settings = run.settings.inversion_config(method)
        self._split = settings.bn_stats == 'global'
        self._writes = is_primary() or not self._split
        self._settings, self._noise_seed, self._workdir = run.settings, run.noise_seed, run.workdir
        self._teacher, self._pool, self._method = teacher, pool, method
        self._task, self._series = task, series
        self._side_by_side = batches_side_by_side(run.settings, run.mesh.size, method)
        self._classes = np.asarray(run.settings.synthesis.classes or range(teacher.num_classes), np.int32)
        missing = missing_batches(run.settings.synthesis, pool)
        self._checkpoints = BatchCheckpoints(run.workdir.path / 'checkpoints' / f'{task}-{series}', teacher.digest())
        if is_primary():
            # A run that was killed may have left checkpoints of finished batches.
            for number in {*self._checkpoints.numbers()} - {*missing}:
                self._checkpoints.drop(number)
        scale = pixel_scale_of(settings.pixel_scale, teacher)
        self._decode = make_decode(settings.parameterization, settings.contrast, teacher, scale)
        if method == 'noise':
            self._invert = _make_noise(teacher, self._decode)
        else:
            mesh = make_mesh(run.settings.devices, of_all=True) if self._split else make_mesh(self._side_by_side)
            self._invert = make_inverter(teacher, settings, mesh, student_fn)
        self._measure = make_feature_loss(teacher, settings.stages[-1])
        self._iterations = 0 if method == 'noise' else settings.iterations
        self._weights = dataclasses.asdict(settings.weights)
        self._seed_key = jax.random.key(run.noise_seed)
        self._batches = batches = run.settings.synthesis.batches
        each, unit = (self._iterations, 'iterations') if self._iterations else (1, 'batches')
        self._finished = batches - len(missing)  # the number of finished batches
        self._progress = Progress(f'{task}: {series}', batches * each, unit, self._finished * each)
        self._saved, self._pauses, self._scored = time.monotonic(), 0, False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._progress.__exit__(*exception)

    def fill(self, numbers: list[int], student_variables=None, **entries) -> None:
        """Synthesizes batches and writes them to the pool.

        Args:
          numbers: the numbers of the batches.
          student_variables: the variables of the competitor, if there is one.
          **entries: further entries of the sidecars of the batches.

        Raises:
          DvinvError: a loss is not a finite number, or the disk is full. Finished batches are kept.
          SystemExit: SIGTERM was received. Unfinished batches are saved.
        """
        group = self._settings.synthesis
        for batches, iterations in self._groups(numbers, student_variables):
            preemption.leave_if_asked(self._saved_clause(len(self._checkpoints.numbers())))
            self._saved, local = time.monotonic(), self._local(batches)
            # Batches are repeated until every device has one, so that all processes make the same number of dispatches.
            # The results of repeated batches are dropped.
            padded = (local or batches[-1:]) + (local or batches)[-1:] * (self._side_by_side - max(1, len(local)))
            keys = jax.vmap(lambda i: jax.random.fold_in(self._seed_key, i))(np.asarray(padded))
            labels = np.stack([self._classes[balanced_labels(i, group.batch_size, len(self._classes))] for i in padded])

            self._progress.pass_over(iterations * len(batches))
            inversion = self._invert(
                keys,
                labels,
                student_variables,
                functools.partial(self._report, batches),
                begun=[self._checkpoints.load(number, student_variables) for number in padded] if iterations else None,
                pause=functools.partial(self._pause, local, student_variables),
            )
            if not self._scored:  # scoring the first images of this process compiles programs
                self._progress.compiles()
                self._scored = True
            for row, number in enumerate(local if self._writes else ()):
                curve = _curve(row, inversion.metrics, self._settings.logging.iterations)
                self._write(number, keys[row], labels[row], inversion.images[row], {**entries, 'curve': curve})
                self._checkpoints.drop(number)
            self._finished += len(batches)
            self._progress.update(self._finished * max(1, self._iterations))
            self._workdir.tick(self._task)
        meet(f'batches of {self._series}')

    def _groups(self, numbers: list[int], student_variables) -> list[tuple[list[int], int]]:
        """Returns the groups of batches that all processes invert side by side, each with its number of iterations done."""

        def iterations_done() -> list[int]:
            return [self._checkpoints.iterations(number, student_variables) for number in numbers]

        done: list[int] = decide(iterations_done, 'the checkpoints of unfinished batches')
        size, groups = self._side_by_side * (1 if self._split else jax.process_count()), []
        for iterations in sorted({*done}, reverse=True):
            batches = [number for number, count in zip(numbers, done, strict=True) if count == iterations]
            groups += [(batches[start : start + size], iterations) for start in range(0, len(batches), size)]
        return groups

    def _local(self, batches: list[int]) -> list[int]:
        """Returns the batches of a group that this process inverts."""
        return batches if self._split else batches[jax.process_index() * self._side_by_side :][: self._side_by_side]

    def _pause(self, numbers: list[int], student_variables, take: Callable) -> None:
        """Saves the unfinished batches if that is due or if the process was asked to exit; called between two dispatches."""
        leave = preemption.asked()
        iteration = 0
        if leave or self._is_due():
            for number, batch in zip(numbers, take(), strict=False):  # repeats are dropped
                iteration = batch.iterations
                if self._writes:
                    self._checkpoints.save(number, batch, student_variables)
            self._saved = time.monotonic()
        if leave:
            preemption.leave_if_asked(self._saved_clause(len(numbers), iteration))

    def _saved_clause(self, under_way: int, iteration: int = 0) -> str:
        """Returns a main clause that says how many batches are saved.

        Args:
          under_way: the number of unfinished batches that are saved.
          iteration: the iteration of the unfinished batches; 0 if unknown.
        """
        if not (self._finished or under_way):
            return f'no batch of {self._series} was begun, so nothing had to be saved'
        at = f' at iteration {iteration:,} of {self._iterations:,}' if iteration else ''
        saved = f' and {under_way} under way saved{at}' if under_way else ''
        return f'of {self._batches} batches of {self._series} {self._finished} are finished{saved}'

    def _is_due(self) -> bool:
        """Returns whether unfinished batches should be saved now; the same on all processes if they share a batch."""
        minutes = self._settings.logging.checkpoint_minutes
        self._pauses += 1

        def due() -> bool:
            return bool(minutes) and time.monotonic() - self._saved >= 60 * minutes

        if not self._split or jax.process_count() == 1:
            return due()
        return self._pauses % VOTE == 0 and decide(due, 'the clock')

    def _report(self, numbers: list[int], done: int, terms: dict) -> None:
        """Updates the progress display.

        Args:
          numbers: the numbers of the batches that are inverted now.
          done: the number of iterations done on each of them.
          terms: the values of the loss terms.
        """
        batches = in_words(numbers, self._batches) if len(numbers) < self._batches else ''
        self._progress.update(self._finished * self._iterations + len(numbers) * done, batches, **terms)
        self._workdir.tick(self._task)

    def _feature_loss(self, x, key: jax.Array) -> float | None:
        """Returns R_feature of a batch; None for a teacher without statistics."""
        value = float(self._measure(self._teacher.variables, x, key))
        return None if math.isnan(value) and not self._teacher.statistics(self._teacher.variables) else value

    def _write(self, number: int, key: jax.Array, labels: np.ndarray, x: np.ndarray, entries: dict) -> None:
        """Writes a finished batch to the pool, with its measurements in the sidecar."""
        teacher, images = self._teacher, self._teacher.to_uint8(x)
        parameters, augmentation_key = initial_parameters(key, len(labels), teacher.image_shape)
        synthesis = nested(self._settings.synthesis)
        del synthesis['controls']  # no image depends on them
        sidecar = {
            'batch': number,
            'iterations': self._iterations,
            'feature_loss_first': self._feature_loss(self._decode(parameters), augmentation_key),
            'feature_loss_last': self._feature_loss(teacher.normalise(images), augmentation_key),
            'config': {
                **synthesis,
                'seed': self._noise_seed,
                'bn_stats': self._settings.bn_stats,
                'method': self._method,
                'weights': self._weights,
            },
            'version': dvinv.__version__,
            **entries,
        }
        self._pool.write(number, images, labels, logits_of(teacher, images), sidecar)


def fill_pool(run: Run, teacher: Teacher, pool: ImagePool, method: str, task: str, series: str) -> None:
    """Makes the missing batches of the pool, and the damaged ones again, by a method without a competitor.

    Args:
      run, teacher, pool, method, task, series: see `Synthesizer`.

    Raises:
      DvinvError: the pool was made from another teacher, or as for `Synthesizer`.
    """
    quarantine_damaged(pool, task)
    if missing := missing_batches(run.settings.synthesis, pool):
        with Synthesizer(run, teacher, pool, method, task, series) as synthesizer:
            synthesizer.fill(missing)


def _make_noise(teacher: Teacher, decode: Callable):
    """Returns an inverter like that of `make_inverter` for the control 'noise', which returns the initial images."""

    def run(keys, labels, *_, **__) -> Inversion:
        batch_size = np.shape(labels)[1]
        return Inversion(np.stack([decode(initial_parameters(key, batch_size, teacher.image_shape)[0]) for key in keys]), {})

    return run


def in_words(numbers: list[int], count: int) -> str:
    """Returns the description of batches that the terminal shows, where batches are counted from 1."""
    first, last = min(numbers) + 1, max(numbers) + 1
    if last - first + 1 > len(numbers):
        return f'batches {listed([str(number + 1) for number in sorted(numbers)], 4)} of {count}'
    return f'batch {first} of {count}' if first == last else f'batches {first} to {last} of {count}'


def _curve(row: int, metrics: dict, every: int) -> dict[str, list]:
    """Returns the loss terms of one batch, every `every` iterations and at the last one.

    Args:
      row: the row of the batch in the arrays of `metrics`.
      metrics: the loss terms, {term: array [batches, iterations]}.
      every: the number of iterations between two values.

    Returns:
      {'step': list of iterations, term: list of values}; empty if there are no metrics.
    """
    if not metrics:
        return {}
    last = len(metrics['loss'][row]) - 1
    steps = [i for i in range(last + 1) if i % every == 0 or i == last]
    return {'step': steps, **{term: [float(values[row][i]) for i in steps] for term, values in metrics.items()}}


def fill_in_competition(run: Run, teacher: Teacher, pool: ImagePool, student: TrainTarget, task: str, series: str) -> None:
    """Makes the batches that are missing from the pool, in rounds, and trains the student between rounds.

    Args:
      run: the run.
      teacher: the network that is inverted.
      pool: the pool to fill.
      student: the competitor, see `distillation.student.student_of`; its checkpoints are kept.
      task, series: the names of the task and of the series in the metrics of the batches.

    Raises:
      DvinvError: a batch is missing from a round that the student has already trained past, a sidecar is damaged, or the
        pool was made from another teacher.
      SystemExit: SIGTERM was received; see `Synthesizer.fill` and `Training.advance`.
    """
    settings = run.settings.synthesis
    missing, rounds, per_round = missing_batches(settings, pool), rounds_of(run.settings), settings.batches_per_round
    if not missing:
        return
    decide(lambda: [pool.sidecar(number) for number in pool.numbers()] and None, 'a look at the pool')
    hints = hints_of(run, teacher)
    print_hints(hints)
    with (
        training_of(run, student, job_of(run, teacher, rounds, hints)) as training,
        Synthesizer(run, teacher, pool, 'adaptive', task, series, student_fn=training.apply_fn) as synthesizer,
    ):
        for number in range(rounds.count):
            unfinished = [batch for batch in range(number * per_round, (number + 1) * per_round) if batch in missing]
            start = rounds.first_update(number)
            if unfinished and training.step > start:
                raise DvinvError(
                    f'Batch {unfinished[0]} is missing from {pool.folder}. It was made against the student at update '
                    f'{start}, which has since been trained to update {training.step}; delete '
                    f'{run.workdir.path / "checkpoints" / student.name} and {run.workdir.network(student.name)}, and run '
                    'the command again, which trains the student again up to there and makes the batch again.'
                )
            if training.step < start:
                training.advance(*training_set(run.settings, pool), start)
            if unfinished:
                synthesizer.fill(unfinished, training.variables, round=number, student_updates=start)
