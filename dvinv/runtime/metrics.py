"""metrics.jsonl: one line a measurement, cut back to the last checkpoint when a run resumes."""

import json
from collections.abc import Callable
from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.runtime.files import disk_full_told, write_atomic


class Metrics:
    """The measurements of a run.

    A line is {"task", "series", "step", ... floats}; `step` counts updates of a training, or iterations of the synthesized
    batch that `batch` names.
    """

    def __init__(self, path: Path, on_append: Callable[[str], None] = lambda task: None):
        self._path, self._on_append = Path(path), on_append

    def append(self, task: str, series: str, lines: list[dict]) -> None:
        """Add lines, each with a `step`; flushed to the operating system before return."""
        text = ''.join(json.dumps({'task': task, 'series': series, **line}) + '\n' for line in lines)
        with disk_full_told(self._path), open(self._path, 'a') as file:
            file.write(text)
        self._on_append(task)

    def cut(self, task: str, series: str, step: int) -> None:
        """Drop the lines of a series beyond `step`: what they tell will happen again."""
        self.keep(task, series, lambda line: line['step'] <= step)

    def keep(self, task: str, series: str, wanted: Callable[[dict], bool]) -> None:
        """Of a series, keep the lines that are `wanted`; drop a last line that a kill cut short."""
        if not self._path.exists():
            return
        text = self._path.read_text(errors='replace')
        kept = []
        for line in text.splitlines(keepends=True):
            if line.endswith('\n'):
                entry = self._parse(line)
                if (entry['task'], entry['series']) != (task, series) or wanted(entry):
                    kept.append(line)
        if len(''.join(kept)) != len(text):
            write_atomic(self._path, ''.join(kept).encode())

    def gather(self, others: list['Metrics'], task: str, series: str, batches: list[int]) -> None:
        """Take over what other processes have measured of these batches; the series then goes on in order of batches."""

        batches = {*batches}

        def among(line):
            return (line['task'], line['series']) == (task, series) and line['batch'] in batches

        def of(metrics):
            return {(line['batch'], line['step']): line for line in metrics.read() if among(line)}

        mine, found = of(self), {}
        for metrics in others:  # a batch that was begun by one and made by another was measured twice, with the same values
            found |= of(metrics)
        if found.keys() <= mine.keys():
            return
        found |= mine
        lines = [line for line in self.read() if not among(line)] + [found[key] for key in sorted(found)]
        write_atomic(self._path, ''.join(json.dumps(line) + '\n' for line in lines).encode())

    def _parse(self, line: str) -> dict:
        try:
            entry = json.loads(line)
            entry['task'], entry['series'], entry['step']
        except (ValueError, KeyError, TypeError) as error:
            raise DvinvError(
                f'{self._path} holds a line that is damaged ({line.strip()[:60]!r}); delete that line.'
            ) from error
        return entry

    def read(self) -> list[dict]:
        """All lines."""
        if not self._path.exists():
            return []
        return [
            self._parse(line)
            for line in self._path.read_text(errors='replace').splitlines(keepends=True)
            if line.endswith('\n')
        ]
