"""metrics.jsonl: one line a measurement, cut back to the last checkpoint when a run resumes.

A pool of ten million images leaves millions of lines, so they are read one by one: at most an index of them is in memory.
"""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dvinv.errors import DvinvError
from dvinv.runtime.files import disk_full_told, write_atomic


class Metrics:
    """The measurements of a run.

    A line is {"task", "series", "step", ... floats}; `step` counts updates of a training, or iterations of the synthesized
    batch that `batch` names. A last line that a kill cut short counts as not there.

    Raises:
      DvinvError: a line is damaged; by whatever reads it.
    """

    def __init__(self, path: Path, on_append: Callable[[str], None] = lambda task: None):
        self._path, self._on_append = Path(path), on_append

    def append(self, task: str, series: str, lines: list[dict]) -> None:
        """Add lines, each with a `step`; flushed to the operating system before return."""
        text = ''.join(json.dumps({'task': task, 'series': series, **line}) + '\n' for line in lines)
        with disk_full_told(self._path), open(self._path, 'a') as file:
            file.write(text)
        self._on_append(task)

    def lines(self, task: str, series: str) -> Iterator[dict]:
        """The lines of a series, each read when it is asked for."""
        with self._open() as file:
            for _, entry in self._entries(file):
                if (entry['task'], entry['series']) == (task, series):
                    yield entry

    def cut(self, task: str, series: str, step: int) -> None:
        """Drop the lines of a series beyond `step`: what they tell will happen again."""
        self.keep(task, series, lambda line: line['step'] <= step)

    def keep(self, task: str, series: str, wanted: Callable[[dict], bool]) -> None:
        """Of a series, keep the lines that are `wanted`; drop a last line that a kill cut short."""

        def stays(line: bytes) -> bool:
            if not line.endswith(b'\n'):
                return False
            entry = self._parse(line)
            return (entry['task'], entry['series']) != (task, series) or wanted(entry)

        with self._open() as file:
            intact = 0  # lines before the first that goes
            for line in file:
                if not stays(line):
                    break
                intact += 1
            else:
                return
            file.seek(0)
            write_atomic(self._path, itertools.chain(itertools.islice(file, intact), filter(stays, file)))

    def gather(self, others: list['Metrics'], task: str, series: str, batches: list[int]) -> None:
        """Take over what other processes have measured of these batches; the series then goes on in order of batches."""
        asked, rest, mine, theirs = {(task, series, batch) for batch in batches}, [], {}, {}
        with contextlib.ExitStack() as files:
            for key, block in self._blocks(files.enter_context(self._open())):
                (mine.setdefault(key, []) if key in asked else rest).append(block)
            for metrics in others:
                # Open until all is copied: whoever resumes meanwhile puts another file in its place.
                for key, block in metrics._blocks(files.enter_context(metrics._open())):
                    if key in asked:
                        theirs.setdefault(key, []).append(block)
            if any(_steps(blocks) - _steps(mine.get(key, [])) for key, blocks in theirs.items()):
                # A batch that was begun by one and made by another was measured twice, with the same values.
                merged = (_merged(theirs.get(key, []) + mine.get(key, [])) for key in sorted({*theirs, *mine}))
                parts = itertools.chain(map(_Block.lines, rest), merged)
                write_atomic(self._path, itertools.chain.from_iterable(parts))

    def _open(self) -> BinaryIO:
        try:
            return open(self._path, 'rb')
        except FileNotFoundError:
            return io.BytesIO()  # no measurement yet

    def _entries(self, file: BinaryIO) -> Iterator[tuple[bytes, dict]]:
        """Every line that was written to its end, and what it tells."""
        for line in file:
            if line.endswith(b'\n'):
                yield line, self._parse(line)

    def _blocks(self, file: BinaryIO) -> Iterator[tuple[tuple, '_Block']]:
        """All lines in blocks, each with its (task, series, batch): lines of a batch are appended at once."""
        begin, known = 0, {}
        for key, lines in itertools.groupby(self._entries(file), lambda item: _key(item[1])):
            length, steps = 0, []
            for line, entry in lines:
                length += len(line)
                steps.append(entry['step'])
            steps = tuple(steps)
            yield key, _Block(file, begin, known.setdefault(steps, steps))  # nearly all batches have the same: one object
            begin += length

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


class _Block(NamedTuple):
    """Lines that stand together in a file, from the byte `begin` on: one for each of `steps`, in the order there."""

    file: BinaryIO
    begin: int
    steps: tuple[int, ...]

    def lines(self) -> Iterator[bytes]:
        """To be read to the end before another block of the file is."""
        self.file.seek(self.begin)
        return itertools.islice(self.file, len(self.steps))


def _key(entry: dict) -> tuple:
    return entry['task'], entry['series'], entry.get('batch')


def _steps(blocks: list[_Block]) -> set[int]:
    return {step for block in blocks for step in block.steps}


def _merged(blocks: list[_Block]) -> Iterator[bytes]:
    """Their lines in order of steps; of those of one step, the last."""
    found = {}
    for block in blocks:
        found.update(zip(block.steps, block.lines(), strict=True))
    return map(found.get, sorted(found))
