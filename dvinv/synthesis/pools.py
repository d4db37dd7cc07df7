"""Opens the pool that a run makes or is given, and finds the batches that are missing from it."""

from collections.abc import Sequence

from dvinv.config import DATA_FREE_CONTROLS, SynthesisSettings
from dvinv.data.pool import DamagedError, ImagePool
from dvinv.errors import DvinvError, say
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.processes import decide
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
