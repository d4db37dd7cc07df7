"""Are runs that were killed the same, bit for bit, as one that was not?

    python benchmarks/kill_test.py --config configs/digits.py:smoke --kills 10
    python benchmarks/kill_test.py --processes 2 --kills 20 --terms 5 --config.synthesis.images=320

    python benchmarks/kill_test.py --kills 0 --ints 10

Runs the config once, undisturbed. Then, for each kill, starts it in a fresh work directory, ends it with
SIGKILL (SIGTERM for --terms, SIGINT, as of Ctrl-C, for --ints) at a random moment, runs the same command again to its end,
and compares everything that lasts: pool, controls, networks, samples, metrics.jsonl, and results.json without what is
measured in seconds. No run may leave a traceback.

Several processes are started by `launch/local.sh -n`. One of them, drawn by lot, is ended, and with it all; the script
starts all again, and so forth until the run ends. Further runs follow until all kills are spent. Beside the end, every shard
is watched: none may go, and none may be written again. Other flags are the run's.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDERS = ('pool', 'pools', 'controls', 'networks', 'samples')
MEASURED = ('wall_seconds', 'latency_ratio')  # never the same twice
SCRIPT = Path(__file__).parents[1] / 'launch' / 'local.sh'
NAMES = {signal.SIGKILL: 'killed', signal.SIGTERM: 'terminated', signal.SIGINT: 'interrupted'}


def main() -> None:
    """Print a line a kill; exit with status 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--config', default='configs/digits.py:smoke')
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--terms', type=int, default=0, help='SIGTERM instead of SIGKILL, so often')
    parser.add_argument('--ints', type=int, default=0, help='SIGINT instead of SIGKILL, so often')
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    arguments, flags = parser.parse_known_args()
    moments = random.Random(arguments.seed)
    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms + [signal.SIGINT] * arguments.ints
    if arguments.terms or arguments.ints:
        moments.shuffle(signals)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # runs would inherit that it is ignored, as in the background
    with tempfile.TemporaryDirectory(prefix='dvinv-kills-') as folder:
        runs = Runs(arguments.config, flags, Path(folder), arguments.processes)
        runs.whole('warm')  # fills the compilation cache: all others then take equally long
        begin = time.monotonic()
        runs.whole('whole')
        duration, expected = time.monotonic() - begin, lasting(runs.folder / 'whole')
        print(f'undisturbed: {duration:.0f} s', flush=True)
        if differing := differences(expected, lasting(runs.folder / 'warm')):
            sys.exit(f'Two undisturbed runs differ already: {", ".join(differing)}')
        test = one_by_one if arguments.processes == 1 else together
        sys.exit(not test(runs, signals, moments, duration, expected))


def one_by_one(runs: 'Runs', signals: list, moments: random.Random, duration: float, expected: dict) -> bool:
    """Each signal in a run of its own; whether all were identical to `expected`."""
    identical = 0
    for kill, number in enumerate(signals, 1):
        moment, name = moments.uniform(0, duration), str(kill)
        process = runs.start(name)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            ended = runs.end(process, number)
        else:
            ended = 'had ended'
        state = done(runs.folder / name)
        if 'Traceback' in (log := (runs.folder / f'{name}.log').read_text()):
            sys.exit(f'Kill {kill} left a traceback:\n{log}')
        runs.whole(name)
        differing = differences(expected, lasting(runs.folder / name))
        identical += not differing
        verdict = f'differs: {", ".join(differing)}' if differing else 'identical'
        print(f'{kill:3} {ended} at {moment:5.1f} s, {state}: {verdict}', flush=True)
    print(f'{identical} of {len(signals)} identical')
    return identical == len(signals)


def together(runs: 'Runs', signals: list, moments: random.Random, duration: float, expected: dict) -> bool:
    """All signals over as few runs of several processes as it takes; whether all were identical to `expected`."""
    left, run, identical, faults = [*enumerate(signals, 1)], 0, 0, 0
    while left:
        run += 1
        name, seen = f'run-{run}', {}
        script = runs.start(name)
        due = time.monotonic() + moments.uniform(0, duration / 2)
        while True:
            time.sleep(0.05)
            faults += watch(runs.folder / name / 'pool', seen)
            if script.poll() is not None:
                if script.returncode == 0:
                    break
                runs.refuse_mistakes(script, name)
                script = runs.start(name)  # it has had enough of attempts
            processes = runs.processes(name)
            if left and processes and time.monotonic() >= due:
                (kill, number), victim = left.pop(0), moments.choice(sorted(processes))
                os.kill(processes[victim], number)
                begin = time.monotonic()
                while {*runs.processes(name).values()} & {*processes.values()} and script.poll() is None:
                    time.sleep(0.05)
                took, state = time.monotonic() - begin, done(runs.folder / name)
                print(f'{kill:3} process {victim} {NAMES[number]}, all ended after {took:.1f} s, {state}', flush=True)
                due = time.monotonic() + moments.uniform(0, duration / 2)
        differing = differences(expected, lasting(runs.folder / name))
        identical += not differing
        print(f'{name}: {f"differs: {differing}" if differing else "identical"}, {len(seen)} shards', flush=True)
        for line in (runs.folder / f'{name}.log').read_text().splitlines():
            if line.startswith('attempt '):
                print(f'    {line}', flush=True)
    print(f'{identical} of {run} runs identical after {len(signals)} signals; {faults} shards lost or written twice')
    return identical == run and not faults


