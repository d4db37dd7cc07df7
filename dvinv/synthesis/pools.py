"""The pool of a run and the batches that are missing from it, and checkpoints of unfinished batches.

Losing such a checkpoint only costs time, because a batch that is started again ends with the same bits. A checkpoint that is
damaged, or was made with another teacher, student or version, is therefore ignored.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import dvinv
from dvinv.config import DATA_FREE_CONTROLS, SynthesisSettings
from dvinv.data.pool import DamagedError, ImagePool
from dvinv.inversion.invert import BatchCheckpoint
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.checkpoints import Checkpoints, DamagedCheckpointError
from dvinv.runtime.devices import decide
from dvinv.runtime.errors import DvinvError, say
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir


def open_pool(run: Run) -> ImagePool:
    """Returns the pool of a run: the pool that the settings name, or that of the work directory."""
    if run.settings.pool:
        return ImagePool(run.settings.pool, run.teacher.digest())
    return ImagePool(run.workdir.path / 'pool', run.teacher.digest(), quarantine=True)


def finished_pool(run: Run) -> ImagePool:
    """Returns the pool of a run, for the tasks after synthesis.

    Raises:
      DvinvError: batches that this run should have made are missing.
    """
    pool = open_pool(run)
    if not run.settings.pool and (missing := missing_batches(run.settings.synthesis, pool)):
        raise DvinvError(f'Batch {missing[0]} is missing from {pool.folder}; run the task synthesis first, which makes it.')
    return pool


def open_control(workdir: Workdir, method: str, teacher_digest: str = '', quarantine: bool = False) -> ImagePool:
    """Returns the image pool of a control, which all tasks share; for `teacher_digest` and `quarantine` see `ImagePool`."""
    return ImagePool(workdir.path / 'controls' / method, teacher_digest, quarantine)


def controls_are_complete(run: Run, controls: Sequence[str]) -> bool:
    """Returns whether the image pools of the data-free `controls` are complete; other controls need no pool."""
    pools = [open_control(run.workdir, control) for control in controls if control in DATA_FREE_CONTROLS]
    return not any(missing_batches(run.settings.synthesis, pool) for pool in pools)


def missing_batches(synthesis: SynthesisSettings, pool: ImagePool) -> list[int]:
    """Returns the numbers of the batches that are missing from a pool; all processes get the list of process 0."""
    return decide(lambda: sorted({*range(synthesis.batches)} - {*pool.numbers()}), 'the list of the pool')


def quarantine_damaged(pool: ImagePool, task: str) -> None:
    """Reports the damaged batches of a pool that the run makes, and moves them to quarantine, so that they are made again.

    Process 0 does the check.

    Raises:
      DvinvError: a batch was made from another teacher.
      SystemExit: SIGTERM was received.
    """

    def quarantine() -> None:
        numbers = pool.numbers()
        with Progress(f'{task}: checking the pool', len(numbers), 'batches', brief=True) as progress:
            for done, number in enumerate(numbers, 1):
                preemption.leave_if_asked(single_process_only=True)
                try:
                    pool.validate(number)
                except DamagedError as error:
                    say(f'{task}: {error.what}; it is moved to {pool.folder / "quarantine"}, and made again.')
                progress.update(done)

    decide(quarantine, 'a check of the pool')


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
