"""Trains CIFAR-10 students side by side on one GPU, also from teachers without BatchNorm.

With the bundle of `gpu.py`, and as there, in the root of the checkout on the GPU machine:

    PYTHONUNBUFFERED=1 python3 benchmarks/gpu_students.py --minutes 8 --out "$OUT"

Every run is a command of `dvinv.main` in a process of its own; `students.json` in the folder of the figures has its command,
status, seconds and results, and is written after every run. First come the pools of `cifar10_students.py:answers`, 51,200
images each. A ResNet-8 is trained on the first in five ways and scored on validation images (4,000 training images, on which
no data-free student is trained), so are three other students in two ways; the best way for the ResNet-8 is scored on test
images, with the pools of three seeds. Then come controls of the other students, teachers without BatchNorm that are trained
here (images of the vision transformer also by other weights of the feature term), and a ResNet-20 by recorded moments. A run
that waits for another is overtaken by those that need none. Runs for which time is too short are named, and those under way
at the end are stopped; the same command continues them while the machine is held. The teachers without BatchNorm and one
file of images of each of their pools come back in `networks.tar`, logs and curves in `logs.tar.gz`.
"""

import argparse
import json
import os
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_bundle  # noqa: E402
from gpu_report import read_json  # noqa: E402
from gpu_runs import Run, run_side_by_side  # noqa: E402

from dvinv.runtime.errors import DvinvError  # noqa: E402

GRACE = 15.0  # seconds before the end in which runs that are under way are stopped and files are packed
LEAST = 25.0  # seconds that a run needs at least; none is started with less
DATA = {  # test images, training images
    'validation': ('cifar10_lossless_train4000', 'cifar10_lossless_train4000'),
    'test': ('cifar10_lossless_test1000', 'cifar10_lossless_train4000'),
    'jpeg': ('cifar10_test_jpeg', 'cifar10_train_jpeg'),
}
RESNET20, RESNET32 = 'cifar10_resnet20', 'cifar10_resnet32'


class Planned(NamedTuple):
    """A run."""

    config: str  # in configs/, with its argument
    data: str  # a key of `DATA`
    flags: tuple[str, ...] = ()  # without their --config.
    weights: tuple[str, str] = ('', '')  # teacher, verifier: names of files in the bundle; '': trained here
    best_of: tuple[str, ...] = ()  # runs on validation images; it also has the flags of the best of them
    pool_of: str = ''  # run with the pool to train on; '': its own
    network_of: str = ''  # run with the trained teacher to use; '': that of `weights`
    moments: bool = False  # use that run's recorded moments as well


def large(million_views: int, *flags: str) -> tuple[str, ...]:
    """Returns the flags of a training on `million_views` times 1,024,000 augmented images, 256 an update."""
    updates = 4_000 * million_views
    rest = (f'distillation.updates={updates}', 'distillation.batch_size=256', 'distillation.warmup=200')
    return (*rest, f'logging.checkpoint_every={updates}', *flags)


CONTROLS = ("distillation.controls=('real','prior_only')",)
REAL = ("distillation.controls=('real',)",)
SEEDS = (0, 1, 2)
ANSWERS = ('distillation.hint=0.0',)
LARGE = {  # of a ResNet-8, from the pool of `answers`
    'resnet8_answers_4m': large(4, *ANSWERS),
    'resnet8_hints_4m': large(4),
    'resnet8_answers_1m': large(1, *ANSWERS),
    'resnet8_hints_1m': large(1),
    'resnet8_small_updates_1m': ('distillation.updates=62500',),
}
OTHERS = 'wrn16_1', 'vgg', 'mobilenet'
PRIOR_ONLY = 'synthesis.method=prior_only', 'synthesis.batches_per_round=0', 'distillation.updates_per_round=0'


def students(argument: str, data: str, *flags: str, **more) -> Planned:
    """Returns a run of configs/cifar10_students.py."""
    weights = (RESNET32, RESNET20) if argument == 'resnet20' else (RESNET20, RESNET32)
    return Planned(f'cifar10_students.py:{argument}', data, flags, weights, **more)


