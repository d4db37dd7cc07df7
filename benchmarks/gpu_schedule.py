"""The stages of gpu.py in their order: each in a process of its own, within its limit and the time of the whole call."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from gpu_report import Report, read_json
from gpu_stage import MODULES, ROOT, Settings
from gpu_summary import summary

from dvinv.runtime.errors import DvinvError

GRACE = 15.0  # seconds in which a stage that is ended may save; then it is killed
DONE, FAILED, SHORT_OF_TIME = 0, 1, 3  # exit statuses


class Pass(NamedTuple):
    """The items of one level of a stage."""

    stage: str
    level: int
    limit: float  # seconds
    least: float  # seconds without which it is not started


# In the order of worth: first the figures that have a bar, then those that complete them.
SCHEDULE = (
    Pass('peak', 1, 60, 20),
    Pass('inversion', 1, 210, 60),
    Pass('imagenet', 1, 110, 50),
    Pass('vgg11', 1, 240, 60),
    Pass('resnet34', 1, 600, 60),
    Pass('training', 1, 110, 50),
    Pass('inversion', 2, 210, 60),
    Pass('vgg11', 2, 600, 45),
    Pass('resnet34', 2, 600, 60),
)
REHEARSED_LIMIT, REHEARSED_LEAST = 600, 5


def find_gpu() -> str:
    """Returns the name of the first GPU.

    Raises:
      DvinvError: there is none.
    """
    try:
        command = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
        names = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split('\n')
    except (OSError, subprocess.SubprocessError) as error:
        names, reason = [], f' ({type(error).__name__}: {error})'
    else:
        reason = ''
    if not any(names):
        raise DvinvError(f'No NVIDIA GPU is found here{reason}; --rehearse does everything in toy sizes on a CPU.')
    return names[0].strip()


def restore(settings: Settings, previous: Path) -> None:
    """Copies the JSON files of earlier calls into the folder of the figures where it lacks them.

    They come from the work directory where this machine was used before, else from `previous`. The stage 'peak' is left out
    where it was measured on another GPU.

    Raises:
      DvinvError: a file is damaged, or comes from a rehearsal although this is none (or the other way round).
    """
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for stage in MODULES:
        target, kept = out / f'{stage}.json', Path(settings.workdir) / 'figures' / f'{stage}.json'
        source = next((path for path in (target, kept, previous / target.name) if path.is_file()), None)
        if source is None:
            continue
        try:
            report = read_json(source)
            rehearsal, gpus = report['rehearsal'], {item['gpu'] for item in report['items'].values()} - {None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DvinvError(f'{source} is damaged ({type(error).__name__}: {error}); delete it.') from error
        if rehearsal != settings.rehearse:
            kind = 'a rehearsal' if rehearsal else 'a measurement'
            raise DvinvError(f'{source} comes from {kind}, unlike this call; name another --out, --workdir or --previous.')
        if stage == 'peak' and gpus - {settings.gpu}:
            for path in (target, kept):
                path.unlink(missing_ok=True)
        elif source != target:
            shutil.copyfile(source, target)


@dataclasses.dataclass(frozen=True)
class Session:
    """One call.

    Attributes:
      deadline: when it must end, on the clock of `time.monotonic`.
      python_path: folders of packages to add to PYTHONPATH.
    """

    settings: Settings
    deadline: float
    python_path: list[str]

    def run(self) -> int:
        """Measures what is not done yet, as far as time allows; prints the summary and returns the exit status."""
        settings = self.settings
        Path(settings.workdir).mkdir(parents=True, exist_ok=True)
        settings_file = Path(settings.workdir) / 'settings.json'
        settings_file.write_text(json.dumps(dataclasses.asdict(settings)))
        with open(Path(settings.out) / 'log.txt', 'a') as log:
            self._say(log, f'{settings.gpu or "rehearsal on CPU"}; {self._left():.0f} s')
            for each in SCHEDULE:
                if each.stage in settings.stages and (each.level == 1 or not settings.core):
                    self._run_pass(each, settings_file, log)
            reports = {stage: settings.report(stage) for stage in MODULES}
            self._say(log, summary(reports, settings))
        return self._status([reports[stage] for stage in settings.stages])

    def _run_pass(self, each: Pass, settings_file: Path, log) -> None:
        report, name = self.settings.report(each.stage), f'{each.stage}, pass {each.level}'
        names = report.unfinished(each.level)
        if not names:
            self._say(log, f'{name}: done in an earlier call')
            return
        limit, least = (REHEARSED_LIMIT, REHEARSED_LEAST) if self.settings.rehearse else (each.limit, each.least)
        left = self._left()
        if left < least:
            reason = f'skipped: {max(0.0, left):.0f} s were left, and the stage needs at least {least:.0f}'
            for item in names:
                report.excuse(item, reason)
            self._say(log, f'{name}: {reason}')
            return
        seconds, start = min(limit, left), time.monotonic()
        self._say(log, f'{name}: at most {seconds:.0f} s for {", ".join(names)}')
        error = self._run_stage(each, settings_file, seconds, log)
        report = self.settings.report(each.stage)
        report.set_error(error)
        states = ', '.join(f'{item} {report.state(item)}' for item in names)
        self._say(log, f'{name}: {time.monotonic() - start:.0f} s: {states}' + (f' ({error})' if error else ''))

    def _run_stage(self, each: Pass, settings_file: Path, seconds: float, log) -> str | None:
        """Runs a stage in a process of its own; returns what was wrong with its end, None where nothing was."""
        command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu_stage.py'), each.stage, str(settings_file)]
        command += [str(each.level), f'{seconds:.1f}']
        process = subprocess.Popen(
            command, cwd=ROOT, env=self._environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        grace = GRACE  # after a SIGTERM or Ctrl-C of this process
        try:
            status = process.wait(seconds + GRACE)
            return None if status == 0 else f'the process of the stage ended with status {status}'
        except subprocess.TimeoutExpired:
            grace = 0.0
            return f'killed: it had not ended {GRACE:.0f} s after its {seconds:.0f} s'
        finally:
            end_group(process, grace)

    def _environment(self) -> dict[str, str]:
        settings = self.settings
        cache = Path(settings.workdir) / 'cache'
        defaults = {
            'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.0',
            'TORCHINDUCTOR_CACHE_DIR': str(cache / 'inductor'),
        }
        paths = [*self.python_path, str(ROOT), os.environ.get('PYTHONPATH', '')]
        return {
            **defaults,
            **os.environ,
            'PYTHONPATH': os.pathsep.join(filter(None, paths)),
            'PYTHONUNBUFFERED': '1',
            'JAX_PLATFORMS': 'cpu' if settings.rehearse else 'cuda,cpu',
            'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # several processes share the GPU
        }

    def _left(self) -> float:
        """Returns the seconds that a stage may take, so that it can be ended before the deadline."""
        return self.deadline - time.monotonic() - GRACE

    def _say(self, log, text: str) -> None:
        print(text, flush=True)
        print(f'== {text}', file=log, flush=True)

    def _status(self, reports: list[Report]) -> int:
        levels = (1,) if self.settings.core else (1, 2)
        if all(report.complete(level) for report in reports for level in levels):
            return DONE
        return FAILED if any(report.failed() for report in reports) else SHORT_OF_TIME


def end_group(process: subprocess.Popen, grace: float) -> None:
    """Ends a process that leads a session, and all that it started: SIGTERM to it alone, `grace` seconds later SIGKILL."""
    if process.poll() is None and grace:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
