"""What a run shows on the terminal: its banner, and progress with the estimated time left."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import jax

from dvinv.config import Settings
from dvinv.runtime.devices import jax_option, local_devices
from dvinv.runtime.errors import CLEAR

NVIDIA = '0x10de'  # vendor id on the PCI bus
DISPLAY = '0x03'  # prefix of the class of a graphics card on the PCI bus
PCI = Path('/sys/bus/pci/devices')
PLUGINS = 'jax_cuda12_plugin', 'jax_cuda13_plugin'
BAR = 20  # minimum length of a bar in characters, on a terminal with at least 80 columns
DRAWN = 0.1  # seconds between two drawings of a bar
PACES = 50  # number of recent intervals that the speed is estimated from
COMPILED = 'iterations', 'updates'  # units of work that begins with a compilation


def announce(settings: Settings, workdir, tasks: Sequence[str], seeds: int = 0) -> None:
    """Prints the banner except for its first line, which `dvinv.main` prints as soon as the flags are read.

    Args:
      settings: the settings of the run.
      workdir: the path of the work directory.
      tasks: the tasks of the settings, in the order in which they run.
      seeds: the number of seeds; 0 for a single run.

    Raises:
      DvinvError: JAX cannot use the requested devices.
    """
    lines = [('devices', device_names(settings.devices))]
    if missed := unused_gpu():
        lines.append(('', missed))
    lines.append(('tasks', ', '.join(tasks)))
    if seeds:
        lines.append(('seeds', f'{settings.seed} to {settings.seed + seeds - 1}, in folders of their own'))
    elif done := done_already(workdir, tasks):
        lines.append(('done', f'{", ".join(done)}: not run again'))
    name = 'report.html' if 'report' in tasks else 'results.json'
    lines.append((name.split('.')[0], str(Path(workdir) / name)))
    for label, text in lines:
        print(f'  {label:9}{text}', file=sys.stderr)
    sys.stderr.flush()


def done_already(workdir, tasks: Sequence[str]) -> list[str]:
    """Returns the tasks that have results in the work directory; a damaged file counts as empty and is reported later."""
    try:
        results = json.loads((Path(workdir) / 'results.json').read_text())
    except (OSError, ValueError):
        return []
    return [task for task in tasks if task != 'report' and task in results]


def device_names(count: int) -> str:
    """Returns a description of the devices that the run uses: the first `count` of this process, or all if it is 0."""
    devices = local_devices()
    kinds = Counter(device.device_kind for device in devices[: count if count > 0 else None])
    if devices[0].platform == 'cpu':
        return f'{kinds.total()} virtual device{"s" if kinds.total() > 1 else ""} of the CPU{_processor()}'
    return ', '.join(f'{number} x {kind}' for kind, number in kinds.items())


def _processor() -> str:
    """Returns the name of the CPU in brackets; '' if Linux does not report one."""
    try:
        about = Path('/proc/cpuinfo').read_text()
    except OSError:
        return ''
    names = [line.partition(':')[2].strip() for line in about.splitlines() if line.startswith('model name')]
    return f' ({" ".join(names[0].split())})' if names else ''


def unused_gpu() -> str:
    """Returns a sentence if this machine has an NVIDIA GPU that JAX does not use, otherwise ''."""
    if jax.default_backend() != 'cpu' or not (name := _gpu()):
        return ''
    here = f'A GPU is there but not used ({name})'
    if platforms := jax_option('jax_platforms'):
        return f'{here}: JAX_PLATFORMS is {platforms!r}.'
    if any(map(find_spec, PLUGINS)):
        return f'{here}, although JAX for CUDA is installed: see whether nvidia-smi and the driver work.'
    return f"{here}: install JAX for it, as by pip install 'jax[cuda12]' (cuda13 for newer drivers)."


def _gpu() -> str:
    """Returns the name of the first NVIDIA GPU by nvidia-smi, or its place on the PCI bus; '' if there is none."""
    if shutil.which('nvidia-smi'):  # many containers have it without a GPU
        try:
            answer = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=5).stdout
        except (OSError, subprocess.TimeoutExpired):
            answer = ''
        if answer.startswith('GPU '):
            return answer.splitlines()[0].partition(': ')[2].partition(' (')[0]
    for device in PCI.glob('*'):
        try:
            vendor, kind = ((device / file).read_text().strip() for file in ('vendor', 'class'))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            return f'NVIDIA, at {device.name} of the PCI bus'
    return ''


class Progress:
    """Progress towards a total; a context manager.

    On a terminal it is a bar that is redrawn in place. Elsewhere (in a log file or a pod) it is a line at most every `every`
    seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        done: int = 0,
        every: float = 10.0,
        brief: bool = False,
        stream=None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the display.

        Args:
          title: the title of the work.
          total: the number of units of all work.
          unit: the name of the unit, in the plural.
          done: the number of units that were done before this process.
          every: seconds between two lines, if the output is no terminal.
          brief: whether nothing is printed for work that takes less than `every` seconds.
          stream: the output; None for standard error.
          clock: returns the time in seconds.
        """
        self._title, self._total, self._unit, self._done, self._skipped = title, total, unit, done, done
        self._every, self._brief, self._stream, self._clock = every, brief, stream or sys.stderr, clock
        self._start = self._last = clock()
        self._marked: float | None = None  # the time at which the count last increased
        self._paces: deque[float] = deque(maxlen=PACES)  # seconds per unit
        self._terminal = getattr(self._stream, 'isatty', lambda: False)()
        if self._terminal and not brief:
            self._draw({})

    def pass_over(self, count: int) -> None:
        """Excludes `count` units of resumed work from the estimate of the time left; they were done before this process."""
        self._done += count
        self._skipped += count

    def compiles(self) -> None:
        """Shows on a terminal that a program is being compiled, until the next update."""
        if self._terminal:
            self._draw({}, compiles=True)

    def update(self, done: int, part: str = '', **values: float) -> None:
        """Updates the display.

        Args:
          done: the number of units done so far.
          part: the part of the work that `values` belong to; '' for all of it.
          **values: figures, which are shown as far as there is room.
        """
        now = self._clock()
        if self._skipped:
            self._print(f'goes on after {self._skipped:,} of {self._total:,} {self._unit}')
            self._skipped = 0
        if done > self._done:
            # The time before the first count is compilation. The median is robust to a later compilation.
            if self._marked is not None:
                self._paces.append((now - self._marked) / (done - self._done))
            self._marked, self._done = now, done
        if now - self._last >= (DRAWN if self._terminal else self._every) or (self._terminal and done >= self._total):
            self._last = now
            if self._terminal:
                self._draw(values, part)
            else:
                self._print(', '.join([self._count(), *_terms(values, part)]))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        seconds = self._clock() - self._start
        if kind is None and self._done >= self._total and not (self._brief and seconds < self._every):
            self._print(f'done, {self._total:,} {self._unit} in {duration(seconds)}')
        elif self._terminal:
            print(CLEAR, end='', file=self._stream, flush=True)

    def _count(self, compiles: bool = False) -> str:
        """Returns the text of the count, followed by the time left if it is known, or by a note about compilation."""
        text = f'{self._done:,}/{self._total:,} {self._unit}'
        if compiles or (self._marked is None and self._unit in COMPILED):
            return f'{text}, compiling'
        if self._paces and self._done < self._total:
            return f'{text}, {duration(statistics.median(self._paces) * (self._total - self._done))} left'
        return text

    def _draw(self, values: dict[str, float], part: str = '', compiles: bool = False) -> None:
        """Redraws the bar in its line; the cursor returns to the start of the line, for later output."""
        width = _columns(self._stream) - 1
        title, text = self._title, self._count(compiles)
        if len(title) + BAR + len(text) + 2 > width:
            title = '…' + title[len(title) - max(0, width - BAR - len(text) - 3) :]
        for term in _terms(values, part):
            if len(title) + BAR + len(text) + len(term) + 4 > width:
                break
            text += f', {term}'
        room = max(0, width - len(title) - len(text) - 2)
        full = round(room * min(1.0, self._done / max(1, self._total)))
        bar = '█' * full + '░' * (room - full)
        print(f'{CLEAR}{f"{title} {bar} {text}"[:width]}', end='\r', file=self._stream, flush=True)

    def _print(self, text: str) -> None:
        print(f'{CLEAR if self._terminal else ""}{self._title}: {text}', file=self._stream, flush=True)


def _terms(values: dict[str, float], part: str) -> list[str]:
    """Returns the values with their names, the loss first; the first one is prefixed with `part`."""
    terms = [f'{name.replace("_", " ")} {values[name]:.4g}' for name in sorted(values, key=lambda name: name != 'loss')]
    return [f'{part}: {terms[0]}', *terms[1:]] if part and terms else terms


def _columns(stream) -> int:
    """Returns the width of the terminal in characters."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def duration(seconds: float) -> str:
    """Returns a duration as text, for instance '7 s', '3 min 20 s' or '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60:02d} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
