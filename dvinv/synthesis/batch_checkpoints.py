"""Batches that are under way, as checkpoints: saved on SIGTERM and every so many minutes, dropped with the finished batch.

Losing such a checkpoint costs time alone, since a batch that starts anew ends with the same bits; so one that is damaged, or
of another teacher, student or version, is passed over.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

import dvinv
from dvinv.inversion.invert import BatchCheckpoint
from dvinv.runtime.checkpoints import Checkpoints, DamagedCheckpointError


class BatchCheckpoints:
    """Those of one series of batches, in a folder of its own, each in a folder there. Processes save their own batches."""

    def __init__(self, folder: Path, teacher_digest: str):
        self._folder, self._teacher = Path(folder), teacher_digest

    def save(self, number: int, batch: BatchCheckpoint, student_variables=None) -> None:
        """Keeps batch `number` as it is now.

        Args:
          student_variables: of the competitor, where there is one.

        Raises:
          DvinvError: the disk is full. The older checkpoint stands.
        """
        state = {'state': batch.state, 'metrics': batch.metrics}
        self._checkpoints(number).save(batch.iterations, state, self._about(student_variables))

    def load(self, number: int, student_variables=None) -> BatchCheckpoint | None:
        """Returns batch `number` as it was saved; None where it was not, or in vain."""
        checkpoints = self._checkpoints(number)
        try:
            found = checkpoints.restore()
        except DamagedCheckpointError:
            return None
        if found is None or checkpoints.notes() != self._about(student_variables):
            return None
        return BatchCheckpoint(len(found[1]['metrics']['loss']), **found[1])

    def numbers(self) -> list[int]:
        """Returns the numbers of the batches that were saved, ascending."""
        return sorted(int(path.name.removeprefix('batch-')) for path in self._folder.glob('batch-*') if path.is_dir())

    def drop(self, number: int) -> None:
        """Forgets batch `number`, which is finished."""
        self._checkpoints(number).drop()

    def _about(self, student_variables) -> dict[str, str]:
        """Returns what must be the same for a saved batch to go on; the work directory guards the config."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(student_variables):
            digest.update(np.ascontiguousarray(leaf))
        return {'teacher': self._teacher, 'student': digest.hexdigest(), 'version': dvinv.__version__}

    def _checkpoints(self, number: int) -> Checkpoints:
        return Checkpoints(self._folder / f'batch-{number:06d}', own=True)