def watch(pool: Path, seen: dict) -> int:
    """How many finished shards are not as they were; `seen` remembers {name: when it was written}."""
    now = {}
    for path in pool.glob('shard-*.json'):
        with contextlib.suppress(FileNotFoundError):
            now[path.name] = path.stat().st_mtime_ns, path.with_suffix('.npz').stat().st_mtime_ns
    faults = sum(now.get(name) != written for name, written in seen.items())
    seen.update(now)
    return faults


class Runs:
    """Runs with the same flags, in folders of one folder."""

    def __init__(self, config: str, flags: list[str], folder: Path, count: int):
        self._config, self._flags, self.folder, self._count = config, flags, folder, count

    def start(self, name: str) -> subprocess.Popen:
        """The run in `folder`/`name`; of several processes, the script that starts them."""
        workdir, python = str(self.folder / name), [sys.executable, '-m', 'dvinv.main']
        command = [*python, '--config', self._config, '--workdir', workdir, *self._flags]
        if self._count > 1:
            command = ['bash', str(SCRIPT), '-n', str(self._count), self._config, workdir, *self._flags]
        more = {'XDG_CACHE_HOME': str(self.folder / 'cache'), 'PYTHON': sys.executable, 'DELAY': '0', 'PATIENCE': '10'}
        with open(self.folder / f'{name}.log', 'ab') as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **more})

    def processes(self, name: str) -> dict[int, int]:
        """{number of a process: its id in the system} of those that run in `folder`/`name` now."""
        found = {}
        for entry in Path('/proc').glob('[0-9]*/cmdline'):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().decode(errors='replace').split('\0')
                if str(self.folder / name) in words and 'dvinv.main' in words:
                    number = next(word for word in words if word.startswith('--process_id='))
                    found[int(number.partition('=')[2])] = int(entry.parent.name)
        return found

    def whole(self, name: str) -> None:
        """Run to the end."""
        process = self.start(name)
        process.wait()
        self.check(process, name)

    def check(self, process: subprocess.Popen, name: str) -> None:
        """Stop everything where a process has failed."""
        if process.returncode:
            sys.exit(f'The run {name} failed:\n{(self.folder / f"{name}.log").read_text()}')

    def refuse_mistakes(self, process: subprocess.Popen, name: str) -> None:
        """Stop everything where a run has ended with a mistake, and not because it was ended."""
        if process.returncode == 1:
            self.check(process, name)

    def end(self, process: subprocess.Popen, number: signal.Signals) -> str:
        """Send the signal, and tell what came of it."""
        begin = time.monotonic()
        process.send_signal(number)
        status = process.wait()
        if number != signal.SIGKILL and status not in (0, 128 + number, -number):  # the last: it had not come to main yet
            sys.exit(f'After {number.name} a process ended with status {status}.')
        took = '' if number == signal.SIGKILL else f' (status {status} after {time.monotonic() - begin:.1f} s)'
        return f'{NAMES[number]}{took}' if status else 'had ended'


def done(workdir: Path) -> str:
    """How far a run had come."""
    networks = sorted(path.stem for path in (workdir / 'networks').glob('*.safetensors'))
    shards = len(list((workdir / 'pool').glob('shard-*.json')))
    checkpoints = sorted(path.parent.name for path in (workdir / 'checkpoints').glob('*/*.json'))
    under_way = [f', a checkpoint of {name}' for name in checkpoints if name not in networks]
    return f'with {len(networks)} networks, {shards} shards{"".join(under_way)}'


def lasting(workdir: Path) -> dict:
    """{path: bytes} of all that a run promises to make again bit for bit; results without what is measured in seconds."""
    files = [path for folder in FOLDERS for path in (workdir / folder).rglob('*') if path.is_file()]
    content = {str(path.relative_to(workdir)): path.read_bytes() for path in [*files, workdir / 'metrics.jsonl']}
    results = json.loads((workdir / 'results.json').read_text())
    for figures in results.values():
        for name in MEASURED:
            figures.pop(name, None)
    return {**content, 'results.json': results}


def differences(expected: dict, found: dict) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


if __name__ == '__main__':
    main()