def runs() -> dict[str, Planned]:
    """Returns all runs in the order of their worth."""
    gn, vit, verified = 'cifar10_resnet20_gn.py', 'cifar10_vit.py', ('', RESNET20)
    without = ('teacher.moments_images=0',)
    looked_at = "tasks=('teacher','synthesis')", 'synthesis.images=512'
    plan = {f'answers_seed{seed}': students('answers', 'test', f'seed={seed}') for seed in SEEDS}
    pool = 'answers_seed0'
    plan |= {name: students('resnet8', 'validation', *flags, pool_of=pool) for name, flags in LARGE.items()}
    for name in OTHERS:
        plan[f'{name}_answers_1m'] = students(name, 'validation', *large(1, *ANSWERS), pool_of=pool)
        plan[f'{name}_hints_1m'] = students(name, 'validation', *large(1), pool_of=pool)
    for seed in SEEDS:
        flags, pool = (f'seed={seed}', *(REAL if seed == 0 else ())), f'answers_seed{seed}'
        plan[f'resnet8_seed{seed}'] = students('resnet8', 'test', *flags, best_of=tuple(LARGE), pool_of=pool)
    for name in ('resnet20', *OTHERS):
        plan[f'{name}_seed0'] = students(name, 'test', *CONTROLS)
        plan[f'{name}_answers_seed0'] = students(name, 'test', *ANSWERS, pool_of=f'{name}_seed0')
    plan |= {
        'answers_prior_only': students('answers', 'test', *PRIOR_ONLY),
        'vit': Planned(vit, 'jpeg', (), verified),
        'vit_free': Planned(f'{vit}:free', 'jpeg', without, verified, network_of='vit'),
        'gn': Planned(gn, 'jpeg', ("distillation.controls=('prior_only',)",), verified),
        'gn_free': Planned(f'{gn}:free', 'jpeg', without, verified, network_of='gn'),
    }
    for weight in (0.3, 0.1):
        flags = (*without, *looked_at, f'synthesis.weights.feature={weight}')
        plan[f'vit_feature_{weight}'] = Planned(vit, 'jpeg', flags, verified, network_of='vit', moments=True)
    for seed in SEEDS:
        for name, flags in (('statistics', ()), ('moments', ('teacher.moments_images=100',))):
            flags = (f'seed={seed}', *flags)
            plan[f'{name}_seed{seed}'] = Planned('cifar10_resnet20.py', 'test', flags, (RESNET20, RESNET32))
    return plan


def flags_of(planned: Planned, data: Path, folder: Path, chosen: tuple[str, ...] = ()) -> list[str]:
    """Returns the flags of `dvinv.main` without its work directory.

    Args:
      data: the folder of the .npz files.
      folder: the folder of the work directories.
      chosen: flags of the best of `planned.best_of`.
    """
    test, train = (data / f'{name}.npz' for name in DATA[planned.data])
    flags = ['data.name=npz', f'data.path={test}', f'data.train_path={train}']
    for role, name in zip(('teacher', 'verifier'), planned.weights, strict=True):
        if name:
            flags.append(f'{role}.weights={data / name}.npz')
    if planned.network_of:
        networks = folder / planned.network_of / 'networks'
        flags.append(f'teacher.weights={networks / "teacher.safetensors"}')
        if planned.moments:
            flags.append(f'teacher.moments={networks / "moments.safetensors"}')
    if planned.pool_of:
        flags.append(f'pool={folder / planned.pool_of / "pool"}')
    return ['--config', f'configs/{planned.config}', *(f'--config.{flag}' for flag in (*flags, *planned.flags, *chosen))]


