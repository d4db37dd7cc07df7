"""Times the same step in dvinv and in PyTorch on one GPU, in turns, a process each; for the stages of gpu.py."""

import importlib.util
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NamedTuple

from contestants import Worker
from gpu_peak import NO_TORCH
from paired import median_interval
from torch_contestant import Variant

from dvinv.runtime.errors import DvinvError

DVINV = {'dvinv_bfloat16': 'bfloat16', 'dvinv_float32': 'float32'}  # contestant -> precision
TORCH = {
    'torch_eager_float32': Variant(),
    'torch_eager_autocast': Variant(autocast=True),
    'torch_strongest': Variant(frozen=True, autocast=True, compiled=True),
}
# Contestants that start together. The first has the GPU to itself while XLA times convolution algorithms; torch.compile
# works on the CPU mostly.
STARTS = (('dvinv_bfloat16',), ('dvinv_float32', 'torch_strongest'), ('torch_eager_float32',), ('torch_eager_autocast',))
RATIOS = (
    ('dvinv_bfloat16', 'torch_eager_float32'),
    ('dvinv_bfloat16', 'torch_eager_autocast'),
    ('dvinv_bfloat16', 'torch_strongest'),
    ('dvinv_float32', 'torch_eager_float32'),
)
TOLERANCE = 0.05  # relative, of first losses: bfloat16 differs by a percent
ROUNDS, TURN_SECONDS = 6, 0.4  # six pairs are the fewest that have an interval of 95%


class Step(NamedTuple):
    """What the contestants of an item compute.

    Attributes:
      make_dvinv: (precision) -> (factory of the contestant, its arguments), for a process of its own.
      make_torch: (variant, what dvinv's method `start` returns, what `about` returns) -> the same.
      images: in a step.
    """

    make_dvinv: Callable
    make_torch: Callable
    images: int


def fields() -> dict:
    """Returns the figures of one contest, all None."""
    contestant = {
        'seconds_per_step': None,
        'images_per_second': None,
        'tflops': None,
        'share_of_peak': None,  # of a matrix product, as the stage 'peak' measured it
        'peak_memory_mb': None,
        'first_call_seconds': None,  # compilation and the first dispatch
        'first_loss': None,
    }
    ratio = {'median': None, 'low': None, 'high': None}
    return {
        'gflop_per_step': None,
        'torch_compile_mode': None,
        'peak_tflops': {'bfloat16': None, 'float32': None},
        **{name: dict(contestant) for name in (*DVINV, *TORCH)},
        'ratios': {ratio_name(pair): dict(ratio) for pair in RATIOS},  # of seconds a step, with an interval of 95%
    }


def ratio_name(pair: tuple[str, str]) -> str:
    """Returns the name of the ratio of two contestants."""
    return '_over_'.join(pair)


def contest(context, item: str, step: Step) -> None:
    """Measures one item: starts the contestants, compares their first losses, and times them in turns.

    A contestant that fails or has another first loss than dvinv in float32 loses only its own figures.
    """
    contestants = Contestants(context, item, step)
    try:
        contestants.start()
        contestants.measure()
    finally:
        contestants.kill()
    if not context.remaining():
        raise DvinvError('Its time was over before everything was measured.')


