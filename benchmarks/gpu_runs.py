"""Runs of `python -m dvinv.main` for the stages of gpu.py: started, waited for, and ended so that they save."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_report import read_json

ROOT = Path(__file__).resolve().parents[1]
SAVE_SECONDS = 10.0  # for which a run that is ended may save what is under way
ENDED = (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)  # exit statuses of a run that was ended


class Run:
    """A run in a process of its own; the same work directory continues an earlier one.

    Attributes:
      flags: of `dvinv.main`, without --workdir.
    """

    def __init__(self, workdir: Path, flags: list[str], memory_share: float = 0.85):
        """Starts it; its output is appended to log.txt in `workdir`.

        Args:
          flags: of `dvinv.main`, without --workdir.
          memory_share: of the GPU's memory.
        """
        self._workdir, self._start, self.flags = workdir, time.monotonic(), flags
        workdir.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, 'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{memory_share:.2f}'}
        environment.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None)
        command = [sys.executable, '-m', 'dvinv.main', *flags, '--workdir', str(workdir)]
        with open(workdir / 'log.txt', 'a') as log:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def status(self) -> int | None:
        """The exit status; None while it is under way."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def results(self) -> dict:
        """The results of its finished tasks."""
        return read_json(self._workdir / 'results.json')

    @property
    def config(self) -> dict:
        """The config as nested dicts."""
        return read_json(self._workdir / 'config.json')

    def explain(self) -> str:
        """Prints the end of its output, and returns why it failed: its status and last line."""
        lines = (self._workdir / 'log.txt').read_text().strip().splitlines()
        print('\n'.join(lines[-40:]), flush=True)
        return f'the run ended with status {self.status}: {lines[-1] if lines else "no output"}'

    def ask_to_end(self) -> None:
        """Sends SIGTERM: it saves what is under way."""
        if self.status is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, deadline: float) -> None:
        """Waits until `deadline`, on the clock of `time.monotonic`, then kills it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def end_all(runs: list[Run]) -> None:
    """Ends runs that are under way: by SIGTERM, so that they save, then by SIGKILL."""
    for run in runs:
        run.ask_to_end()
    deadline = time.monotonic() + SAVE_SECONDS
    for run in runs:
        run.end(deadline)


def run_side_by_side(
    names: list[str],
    max_running: int,
    start: Callable[[str], Run | None],
    finish: Callable[[str, Run], None],
    time_is_left: Callable[[], bool | float],
    is_ready: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Keeps up to `max_running` runs under way until time is over; the rest are then ended, and save what they can.

    Args:
      names: of the runs, in the order of their worth.
      max_running: the number of runs at a time.
      start: starts one; None if it decides not to.
      finish: is called once for each that was started, whatever way it ended.
      time_is_left: whether the runs under way may go on.
      is_ready: whether one may start now; it is asked again until none is under way.

    Returns:
      The names of the runs that were neither started nor declined by `start`.
    """
    waiting, running = list(names), {}
    try:
        while (waiting or running) and time_is_left():
            for name in [name for name, run in running.items() if run.status is not None]:
                finish(name, running.pop(name))
            ready = [name for name in waiting if is_ready(name)]
            if not ready and not running:
                break
            for name in ready[: max_running - len(running)]:
                waiting.remove(name)
                run = start(name)
                if run is not None:
                    running[name] = run
            time.sleep(0.1)
    finally:
        end_all([*running.values()])
        for name, run in running.items():
            finish(name, run)
    return waiting
