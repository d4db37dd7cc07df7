"""Checkpoints of unfinished batches: saved on SIGTERM and periodically, deleted when the batch is finished.

Losing such a checkpoint only costs time, because a batch that is started again ends with the same bits. A checkpoint that is
damaged, or was made with another teacher, student or version, is therefore ignored.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

import dvinv
from dvinv.inversion.invert import BatchCheckpoint
from dvinv.runtime.checkpoints import Checkpoints, DamagedCheckpointError


class BatchCheckpoints:
    """The checkpoints of one series of batches, in a folder with one subfolder per batch.

    Every process saves its own batches.
    """

    def __init__(self, folder: Path, teacher_digest: str):
        self._folder, self._teacher = Path(folder), teacher_digest

    def save(self, number: int, batch: BatchCheckpoint, student_variables=None) -> None:
        """Saves the current state of batch `number`.

        Args:
          number: the number of the batch.
          batch: its state.
          student_variables: the variables of the competitor, if there is one.

        Raises:
          DvinvError: the disk is full. The older checkpoint is kept.
        """
        state = {'state': batch.state, 'metrics': batch.metrics}
        self._checkpoints(number).save(batch.iterations, state, self._about(student_variables))

    def load(self, number: int, student_variables=None) -> BatchCheckpoint | None:
        """Returns the saved state of batch `number`; None if there is none that can be resumed."""
        iterations = self.iterations(number, student_variables)
        if not iterations or not (checkpoint := self._checkpoints(number).restore()):
            return None
        return BatchCheckpoint(iterations, **checkpoint[1])

    def iterations(self, number: int, student_variables=None) -> int:
        """Returns the iterations after which batch `number` can be resumed, without reading its state; 0 if it cannot."""
        checkpoints = self._checkpoints(number)
        try:
            step = checkpoints.verified_step()
        except DamagedCheckpointError:
            return 0
        return step if step and checkpoints.metadata() == self._about(student_variables) else 0

    def numbers(self) -> list[int]:
        """Returns the numbers of the batches that have a checkpoint, in ascending order."""
        return sorted(int(path.name.removeprefix('batch-')) for path in self._folder.glob('batch-*') if path.is_dir())

    def drop(self, number: int) -> None:
        """Deletes the checkpoint of batch `number`, which is finished."""
        self._checkpoints(number).drop()

    def _about(self, student_variables) -> dict[str, str]:
        """Returns the properties that must be equal to resume a saved batch; the work directory checks the config."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(student_variables):
            digest.update(np.asarray(leaf).tobytes())
        return {'teacher': self._teacher, 'student': digest.hexdigest(), 'version': dvinv.__version__}

    def _checkpoints(self, number: int) -> Checkpoints:
        return Checkpoints(self._folder / f'batch-{number:06d}', own=True)
