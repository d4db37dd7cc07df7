"""Are runs that were killed the same, bit for bit, as one that was not?

    python benchmarks/kill_test.py --config configs/digits.py:smoke --kills 10

Runs the config once, undisturbed. Then, for each kill, starts it in a fresh work directory, ends it with SIGKILL at a random
moment, runs the same command again to its end, and compares everything that lasts: pool, controls, networks, samples,
metrics.jsonl, and results.json without its times.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDERS = ('pool', 'controls', 'networks', 'samples')


def main() -> None:
    """Print a line a kill; exit with status 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/digits.py:smoke')
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    arguments = parser.parse_args()
    moments, identical = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory(prefix='dvinv-kills-') as folder:
        folder = Path(folder)
        run(arguments.config, folder, 'warm')  # fills the compilation cache: all others then take equally long
        begin = time.monotonic()
        run(arguments.config, folder, 'whole')
        duration, expected = time.monotonic() - begin, lasting(folder / 'whole')
        print(f'undisturbed: {duration:.0f} s', flush=True)
        if differing := differences(expected, lasting(folder / 'warm')):
            sys.exit(f'Two undisturbed runs differ already: {", ".join(differing)}')
        for kill in range(1, arguments.kills + 1):
            moment = moments.uniform(0, duration)
            was_killed = not run(arguments.config, folder, str(kill), moment)
            state = done(folder / str(kill))
            run(arguments.config, folder, str(kill))
            differing = differences(expected, lasting(folder / str(kill)))
            identical += not differing
            verdict = f'differs: {", ".join(differing)}' if differing else 'identical'
            print(f'{kill:3} {"killed" if was_killed else "had ended"} at {moment:5.1f} s, {state}: {verdict}', flush=True)
    print(f'{identical} of {arguments.kills} identical')
    sys.exit(identical < arguments.kills)


def run(config: str, folder: Path, name: str, kill_after: float | None = None) -> bool:
    """One run in `folder`/`name`; True where it came to its end, False where it was killed."""
    command = [sys.executable, '-m', 'dvinv.main', '--config', config, '--workdir', str(folder / name)]
    environment = {**os.environ, 'XDG_CACHE_HOME': str(folder / 'cache')}
    with open(folder / f'{name}.log', 'ab') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        status = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if status:
        sys.exit(f'The run {name} failed:\n{(folder / f"{name}.log").read_text()}')
    return True


def done(workdir: Path) -> str:
    """How far a run had come."""
    networks = sorted(path.stem for path in (workdir / 'networks').glob('*.safetensors'))
    shards = len(list((workdir / 'pool').glob('shard-*.json')))
    checkpoints = sorted(path.parent.name for path in (workdir / 'checkpoints').glob('*/*.json'))
    under_way = [f', a checkpoint of {name}' for name in checkpoints if name not in networks]
    return f'with {len(networks)} networks, {shards} shards{"".join(under_way)}'


def lasting(workdir: Path) -> dict:
    """{path: bytes} of all that a run promises to make again bit for bit; results without their times."""
    files = [path for folder in FOLDERS for path in (workdir / folder).rglob('*') if path.is_file()]
    content = {str(path.relative_to(workdir)): path.read_bytes() for path in [*files, workdir / 'metrics.jsonl']}
    results = json.loads((workdir / 'results.json').read_text())
    for figures in results.values():
        del figures['wall_seconds']
    return {**content, 'results.json': results}


def differences(expected: dict, found: dict) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


if __name__ == '__main__':
    main()