class Queue:
    """Runs that share the GPU, so many at a time."""

    def __init__(self, plan: Mapping[str, Planned], folder: Path, out: Path, data: Path, side_by_side: int):
        """Brings back the figures of an earlier call on this machine; see `flags_of` for the folders."""
        self._plan, self._folder, self._out, self._data, self._side_by_side = plan, folder, out, data, side_by_side
        self.done: dict[str, dict] = {
            name: entry for name, entry in read_json(folder / 'students.json').items() if entry['status'] == 0
        }

    def run(self, deadline: float) -> None:
        """Runs all that is not done, until `deadline` on the clock of `time.monotonic`."""
        waiting = run_side_by_side(
            [name for name in self._plan if name not in self.done],
            self._side_by_side,
            self._start,
            self._finish,
            lambda: time.monotonic() < deadline,
            lambda name: self._is_ready(name) and deadline - time.monotonic() > LEAST,
        )
        print(f'Not started: {", ".join(waiting) or "none"}.', flush=True)

    def _is_ready(self, name: str) -> bool:
        planned = self._plan[name]
        others = filter(None, (planned.pool_of, planned.network_of))
        tried = all(other in self.done for other in planned.best_of)
        return tried and all(self.done.get(other, {}).get('status') == 0 for other in others)

    def _start(self, name: str) -> Run:
        planned, workdir = self._plan[name], self._folder / name
        best = best_of(planned.best_of, self.done)
        chosen = LARGE.get(best, ())
        print(f'{name}: starts' + (f', as {best}' if best else ''), flush=True)
        return Run(workdir, flags_of(planned, self._data, self._folder, chosen), memory_share=0.8 / self._side_by_side)

    def _finish(self, name: str, run: Run) -> None:
        """Writes what a run left, whatever way it ended."""
        entry = {
            'status': run.status,
            'seconds': round(run.seconds, 1),
            'command': ' '.join(run.flags),
            'results': run.results,
        }
        self.done[name] = entry
        for folder in (self._folder, self._out):
            (folder / 'students.json').write_text(json.dumps(self.done, indent=1) + '\n')
        print(f'{name}: {run.seconds:.0f} s, status {run.status}, {headline(entry["results"])}', flush=True)
        if run.status not in (0, None):
            print(f'  {run.explain()}', flush=True)


def best_of(names: tuple[str, ...], done: Mapping[str, dict]) -> str:
    """Returns the name of the run with the highest validation accuracy; '' if none of them has finished."""
    finished = [name for name in names if name in done and done[name]['status'] == 0]
    scores = {name: done[name]['results']['distillation']['test_accuracy'] for name in finished}
    return max(scores, key=lambda name: scores[name], default='')


def headline(results: Mapping) -> str:
    """Returns the accuracies of a run as a line."""
    wanted = {
        'teacher': 'test_accuracy',
        'synthesis': 'verifier_accuracy',
        'distillation': 'test_accuracy',
    }
    parts = [f'{task} {results[task].get(key)}' for task, key in wanted.items() if task in results]
    return ', '.join(parts) or 'no figures'


def pack(folder: Path, out: Path) -> None:
    """Packs teachers without BatchNorm, the first images of the pools, logs and curves."""
    with tarfile.open(out / 'networks.tar', 'w') as tar:
        for name in ('gn', 'vit', 'gn_free', 'vit_free', 'vit_feature_0.3', 'vit_feature_0.1'):
            files = [*(folder / name / 'networks').glob('*.safetensors')] if name in ('gn', 'vit') else []
            for path in [*files, *sorted((folder / name / 'pool').glob('*.npz'))[:1]]:
                tar.add(path, f'{name}/{path.name}')
    with tarfile.open(out / 'logs.tar.gz', 'w:gz') as tar:
        for path in [*folder.glob('*/log.txt'), *folder.glob('*/metrics.jsonl')]:
            tar.add(path, f'{path.parent.name}.{path.name}')


def main() -> None:
    """Runs what time allows; a user's mistake ends in a sentence and status 1."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=8.0, help='in all, from the start of the command')
    parser.add_argument('--out', type=Path, required=True, help='folder of the figures')
    parser.add_argument('--workdir', type=Path, default=ROOT / 'runs' / 'gpu_students', help='folder of the runs')
    parser.add_argument('--side-by-side', type=int, default=4, help='runs at a time')
    arguments = parser.parse_args()
    for folder in (arguments.workdir, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        gpu_bundle.check(gpu_bundle.BUNDLE)
        packages = gpu_bundle.install(gpu_bundle.BUNDLE, ROOT / 'runs' / 'site')
    except DvinvError as error:
        sys.exit(f'gpu_students: {error}')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [*packages, str(ROOT), os.environ.get('PYTHONPATH', '')]))
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / 'runs' / 'cache'))
    queue = Queue(runs(), arguments.workdir, arguments.out, gpu_bundle.BUNDLE / 'data', arguments.side_by_side)
    queue.run(start + 60 * arguments.minutes - GRACE)
    pack(arguments.workdir, arguments.out)


if __name__ == '__main__':
    main()
