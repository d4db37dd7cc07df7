"""Memory of the host while a pool grows: one run of a config, looked at from outside.

    python benchmarks/pool_memory.py --images 1000 50000 -- --config configs/digits.py --config.synthesis.batch_size=500 \\
      "--config.synthesis.stages[0].iterations=2" --config.distillation.controls="()"

Resident memory of the process while its pool holds so many images, and the most once it is whole. Linux only.
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
    with tempfile.TemporaryDirectory() as workdir:
        more = ['--workdir', workdir, f'--config.synthesis.images={large}']
        with subprocess.Popen(
            [sys.executable, '-m', 'dvinv.main', *arguments.flags, *more], stdout=subprocess.DEVNULL
        ) as process:
            seen = []  # (images in the pool, MB)
            while process.poll() is None:
                seen.append((images_in(Path(workdir) / 'pool'), resident_mb(process.pid)))
                time.sleep(0.2)
    if process.returncode:
        sys.exit(f'pool_memory: the run ended with status {process.returncode}')
    at = {}
    for images, mb in seen:
        at.setdefault(images, []).append(mb)
    points = [small + (large - small) * i // 5 for i in range(5)]
    nearest = {point: min(at, key=lambda images: abs(images - point)) for point in points}
    curve = {images: round(sum(at[images]) / len(at[images])) for images in nearest.values()}
    most = round(max(mb for images, mb in seen if images == large))  # with the last batch, distillation and report
    print(json.dumps({'mb_while_the_pool_has': curve, 'most_mb_with_the_whole': most}))


def images_in(pool: Path) -> int:
    """How many the finished shards have."""
    shards = sorted(pool.glob('shard-*.json'))
    return len(shards) * json.loads(shards[0].read_text())['images'] if shards else 0


def resident_mb(pid: int) -> float:
    """Of a process, and of no page of a file that it only maps."""
    try:
        found = re.search(r'RssAnon:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())
    except (FileNotFoundError, ProcessLookupError):
        found = None
    return int(found[1]) / 1024 if found else 0.0


if __name__ == '__main__':
    main()
