"""Numbered batches of images from a teacher, by one of the methods, into a pool."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np

import dvinv
from dvinv.configuration import inversion_config
from dvinv.data.pool import ImagePool
from dvinv.evaluation import logits_of
from dvinv.inversion import Inversion, Teacher, balanced_labels, make_feature_loss, make_inverter
from dvinv.inversion.canvas import blank_canvas, in_scale, make_paint
from dvinv.orders import GO_ON, Group, orders_of
from dvinv.pools import all_batches, missing_batches, open_control, put_aside_damaged
from dvinv.runtime import job
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.processes import ALONE, Processes
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir, plain
from dvinv.sharing import called
from dvinv.unfinished import UnfinishedBatches


def control_pool(config, workdir: Workdir, teacher: Teacher, method: str, task: str) -> ImagePool:
    """Images by a lesser method, from the same noise and with the budget of `config.synthesis`; made by `task`."""
    pool = open_control(workdir, method, teacher.digest(), ours=True)
    fill_pool(config, workdir, teacher, pool, method, task, f'{method}_images')
    return pool


def abreast(config, devices: int, method: str = '', processes: Processes = ALONE) -> int:
    """How many batches a process inverts side by side; `method` is the config's when empty."""
    group = config.synthesis
    if config.bn_stats == 'global':
        return 1
    # A competitor waits for its round: no more batches than that can be made at a time.
    adaptive = (method or group.method) == 'adaptive'
    at_a_time = group.batches_per_round if adaptive else group.images // group.batch_size
    return min(devices, processes.most(at_a_time))


