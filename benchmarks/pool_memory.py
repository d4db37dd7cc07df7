"""Memory of the host while a pool grows, and while what follows reads it: one run of a config, looked at from outside.

    python benchmarks/pool_memory.py --images 1000 50000 -- --config configs/digits.py --config.synthesis.batch_size=500 \\
      "--config.synthesis.stages[0].iterations=2" --config.distillation.controls="()"

Resident memory of the process while its pool holds so many images, and the most in every task once it is whole: in
`synthesis` while its images are judged, in `distillation` while a student learns from them. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run, watch, print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, nargs=2, required=True, help='two sizes of the pool; the second is made')
    parser.add_argument('flags', nargs='+', help='of dvinv.main, after --')
    arguments = parser.parse_args()
    small, large = arguments.images
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        more = ['--workdir', folder, f'--config.synthesis.images={large}']
        with subprocess.Popen(
            [sys.executable, '-m', 'dvinv.main', *arguments.flags, *more], stdout=subprocess.DEVNULL
        ) as process:
            growing, whole = {}, {}  # {images in the pool: [MB, ...]}, {task: the most MB}
            while process.poll() is None:
                images, task, mb = images_in(workdir / 'pool'), running(workdir), resident_mb(process.pid)
                if images < large:
                    growing.setdefault(images, []).append(mb)
                else:
                    whole[task] = max(mb, whole.get(task, 0))
                time.sleep(0.2)
    if process.returncode:
        sys.exit(f'pool_memory: the run ended with status {process.returncode}')
    points = [small + (large - small) * i // 5 for i in range(5)]
    nearest = {min(growing, key=lambda images: abs(images - point)) for point in points}
    curve = {images: round(sum(growing[images]) / len(growing[images])) for images in sorted(nearest)}
    most = {task: round(mb) for task, mb in whole.items()}
    print(json.dumps({'mb_while_the_pool_has': curve, 'most_mb_with_the_whole_in': most}))


def images_in(pool: Path) -> int:
    """How many the finished shards have."""
    shards = sorted(pool.glob('shard-*.json'))
    return len(shards) * json.loads(shards[0].read_text())['images'] if shards else 0


def running(workdir: Path) -> str:
    """The first task of the run that has no results yet; the last, the report, never has any."""
    config, results = (workdir / name for name in ('config.json', 'results.json'))
    tasks = json.loads(config.read_text())['tasks'] if config.exists() else ['']
    finished = json.loads(results.read_text()) if results.exists() else {}
    return next((task for task in tasks if task not in finished), tasks[-1])


def resident_mb(pid: int) -> float:
    """Of a process, and of no page of a file that it only maps."""
    try:
        found = re.search(r'RssAnon:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())
    except (FileNotFoundError, ProcessLookupError):
        found = None
    return int(found[1]) / 1024 if found else 0.0


if __name__ == '__main__':
    main()
