"""metrics.jsonl: one line a measurement, cut back to the last checkpoint when a run resumes.

What is measured of a batch of images stands in its sidecar (`data.pool`). Process 0 writes, of several.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dvinv.errors import DvinvError
from dvinv.runtime.files import disk_full_told, write_atomic
from dvinv.runtime.processes import is_primary


class Metrics:
    """The measurements of a run.

    A line is {"task", "series", "step", ... floats}; `step` counts updates of a training. A last line that a kill cut short
    counts as not there.

    Raises:
      DvinvError: a line is damaged; by whatever reads it.
    """

    def __init__(self, path: Path, on_append: Callable[[str], None] = lambda task: None):
        self._path, self._on_append = Path(path), on_append

    def append(self, task: str, series: str, lines: list[dict]) -> None:
        """Add lines, each with a `step`; flushed to the operating system before return."""
        text = ''.join(json.dumps({'task': task, 'series': series, **line}) + '\n' for line in lines)
        if is_primary():
            with disk_full_told(self._path), open(self._path, 'a') as file:
                file.write(text)
        self._on_append(task)

    def lines(self, task: str, series: str) -> Iterator[dict]:
        """The lines of a series, each read when it is asked for."""
        with self._open() as file:
            for line in file:
                if line.endswith(b'\n'):
                    entry = self._parse(line)
                    if (entry['task'], entry['series']) == (task, series):
                        yield entry

    def cut(self, task: str, series: str, step: int) -> None:
        """Drop the lines of a series beyond `step`, which will happen again, and a last line that a kill cut short."""

        def stays(line: bytes) -> bool:
            if not line.endswith(b'\n'):
                return False
            entry = self._parse(line)
            return (entry['task'], entry['series']) != (task, series) or entry['step'] <= step

        with self._open() as file:
            lines = file.readlines()
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            write_atomic(self._path, kept)

    def _open(self) -> BinaryIO:
        try:
            return open(self._path, 'rb')
        except FileNotFoundError:
            return io.BytesIO()  # no measurement yet

    def _parse(self, line: bytes) -> dict:
        text = line.decode(errors='replace')
        try:
            entry = json.loads(text)
            entry['task'], entry['series'], entry['step']
        except (ValueError, KeyError, TypeError) as error:
            raise DvinvError(
                f'{self._path} holds a line that is damaged ({text.strip()[:60]!r}); delete that line.'
            ) from error
        return entry