class Contestants:
    """The contestants of one item."""

    def __init__(self, context, item: str, step: Step):
        """Starts the processes of dvinv; those of PyTorch need its weights and images."""
        self._context, self._item, self._step = context, item, step
        self._workers = {name: _worker(name, *step.make_dvinv(precision)) for name, precision in DVINV.items()}
        self._peaks = context.peaks()
        self._losses = {}
        for dtype in ('bfloat16', 'float32'):
            if dtype in self._peaks:
                self._record({dtype: self._peaks[dtype]}, 'peak_tflops')
            else:
                self._excuse("the stage 'peak' has not measured it", f'peak_tflops.{dtype}')

    def start(self) -> None:
        """Compiles all contestants and compares their first losses.

        Raises:
          DvinvError: dvinv's own bfloat16 step fails.
        """
        first = self._workers['dvinv_bfloat16']
        about, start = (first.ask(method, within=self._context.remaining()) for method in ('about', 'start'))
        self._gflop = about['flops'] / 1e9
        self._record({'gflop_per_step': self._gflop})
        if importlib.util.find_spec('torch') is None:
            for name in (*TORCH, 'torch_compile_mode'):
                self._excuse(NO_TORCH, name)
        else:
            for name, variant in TORCH.items():
                self._workers[name] = _worker(name, *self._step.make_torch(variant, start, about))
        together = [[*self._workers]] if self._context.settings.rehearse else STARTS
        for names in together:
            self._start_together([name for name in names if name in self._workers])
        if 'dvinv_bfloat16' not in self._workers:
            raise DvinvError('dvinv in bfloat16 took no first step.')
        self._compare()

    def _start_together(self, names: list[str]) -> None:
        for name in names:
            self._workers[name].send('first')
        for name in names:
            result = self._try(name, lambda worker: worker.receive(self._context.remaining()))
            if result is not None:
                self._losses[name] = result['terms']['loss']
                figures = {'first_loss': self._losses[name], 'first_call_seconds': result['seconds']}
                self._record(figures, name)

    def _compare(self) -> None:
        """Drops contestants that do not compute the same loss."""
        reference = self._losses.get('dvinv_float32', self._losses['dvinv_bfloat16'])
        for name, loss in self._losses.items():
            difference = abs(loss - reference) / max(abs(reference), 1e-6)
            if not difference <= TOLERANCE:
                self._drop(name, f'its first loss differs from dvinv by {difference:.2g}, so it is not timed')

    def measure(self) -> None:
        """Times the contestants in turns and records all that follows."""
        rehearse = self._context.settings.rehearse
        rounds, turn = (2, 0.0) if rehearse else (ROUNDS, TURN_SECONDS)
        steps = {name: self._steps_of_a_turn(name, turn) for name in [*self._workers]}
        steps = {name: count for name, count in steps.items() if count}
        if not steps:
            raise DvinvError('No contestant is left to be timed.')
        seconds = {name: [] for name in steps}
        for number in range(rounds):
            order = [*steps][number % len(steps) :] + [*steps][: number % len(steps)]
            for name in order:
                if name in self._workers:
                    taken = self._run(name, steps[name])
                    seconds[name].append(taken if taken is not None else float('nan'))
            self._record_times({name: values for name, values in seconds.items() if name in self._workers})
        for name in [*self._workers]:
            memory = self._ask(name, 'memory_mb')
            if memory is not None:
                self._record({'peak_memory_mb': memory}, name)
        if 'torch_strongest' in self._workers:
            about = self._ask('torch_strongest', 'about')
            self._record({'torch_compile_mode': about['compile_mode'] if about else None})

    def _steps_of_a_turn(self, name: str, turn: float) -> int | None:
        """Returns how many steps take `turn` seconds, after a warm-up; None where the contestant failed."""
        for _ in range(2):  # the first steps may compile again and choose algorithms
            seconds = self._run(name, 1 if self._context.settings.rehearse else 10)
            if seconds is None:
                return None
        return max(1, round(turn / seconds))

    def _record_times(self, seconds: Mapping[str, list[float]]) -> None:
        for name, values in seconds.items():
            median = statistics.median(values)
            figures = {
                'seconds_per_step': median,
                'images_per_second': self._step.images / median,
                'tflops': self._gflop / median / 1e3,
            }
            dtype = 'float32' if name.endswith('float32') else 'bfloat16'
            if dtype in self._peaks:
                figures['share_of_peak'] = figures['tflops'] / self._peaks[dtype]
            else:
                self._excuse("the stage 'peak' has not measured it", f'{name}.share_of_peak')
            self._record(figures, name)
        for pair in RATIOS:
            path = f'ratios.{ratio_name(pair)}'
            if lost := [name for name in pair if name not in seconds]:
                self._excuse(f'{lost[-1]} has no figures', path)
                continue
            ratios = [a / b for a, b in zip(*(seconds[name] for name in pair), strict=True)]
            self._record(dict(zip(('median', 'low', 'high'), median_interval(ratios), strict=True)), path)

    def kill(self) -> None:
        """Ends all processes."""
        for worker in self._workers.values():
            worker.kill()

    def _run(self, name: str, steps: int) -> float | None:
        return self._ask(name, 'run', steps)

    def _ask(self, name: str, method: str, *arguments):
        return self._try(name, lambda worker: worker.ask(method, *arguments, within=self._context.remaining()))

    def _try(self, name: str, call: Callable):
        """Returns what `call(worker)` returns; None, with the contestant dropped, where it fails."""
        try:
            return call(self._workers[name])
        except DvinvError as error:
            traceback.print_exc(file=sys.stderr)
            self._drop(name, str(error))
            return None

    def _drop(self, name: str, reason: str) -> None:
        self._workers.pop(name).kill()
        self._excuse(reason, name)
        if name == 'torch_strongest':
            self._excuse(reason, 'torch_compile_mode')

    def _record(self, figures: Mapping, path: str = '') -> None:
        self._context.report.record(self._item, figures, path)

    def _excuse(self, reason: str, path: str) -> None:
        self._context.report.excuse(self._item, reason, path)


def _worker(name: str, make: Callable, arguments: tuple) -> Worker:
    """Starts the process of a contestant."""
    return Worker(name, make, *arguments)
