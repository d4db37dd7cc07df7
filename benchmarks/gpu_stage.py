"""One stage of gpu.py in a process of its own: python benchmarks/gpu_stage.py STAGE SETTINGS.json LEVEL SECONDS."""

import dataclasses
import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_report import Item, Report, read_json  # noqa: E402

from dvinv.runtime.errors import DvinvError  # noqa: E402

# Stage -> its module, which has `items(stage, rehearse) -> {name: Item}` and `measure(names, context)`. They import JAX and
# PyTorch only in the processes that they start.
MODULES = {
    'peak': 'gpu_peak',
    'inversion': 'gpu_inversion',
    'imagenet': 'gpu_imagenet',
    'vgg11': 'gpu_columns',
    'resnet34': 'gpu_columns',
    'training': 'gpu_training',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all stages of one call have in common.

    Attributes:
      out: folder of the JSON files and pictures.
      workdir: folder that is kept on the machine: runs, compiled programs, copies of the JSON files.
      data: folder of the .npz files.
      gpu: its name; '' for a rehearsal.
      rehearse: toy sizes on CPU.
      core: only the first pass.
      side_by_side: runs that share the GPU in the stages 'vgg11' and 'resnet34'.
      run_flags: further flags of these runs.
      stages: those that are measured.
    """

    out: str
    workdir: str
    data: str
    gpu: str
    rehearse: bool
    core: bool
    side_by_side: int
    run_flags: tuple[str, ...] = ()
    stages: tuple[str, ...] = tuple(MODULES)

    @property
    def platform(self) -> str:
        """'cpu' or 'gpu'."""
        return 'cpu' if self.rehearse else 'gpu'

    def report(self, stage: str) -> Report:
        """Opens the report of a stage."""
        paths = [Path(self.out) / f'{stage}.json', Path(self.workdir) / 'figures' / f'{stage}.json']
        return Report(paths, stage, items_of(stage, self.rehearse), self.gpu, self.rehearse)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage measures with.

    Attributes:
      deadline: when the stage must end, on the clock of `time.monotonic`.
    """

    stage: str
    settings: Settings
    report: Report
    deadline: float

    def remaining(self) -> float:
        """Returns the seconds that are left, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def in_order(self, names: list[str], measure_one: Callable[[str], None]) -> None:
        """Measures items one after the other.

        An item that fails loses only itself, and one for which too little time is left is skipped with that reason.
        """
        for name in names:
            if not self.enough_time(name):
                continue
            start = time.monotonic()
            self.report.begin(name)
            try:
                measure_one(name)
                self.report.finish(name)
            except Exception as error:  # whatever it is, the next item is worth its time
                traceback.print_exc()
                self.report.fail(name, str(error) if isinstance(error, DvinvError) else f'{type(error).__name__}: {error}')
            finally:
                self.report.add_seconds(name, time.monotonic() - start)

    def enough_time(self, name: str) -> bool:
        """Returns whether an item can still be started; where it cannot, records why."""
        least, left = items_of(self.stage, self.settings.rehearse)[name].least_seconds, self.remaining()
        if left < least:
            self.report.excuse(name, f'skipped: {left:.0f} s were left, and it needs at least {least:.0f}')
        return left >= least

    def peaks(self) -> dict[str, float]:
        """Returns {'bfloat16' or 'float32': TFLOP/s} of a matrix product as the stage 'peak' measured it, where it did."""
        items = read_json(Path(self.settings.out) / 'peak.json').get('items', {})
        measured = [items.get(framework, {}).get('figures', {}).get('matmul_tflops', {}) for framework in ('jax', 'torch')]
        best = {dtype: [group.get(dtype) for group in measured] for dtype in ('bfloat16', 'float32')}
        return {dtype: max(filter(None, values)) for dtype, values in best.items() if any(values)}


def items_of(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns the declared measurements of a stage, in the order of their worth."""
    return importlib.import_module(MODULES[stage]).items(stage, rehearse)


def main() -> None:
    """Measures the unfinished items of one level; exits with status 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage, settings, level, seconds = sys.argv[1:]
    settings = Settings(**json.loads(Path(settings).read_text()))
    report = settings.report(stage)
    context = Context(stage, settings, report, time.monotonic() + float(seconds))
    try:
        importlib.import_module(MODULES[stage]).measure(report.unfinished(int(level)), context)
    except DvinvError as error:
        sys.exit(f'{stage}: {error}')


if __name__ == '__main__':
    main()
