"""Progress with a time of arrival: a bar on a terminal, plain lines elsewhere."""

import collections
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable

from dvinv.errors import CLEAR

BAR = 20  # characters that a bar has at least, where the terminal is not narrower than 80
DRAWN = 0.1  # seconds between two drawings of a bar
PACES = 50  # so many last stretches tell the speed
COMPILED = 'iterations', 'updates'  # work in these begins with a compilation


class Progress:
    """Counts towards `total`; a context manager.

    On a terminal a bar that is drawn over; elsewhere (a log file, a pod) a line at most every `every` seconds. `brief`: no
    word of what was done in less.
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
        """Args: `unit`: what is counted, in the plural; `done`: so many were done before this process."""
        self._title, self._total, self._unit, self._done, self._skipped = title, total, unit, done, done
        self._every, self._brief, self._stream, self._clock = every, brief, stream or sys.stderr, clock
        self._start = self._last = clock()
        self._marked = None  # when the count last went up
        self._paces = collections.deque(maxlen=PACES)  # seconds per unit
        self._terminal = getattr(self._stream, 'isatty', lambda: False)()
        if self._terminal and not brief:
            self._draw({})

    def pass_over(self, count: int) -> None:
        """Of what the next update tells, so much was done before this process: it took none of the time."""
        self._done += count
        self._skipped += count

    def compiles(self) -> None:
        """Says so on a terminal, until the next update."""
        if self._terminal:
            self._draw({}, compiles=True)

    def update(self, done: int, of: str = '', **values: float) -> None:
        """Now `done` of the total; `values` (of a part of the work that `of` names) are shown as far as there is room."""
        now = self._clock()
        if self._skipped:
            self._print(f'goes on after {self._skipped:,} of {self._total:,} {self._unit}')
            self._skipped = 0
        if done > self._done:
            # What comes before the first count is compilation; of a later one the median takes no notice.
            if self._marked is not None:
                self._paces.append((now - self._marked) / (done - self._done))
            self._marked, self._done = now, done
        if now - self._last >= (DRAWN if self._terminal else self._every) or (self._terminal and done >= self._total):
            self._last = now
            if self._terminal:
                self._draw(values, of)
            else:
                self._print(', '.join([self._count(), *_terms(values, of)]))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        seconds = self._clock() - self._start
        if kind is None and self._done >= self._total and not (self._brief and seconds < self._every):
            self._print(f'done, {self._total:,} {self._unit} in {duration(seconds)}')
        elif self._terminal:
            print(CLEAR, end='', file=self._stream, flush=True)

    def _count(self, compiles: bool = False) -> str:
        """Returns how much is done, and how long the rest takes where that is known, or that something is compiled."""
        text = f'{self._done:,}/{self._total:,} {self._unit}'
        if compiles or (self._marked is None and self._unit in COMPILED):
            return f'{text}, compiling'
        if self._paces and self._done < self._total:
            return f'{text}, {duration(statistics.median(self._paces) * (self._total - self._done))} left'
        return text

    def _draw(self, values: dict[str, float], of: str = '', compiles: bool = False) -> None:
        """Draws the bar over what stands in its line; the cursor is left at the line's start, for what is printed next."""
        width = _columns(self._stream) - 1
        title, text = self._title, self._count(compiles)
        if len(title) + BAR + len(text) + 2 > width:
            title = '…' + title[len(title) - max(0, width - BAR - len(text) - 3) :]
        for term in _terms(values, of):
            if len(title) + BAR + len(text) + len(term) + 4 > width:
                break
            text += f', {term}'
        room = max(0, width - len(title) - len(text) - 2)
        full = round(room * min(1.0, self._done / max(1, self._total)))
        bar = '█' * full + '░' * (room - full)
        print(f'{CLEAR}{f"{title} {bar} {text}"[:width]}', end='\r', file=self._stream, flush=True)

    def _print(self, text: str) -> None:
        print(f'{CLEAR if self._terminal else ""}{self._title}: {text}', file=self._stream, flush=True)


def _terms(values: dict[str, float], of: str) -> list[str]:
    """Returns the values with their names, the loss first, and before it what they are of."""
    terms = [f'{name.replace("_", " ")} {values[name]:.4g}' for name in sorted(values, key=lambda name: name != 'loss')]
    return [f'{of}: {terms[0]}', *terms[1:]] if of and terms else terms


def _columns(stream) -> int:
    """Returns how wide the terminal is."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return shutil.get_terminal_size().columns


def duration(seconds: float) -> str:
    """'7 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60:02d} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
