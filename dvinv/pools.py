"""Chooses the pool that a run makes or is given, and finds the batches that are missing from it."""

from collections.abc import Sequence

from dvinv.configuration import DATA_FREE_CONTROLS
from dvinv.data.pool import DamagedError, ImagePool
from dvinv.errors import DvinvError, say
from dvinv.inversion import Teacher
from dvinv.runtime import preemption
from dvinv.runtime.processes import decide
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir


def open_pool(config, workdir: Workdir, teacher: Teacher) -> ImagePool:
    """Returns the pool of this run: an existing one where the config names it."""
    if config.pool:
        return ImagePool(config.pool, teacher.digest())
    return ImagePool(workdir.path / 'pool', teacher.digest(), ours=True)


def finished_pool(config, workdir: Workdir, teacher: Teacher) -> ImagePool:
    """Returns the pool of this run for the tasks after synthesis.

    Raises:
      DvinvError: batches are missing that this run was to make.
    """
    pool = open_pool(config, workdir, teacher)
    if not config.pool and (missing := missing_batches(config, pool)):
        raise DvinvError(f'Batch {missing[0]} is missing from {pool.folder}; run the task synthesis first: it makes it.')
    return pool


def open_control(workdir: Workdir, method: str, teacher_digest: str = '', ours: bool = False) -> ImagePool:
    """Returns the pool of the images of a control, for all tasks; for digest and `ours` see `ImagePool`."""
    return ImagePool(workdir.path / 'controls' / method, teacher_digest, ours)


def all_batches(config) -> list[int]:
    """Returns the numbers of the batches that make up the pool."""
    return [*range(config.synthesis.images // config.synthesis.batch_size)]


def controls_are_whole(config, workdir: Workdir, controls: Sequence[str]) -> bool:
    """Returns whether the pools of `controls` are complete, of those controls that have synthesized images."""
    pools = [open_control(workdir, control) for control in controls if control in DATA_FREE_CONTROLS]
    return not any(missing_batches(config, pool) for pool in pools)


def missing_batches(config, pool: ImagePool) -> list[int]:
    """Returns the numbers of the batches that are missing from the pool; of several processes, as process 0 sees it."""
    return decide(lambda: sorted({*all_batches(config)} - {*pool.numbers()}), 'a list of the pool')


def put_aside_damaged(pool: ImagePool, task: str) -> None:
    """Reports the damaged batches of a pool that the run makes; they are missing then, to be made anew. Process 0 looks.

    Raises:
      DvinvError: a batch was made from another teacher.
      SystemExit: SIGTERM came.
    """

    def check() -> None:
        numbers = pool.numbers()
        with Progress(f'{task}: checking the pool', len(numbers), 'batches', brief=True) as progress:
            for done, number in enumerate(numbers, 1):
                preemption.leave_if_asked(alone=True)
                try:
                    pool.check(number)
                except DamagedError as error:
                    aside = pool.folder / 'quarantine'
                    say(f'{task}: {error.what}; it is put into {aside}, and made anew.')
                progress.update(done)

    decide(check, 'a check of the pool')
