"""The metrics file metrics.jsonl: one line per measurement, truncated to the last checkpoint when a run resumes.

The measurements of a batch of images are in its sidecar (`data.pool`). If there are several processes, process 0 writes.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dvinv.errors import DvinvError
from dvinv.runtime.files import refuse_full_disk, write_atomic
from dvinv.runtime.processes import is_primary


class Metrics:
    """The measurements of a run.

    A line has the keys "task", "series" and "step", which counts updates of a training, and further keys with floats. An
    incomplete last line, which a kill may leave, is ignored.

    Raises:
      DvinvError: a line is damaged; raised by the methods that read.
    """

    def __init__(self, path: Path, on_append: Callable[[str], None] = lambda task: None):
        self._path, self._on_append = Path(path), on_append

    def append(self, task: str, series: str, lines: list[dict]) -> None:
        """Appends lines, each with a `step`, and flushes them to the operating system."""
        text = ''.join(json.dumps({'task': task, 'series': series, **line}) + '\n' for line in lines)
        if is_primary():
            with refuse_full_disk(self._path), open(self._path, 'a') as file:
                file.write(text)
        self._on_append(task)

    def lines(self, task: str, series: str) -> Iterator[dict]:
        """Yields the lines of a series, reading them one at a time."""
        with self._open() as file:
            for line in file:
                if line.endswith(b'\n'):
                    entry = self._parse(line)
                    if (entry['task'], entry['series']) == (task, series):
                        yield entry

    def cut(self, task: str, series: str, step: int) -> None:
        """Deletes the lines of a series beyond `step`, which will be measured again, and an incomplete last line."""

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
