"""Progress with a time of arrival: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Counts towards `total`; a context manager.

    On a terminal a bar that is drawn over; elsewhere (a log file, a pod) a line at most every `every` seconds. `brief`: no
    word of what was done in less.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        every: float = 10.0,
        brief: bool = False,
        stream=None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._title, self._total, self._first, self._done = title, total, done, done
        self._every, self._brief, self._stream, self._clock = every, brief, stream or sys.stderr, clock
        self._start = self._last = clock()
        terminal = getattr(self._stream, 'isatty', lambda: False)()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, file=self._stream, dynamic_ncols=True, leave=False)
            if terminal
            else None
        )

    def pass_over(self, count: int) -> None:
        """Of what the next update tells, so much was done before this process: it took none of the time."""
        self._first += count
        if self._bar is not None:
            self._bar.initial += count

    def update(self, done: int, **values: float) -> None:
        """Now `done` of the total; `values` are shown beside it."""
        note = ' '.join(f'{name} {value:.4g}' for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        now = self._clock()
        if self._bar is None and now - self._last >= self._every:
            self._last = now
            left = (now - self._start) / max(1, done - self._first) * (self._total - done)
            self._print(f'{done}/{self._total}, {duration(left)} left  {note}')

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._bar is not None:
            self._bar.close()
        seconds = self._clock() - self._start
        if kind is None and self._done >= self._total and not (self._brief and seconds < self._every):
            self._print(f'done, {self._total} in {duration(seconds)}')

    def _print(self, text: str) -> None:
        print(f'{self._title}: {text}'.rstrip(), file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """'7 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60:02d} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'