class Synthesizer:
    """Fills a pool; a context manager, for its progress.

    Batch i depends on the teacher, the config, fold_in(key(seed), i) and, where one competes, the student alone: not on
    devices, nor on kills. (A student that learned on several GPUs or TPUs differs by rounding from one that learned on one.)
    No real image is read here.
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
        processes: Processes = ALONE,
    ):
        """Compiles nothing yet.

        Args:
          method: 'deepinversion', 'adaptive', 'prior_only' (no feature term) or 'noise' (the initial images themselves).
          task, series: what its metrics go by.
          student_fn: (variables, x) -> logits in eval mode, the competitor of 'adaptive'.
          processes: that share the batches; `fill` is then called for this one's alone. Of a job, all take part in every
            batch; the leader tells which, and keeps them.

        Raises:
          DvinvError: settings that do not fit the teacher, or a pool of another teacher.
        """
        settings = inversion_config(config, method)
        mesh = make_mesh(config.devices, processes.joined)
        self._orders = orders_of(processes, mesh, config.logging.checkpoint_minutes)
        self._keeps = processes.writes
        self._config, self._workdir, self._teacher, self._pool, self._method = config, workdir, teacher, pool, method
        self._task, self._series = task, series
        self._abreast = abreast(config, mesh.size, method, processes)
        self._classes = np.asarray(config.synthesis.classes or range(teacher.num_classes), np.int32)
        finished, missing = pool.numbers(), processes.share(missing_batches(config, pool))
        self._unfinished = UnfinishedBatches(workdir.path / 'checkpoints' / f'{task}-{series}', teacher.digest())
        for number in processes.share(finished) or finished[:1]:  # the leader reads all of them in the end
            pool.notes(number)  # refuses another teacher's pool
        finished = {*finished}
        if self._keeps:
            for number in processes.share(finished & {*self._unfinished.numbers()}):
                self._unfinished.drop(number)  # killed between the two
        if missing and self._keeps:
            workdir.metrics.keep(task, series, lambda line: line['batch'] in finished)
        scale = in_scale(settings.pixel_scale, teacher)
        self._paint = make_paint(settings.canvas, settings.contrast, teacher, scale)
        if method == 'noise':
            self._invert = _make_noise(teacher, self._paint)
        else:
            mesh = mesh if settings.bn_stats == 'global' else make_mesh(self._abreast)
            self._invert = make_inverter(teacher, settings, mesh, student_fn)
        self._measure = make_feature_loss(teacher, settings.stages[-1])
        self._iterations = 0 if method == 'noise' else settings.iterations
        self._weights = dataclasses.asdict(settings.weights)
        self._seed_key = jax.random.key(config.seed)
        share = len(processes.share(all_batches(config)))
        each, unit = (self._iterations, 'iterations') if self._iterations else (1, 'batches')
        self._made = share - len(missing)  # batches that are finished
        self._progress = Progress(f'{task}: {series}', share * each, unit, self._made * each)

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
        for begun in self._orders.groups(self._groups(numbers, student_variables)):
            mine = [number for number, _ in begun]
            begun += begun[-1:] * (self._abreast - len(mine))  # every device has work; repeats are dropped
            padded, states = zip(*begun, strict=True)
            keys = jax.vmap(lambda i: jax.random.fold_in(self._seed_key, i))(np.asarray(padded))
            labels = np.stack([self._classes[balanced_labels(i, group.batch_size, len(self._classes))] for i in padded])

            self._progress.pass_over(sum(state.iterations for state in states[: len(mine)] if state))
            inversion = self._invert(
                keys,
                labels,
                student_variables,
                functools.partial(self._report, len(mine)),
                begun=states if all(states) else None,
                pause=functools.partial(self._pause, mine, student_variables),
            )
            for row, number in enumerate(mine if self._keeps else ()):
                lines = _lines(number, row, inversion.metrics, self._config.logging.iterations)
                self._workdir.metrics.append(self._task, self._series, lines)
                self._write(number, keys[row], labels[row], inversion.images[row], notes)
                self._unfinished.drop(number)
            self._made += len(mine)
            self._progress.update(self._made * max(1, self._iterations))

    def _groups(self, numbers: list[int], student_variables) -> list[Group]:
        """Batches to invert side by side, with their states where they were saved: all after equally many iterations."""
        begun = [(number, self._unfinished.load(number, student_variables)) for number in numbers if self._keeps]

        def iterations(entry):
            return entry[1].iterations if entry[1] else 0

        groups = []
        for _, alike in itertools.groupby(sorted(begun, key=iterations, reverse=True), iterations):
            alike = [*alike]
            groups += [alike[start : start + self._abreast] for start in range(0, len(alike), self._abreast)]
        return groups

    def _pause(self, numbers: list[int], student_variables, take: Callable) -> None:
        """Between two dispatches: save what is under way, now and then, and before leaving."""
        order = self._orders.between()
        if order != GO_ON:
            for number, batch in zip(numbers, take(), strict=False):  # repeats are dropped
                if self._keeps:
                    self._unfinished.save(number, batch, student_variables)
        self._orders.obeyed(order)

    def _report(self, abreast: int, done: int, terms: dict) -> None:
        """Progress: `done` iterations of each of the `abreast` batches, after those of earlier ones."""
        self._progress.update(self._made * self._iterations + abreast * done, **terms)
        self._workdir.tick(self._task)

    def _write(self, number: int, key: jax.Array, labels: np.ndarray, x: np.ndarray, notes: dict) -> None:
        teacher, images = self._teacher, self._teacher.to_uint8(x)
        canvas, view_key = blank_canvas(key, len(labels), teacher.image_shape)
        told = plain(self._config.synthesis)
        del told['controls']  # no image depends on what is made beside it
        about = {
            'batch': number,
            'iterations': self._iterations,
            'feature_loss_first': float(self._measure(teacher.variables, self._paint(canvas), view_key)),
            'feature_loss_last': float(self._measure(teacher.variables, teacher.normalise(images), view_key)),
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
    processes: Processes = ALONE,
) -> None:
    """Make what the pool lacks of this process's batches, by a method without a competitor; for the arguments see there.

    A batch whose sidecar is damaged is lacking too; whether images are damaged tells who reads them.
    """
    put_aside_damaged(pool, processes.share(pool.numbers()), pool.notes, task)
    if missing := processes.share(missing_batches(config, pool)):
        if processes.joined:
            job.notify(called(workdir))  # the others come
        with Synthesizer(config, workdir, teacher, pool, method, task, series, processes=processes) as synthesizer:
            synthesizer.fill(missing)


def _make_noise(teacher: Teacher, paint: Callable):
    """What `make_inverter` returns, for the control that ends where every inversion starts."""

    def run(keys, labels, *_, **__) -> Inversion:
        batch_size = np.shape(labels)[1]
        return Inversion(np.stack([paint(blank_canvas(key, batch_size, teacher.image_shape)[0]) for key in keys]), {})

    return run


def _lines(number: int, row: int, metrics: dict, every: int) -> list[dict]:
    """metrics.jsonl lines of one batch: every so many iterations, and the last."""
    if not metrics:
        return []
    last = len(metrics['loss'][row]) - 1
    return [
        {'step': i, 'batch': number, **{term: float(values[row][i]) for term, values in metrics.items()}}
        for i in range(last + 1)
        if i % every == 0 or i == last
    ]
