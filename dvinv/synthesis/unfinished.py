"""Batches that are under way, on disk: one file each, saved on SIGTERM and every so many minutes, deleted with the batch.

Losing such a file costs time alone, since a batch that starts anew ends with the same bits; so one that is damaged, or of
another teacher, student or version, is passed over.
"""

import hashlib
import io
import json
from pathlib import Path

import jax
import numpy as np

import dvinv
from dvinv.inversion.invert import Unfinished
from dvinv.runtime.files import write_atomic


def packed(batch: Unfinished, about: str = '') -> bytes:
    """A batch as the bytes of an npz, with a text."""
    buffer = io.BytesIO()
    arrays = {f'state-{i}': leaf for i, leaf in enumerate(batch.state)}
    arrays |= {f'metric-{term}': values for term, values in batch.metrics.items()}
    np.savez(buffer, about=np.array(about), **arrays)
    return buffer.getvalue()


def unpacked(data: bytes) -> tuple[Unfinished, str]:
    """(batch, text), the inverse of `packed`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    metrics = {name.removeprefix('metric-'): arrays[name] for name in arrays if name.startswith('metric-')}
    state = [arrays[f'state-{i}'] for i in range(len(arrays) - len(metrics) - 1)]
    return Unfinished(len(metrics['loss']), state, metrics), str(arrays['about'])


class UnfinishedBatches:
    """Those of one series of batches, in a folder of its own: batch-000003.state is a sha256, then an npz of that digest."""

    def __init__(self, folder: Path, teacher_digest: str):
        self._folder, self._teacher = Path(folder), teacher_digest

    def save(self, number: int, batch: Unfinished, student_variables=None) -> None:
        """Keep batch `number` as it is now.

        Args:
          student_variables: of the competitor, where there is one.

        Raises:
          DvinvError: the disk is full. The older file stands.
        """
        data = packed(batch, self._about(batch.iterations, student_variables))
        write_atomic(self._path(number), hashlib.sha256(data).digest() + data, own=True)

    def load(self, number: int, student_variables=None) -> Unfinished | None:
        """Batch `number` as it was saved; None where it was not, or in vain."""
        try:
            digest, data = np.split(np.fromfile(self._path(number), np.uint8), [hashlib.sha256().digest_size])
        except FileNotFoundError:
            return None
        if digest.tobytes() != hashlib.sha256(data).digest():
            return None
        batch, about = unpacked(data.tobytes())
        return batch if about == self._about(batch.iterations, student_variables) else None

    def numbers(self) -> list[int]:
        """Of the batches that were saved."""
        return sorted(int(path.stem.removeprefix('batch-')) for path in self._folder.glob('batch-*.state'))

    def drop(self, number: int) -> None:
        """Batch `number` is finished."""
        self._path(number).unlink(missing_ok=True)

    def _about(self, iterations: int, student_variables) -> str:
        """What must be the same for a saved batch to go on; the work directory guards the config."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(student_variables):
            digest.update(np.ascontiguousarray(leaf))
        about = {'teacher': self._teacher, 'student': digest.hexdigest(), 'version': dvinv.__version__}
        return json.dumps({**about, 'iterations': iterations}, sort_keys=True)

    def _path(self, number: int) -> Path:
        return self._folder / f'batch-{number:06d}.state'
