"""Numbered batches of images from a teacher, by one of the methods, into a pool."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable

import jax
import numpy as np

import dvinv
from dvinv.configuration import inversion_config
from dvinv.data.pool import ImagePool
from dvinv.evaluation import logits_of
from dvinv.inversion import Inversion, Teacher, balanced_labels, make_feature_loss, make_inverter
from dvinv.inversion.canvas import blank_canvas, in_scale, make_paint
from dvinv.pools import all_batches, missing_batches, open_control, put_aside_damaged
from dvinv.runtime import preemption
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.processes import decide, is_primary, meet
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir, plain
from dvinv.unfinished import UnfinishedBatches

VOTE = 20  # dispatches between two looks of several processes at the clock of process 0, where they save a batch together


def control_pool(config, workdir: Workdir, teacher: Teacher, method: str, task: str) -> ImagePool:
    """Images by a lesser method, from the same noise and with the budget of `config.synthesis`; made by `task`."""
    pool = open_control(workdir, method, teacher.digest(), ours=True)
    fill_pool(config, workdir, teacher, pool, method, task, f'{method}_images')
    return pool


def abreast(config, devices: int, method: str = '') -> int:
    """How many batches a process with so many devices inverts side by side; `method` is the config's when empty."""
    group = config.synthesis
    if config.bn_stats == 'global':
        return 1
    # A competitor waits for its round: no more batches than that can be made at a time.
    adaptive = (method or group.method) == 'adaptive'
    at_a_time = group.batches_per_round if adaptive else group.images // group.batch_size
    return min(devices, -(-at_a_time // jax.process_count()))


class Synthesizer:
    """Fills a pool; a context manager, for its progress.

    Batch i depends on the teacher, the config, fold_in(key(seed), i) and, where one competes, the student alone: not on
    devices, nor on kills. (A student that learned on several GPUs or TPUs differs by rounding from one that learned on one.)
    No real image is read here.

    Of several processes all make the same calls. With `bn_stats` 'device' each inverts and writes batches of its own, a
    batch a device; with 'global' all have a part in each batch, and process 0 writes it.
    """

    def __init__(
        self,
        config,
        workdir: Workdir,
        teacher: Teacher,
        pool: ImagePool,
        method: str,
        task: str,
        series: str,
        student_fn=None,
    ):
        """Compiles nothing yet.

        Args:
          method: 'deepinversion', 'adaptive', 'prior_only' (no feature term) or 'noise' (the initial images themselves).
          task, series: what its metrics go by.
          student_fn: (variables, x) -> logits in eval mode, the competitor of 'adaptive'.

        Raises:
          DvinvError: settings that do not fit the teacher, or a pool of another teacher.
        """
        settings = inversion_config(config, method)
        self._split = settings.bn_stats == 'global'
        self._keeps = is_primary() or not self._split
        self._config, self._workdir, self._teacher, self._pool, self._method = config, workdir, teacher, pool, method
        self._task, self._series = task, series
        self._abreast = abreast(config, make_mesh(config.devices).size, method)
        self._classes = np.asarray(config.synthesis.classes or range(teacher.num_classes), np.int32)
        missing = missing_batches(config, pool)
        self._unfinished = UnfinishedBatches(workdir.path / 'checkpoints' / f'{task}-{series}', teacher.digest())
        decide(self._tidy, 'a look at the pool')
        scale = in_scale(settings.pixel_scale, teacher)
        self._paint = make_paint(settings.canvas, settings.contrast, teacher, scale)
        if method == 'noise':
            self._invert = _make_noise(teacher, self._paint)
        else:
            mesh = make_mesh(config.devices, of_all=True) if self._split else make_mesh(self._abreast)
            self._invert = make_inverter(teacher, settings, mesh, student_fn)
        self._measure = make_feature_loss(teacher, settings.stages[-1])
        self._iterations = 0 if method == 'noise' else settings.iterations
        self._weights = dataclasses.asdict(settings.weights)
        self._seed_key = jax.random.key(config.seed)
        batches = len(all_batches(config))
        each, unit = (self._iterations, 'iterations') if self._iterations else (1, 'batches')
        self._made = batches - len(missing)  # batches that are finished
        self._progress = Progress(f'{task}: {series}', batches * each, unit, self._made * each)
        self._saved, self._pauses = time.monotonic(), 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._progress.__exit__(*exception)

    def fill(self, numbers: list[int], student_variables=None, **notes) -> None:
        """Synthesize the batches of these numbers; `notes` go into their sidecars.

        Raises:
          DvinvError: a loss that is not a number, or a full disk. Batches that were finished stay.
          SystemExit: SIGTERM came. Batches that were under way are saved.
        """
        group = self._config.synthesis
        for batches, iterations in self._groups(numbers, student_variables):
            preemption.leave_if_asked()
            self._saved, own = time.monotonic(), self._own(batches)
            # Every device has work, that all processes have as many dispatches; repeats are dropped.
            padded = (own or batches[-1:]) + (own or batches)[-1:] * (self._abreast - max(1, len(own)))
            keys = jax.vmap(lambda i: jax.random.fold_in(self._seed_key, i))(np.asarray(padded))
            labels = np.stack([self._classes[balanced_labels(i, group.batch_size, len(self._classes))] for i in padded])

            self._progress.pass_over(iterations * len(batches))
            inversion = self._invert(
                keys,
                labels,
                student_variables,
                functools.partial(self._report, len(batches)),
                begun=[self._unfinished.load(number, student_variables) for number in padded] if iterations else None,
                pause=functools.partial(self._pause, own, student_variables),
            )
            for row, number in enumerate(own if self._keeps else ()):
                curve = _curve(row, inversion.metrics, self._config.logging.iterations)
                self._write(number, keys[row], labels[row], inversion.images[row], {**notes, 'curve': curve})
                self._unfinished.drop(number)
            self._made += len(batches)
            self._progress.update(self._made * max(1, self._iterations))
            self._workdir.tick(self._task)
        meet(f'batches of {self._series}')

    def _tidy(self) -> None:
        """Refuses another teacher's pool, and drops saved states of finished batches: the run was killed between the two."""
        finished = self._pool.numbers()
        for number in finished:
            self._pool.notes(number)
        for number in {*finished} & {*self._unfinished.numbers()}:
            self._unfinished.drop(number)

    def _groups(self, numbers: list[int], student_variables) -> list[tuple[list[int], int]]:
        """Batches to invert side by side, over all processes, and how many iterations of them are done: of all as many."""

        def begun() -> list[int]:
            states = (self._unfinished.load(number, student_variables) for number in numbers)
            return [state.iterations if state else 0 for state in states]

        done = dict(zip(numbers, decide(begun, 'a look at batches under way'), strict=True))
        size, groups = self._abreast * (1 if self._split else jax.process_count()), []
        for iterations, same in itertools.groupby(sorted(numbers, key=done.get, reverse=True), done.get):
            same = [*same]
            groups += [(same[start : start + size], iterations) for start in range(0, len(same), size)]
        return groups

    def _own(self, batches: list[int]) -> list[int]:
        """Those of a group of batches that this process takes part in."""
        return batches if self._split else batches[jax.process_index() * self._abreast :][: self._abreast]

    def _pause(self, numbers: list[int], student_variables, take: Callable) -> None:
        """Between two dispatches: save what is under way, now and then, and before leaving."""
        leave = preemption.asked()
        if leave or self._is_due():
            for number, batch in zip(numbers, take(), strict=False):  # repeats are dropped
                if self._keeps:
                    self._unfinished.save(number, batch, student_variables)
            self._saved = time.monotonic()
        if leave:
            preemption.leave_if_asked()

    def _is_due(self) -> bool:
        """Whether what is under way is to be saved; where processes save a batch together, the same on all."""
        minutes = self._config.logging.checkpoint_minutes
        self._pauses += 1

        def due() -> bool:
            return bool(minutes) and time.monotonic() - self._saved >= 60 * minutes

        if not self._split or jax.process_count() == 1:
            return due()
        return self._pauses % VOTE == 0 and decide(due, 'the clock')

    def _report(self, abreast: int, done: int, terms: dict) -> None:
        """Progress: `done` iterations of each of the `abreast` batches, after those of earlier ones."""
        self._progress.update(self._made * self._iterations + abreast * done, **terms)
        self._workdir.tick(self._task)

    def _feature_loss(self, x, key: jax.Array) -> float | None:
        """Returns R_feature of a batch; None of a teacher without statistics."""
        value = float(self._measure(self._teacher.variables, x, key))
        return None if math.isnan(value) and not self._teacher.statistics(self._teacher.variables) else value

    def _write(self, number: int, key: jax.Array, labels: np.ndarray, x: np.ndarray, notes: dict) -> None:
        teacher, images = self._teacher, self._teacher.to_uint8(x)
        canvas, view_key = blank_canvas(key, len(labels), teacher.image_shape)
        told = plain(self._config.synthesis)
        del told['controls']  # no image depends on what is made beside it
        about = {
            'batch': number,
            'iterations': self._iterations,
            'feature_loss_first': self._feature_loss(self._paint(canvas), view_key),
            'feature_loss_last': self._feature_loss(teacher.normalise(images), view_key),
            'config': {
                **told,
                'seed': self._config.seed,
                'bn_stats': self._config.bn_stats,
                'method': self._method,
                'weights': self._weights,
            },
            'version': dvinv.__version__,
            **notes,
        }
        self._pool.write(number, images, labels, logits_of(teacher, images), about)


def fill_pool(
    config,
    workdir: Workdir,
    teacher: Teacher,
    pool: ImagePool,
    method: str,
    task: str,
    series: str,
) -> None:
    """Make what the pool lacks, by a method without a competitor; for the arguments see `Synthesizer`.

    A batch whose sidecar is damaged is lacking too; whether images are damaged tells who reads them.
    """
    put_aside_damaged(pool, pool.notes, task)
    if missing := missing_batches(config, pool):
        with Synthesizer(config, workdir, teacher, pool, method, task, series) as synthesizer:
            synthesizer.fill(missing)


def _make_noise(teacher: Teacher, paint: Callable):
    """What `make_inverter` returns, for the control that ends where every inversion starts."""

    def run(keys, labels, *_, **__) -> Inversion:
        batch_size = np.shape(labels)[1]
        return Inversion(np.stack([paint(blank_canvas(key, batch_size, teacher.image_shape)[0]) for key in keys]), {})

    return run


def _curve(row: int, metrics: dict, every: int) -> dict[str, list]:
    """The terms of one batch, every so many iterations and at the last; {'step': iterations, term: its values there}."""
    if not metrics:
        return {}
    last = len(metrics['loss'][row]) - 1
    steps = [i for i in range(last + 1) if i % every == 0 or i == last]
    return {'step': steps, **{term: [float(values[row][i]) for i in steps] for term, values in metrics.items()}}
