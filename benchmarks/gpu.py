"""Measures everything that needs a GPU, in the order of its worth, within minutes.

1. On a machine that has the data (DVINV_DATA, or ../shared/data next to the checkout) and a package index, build the bundle,
an ignored folder with the wheels that the GPU machine lacks and the data that the stages need:

    python benchmarks/gpu.py --bundle

2. Let `.gpu_bundle` travel with the checkout to the GPU machine, where a command may take 10 minutes. There, in the root of
the checkout:

    PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --minutes 9.5 --out "$OUT"

3. Fetch the 8 files of $OUT: a JSON file a stage, log.txt, imagenet.jpg. Each stage is a process of its own and writes its
file whenever it has a figure, so that one that fails, hangs or is killed loses only itself. Copy the JSON files to
`results/gpu`; `python benchmarks/gpu_rows.py results/gpu` adds the figures to `results/gpu.csv`.

4. At once, while the machine is still held, give the command of step 2 again, with as many `--minutes` as are left: finished
items are skipped, runs continue where they were ended (`runs/gpu` in the checkout has them). On a fresh machine, copy the
fetched JSON files into `.gpu_bundle/previous` first, which travels too, or name their folder by `--previous` (`results/gpu`
has those that are landed): finished items are skipped there as well, unfinished runs start again, with a new teacher.

`gpu_students.py` trains students side by side, from the same bundle; where time is short, give it the first minutes.

Rehearse all of it on a CPU, in toy sizes and a few minutes; without PyTorch its figures are null, with that reason:

    python benchmarks/gpu.py --rehearse

First pass: peak (versions, matrix products, copies), inversion (the step of ResNet-50 at 224 and 112 px), imagenet (finished
batches of MobileNetV1, GPU-hours of 215,000 images), vgg11 and resnet34 (teacher, adaptive and plain student), training (the
train step of a student). Second pass, which `--core` leaves out: inversion (CIFAR's ResNet-34, MobileNetV1), vgg11 and
resnet34 (other students, controls, seeds 1 and 2). `--stages peak training` measures these alone, in a short call. Flags
after `--` go to every run of vgg11 and resnet34. Exit status: 0, all is done; 1, something failed; 3, time was short.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_bundle  # noqa: E402
from gpu_schedule import Session, find_gpu, restore  # noqa: E402
from gpu_stage import MODULES, Settings  # noqa: E402

from dvinv.runtime.errors import DvinvError  # noqa: E402


def main() -> None:
    """Builds the bundle, or measures; a user's mistake ends in a sentence and status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage that is under way, as Ctrl-C does
    start = time.monotonic()
    try:
        arguments = parse(sys.argv[1:])
        if arguments.bundle:
            print(gpu_bundle.build(arguments.bundle_folder))
            return
        session = prepare(arguments, start + 60 * arguments.minutes)
        status = session.run()
    except DvinvError as error:
        sys.exit(f'gpu: {error}')
    sys.exit(status)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments.

    Raises:
      DvinvError: a value out of range, or no folder for the figures.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Flags after -- go to every run of vgg11 and resnet34, for instance a smaller budget.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--bundle', action='store_true', help='build the bundle, measure nothing')
    parser.add_argument('--rehearse', action='store_true', help='toy sizes on CPU')
    parser.add_argument('--core', action='store_true', help='the first passes alone')
    parser.add_argument('--stages', nargs='+', choices=MODULES, default=tuple(MODULES), help='these alone')
    parser.add_argument('--minutes', type=float, default=9.5, help='in all, from the start of the command')
    parser.add_argument(
        '--out', type=Path, help="folder of the figures; default: $OUT, and a rehearsal's runs/gpu_rehearsal/out"
    )
    parser.add_argument('--workdir', type=Path, help='folder of the runs; default: runs/gpu, or runs/gpu_rehearsal')
    parser.add_argument('--bundle-folder', type=Path, default=gpu_bundle.BUNDLE)
    parser.add_argument('--previous', type=Path, help='JSON files of an earlier call; default: previous in the bundle')
    parser.add_argument('--side-by-side', type=int, default=2, help='students that are trained at a time')
    cut = argv.index('--') if '--' in argv else len(argv)
    arguments = parser.parse_args(argv[:cut])
    arguments.run_flags = tuple(argv[cut + 1 :])
    for name, least in (('minutes', 0.5), ('side_by_side', 1)):
        if not getattr(arguments, name) >= least:
            flag = name.replace('_', '-')
            raise DvinvError(f'--{flag} is {getattr(arguments, name):g}; it must be at least {least:g}.')
    arguments.workdir = arguments.workdir or ROOT / 'runs' / ('gpu_rehearsal' if arguments.rehearse else 'gpu')
    if not arguments.out and not arguments.rehearse and not os.environ.get('OUT') and not arguments.bundle:
        raise DvinvError('--out is missing, and OUT is not set; name the folder for the figures.')
    if not arguments.out:
        arguments.out = arguments.workdir / 'out' if arguments.rehearse else Path(os.environ.get('OUT', ''))
    arguments.previous = arguments.previous or arguments.bundle_folder / 'previous'
    return arguments


def prepare(arguments: argparse.Namespace, deadline: float) -> Session:
    """Checks GPU, bundle and packages, and brings back the figures of earlier calls.

    Raises:
      DvinvError: something that the stages need is missing.
    """
    gpu = '' if arguments.rehearse else find_gpu()
    if not arguments.rehearse:
        gpu_bundle.check(arguments.bundle_folder)
    python_path = gpu_bundle.install(arguments.bundle_folder, arguments.workdir / 'site')
    settings = Settings(
        str(arguments.out.resolve()),
        str(arguments.workdir.resolve()),
        str((arguments.bundle_folder / 'data').resolve()),
        gpu,
        arguments.rehearse,
        arguments.core,
        arguments.side_by_side,
        arguments.run_flags,
        tuple(arguments.stages),
    )
    restore(settings, arguments.previous)
    return Session(settings, deadline, python_path)


if __name__ == '__main__':
    main()
