"""Which pool a run makes or is given, and what it lacks."""

from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.inversion import Teacher
from dvinv.runtime.workdir import Workdir


def open_pool(config, workdir: Workdir, teacher: Teacher) -> ImagePool:
    """The pool of this run: an existing one where the config names it."""
    return ImagePool(config.pool or workdir.path / 'pool', teacher.digest())


def finished_pool(config, workdir: Workdir, teacher: Teacher) -> ImagePool:
    """The pool of this run, for what comes after synthesis.

    Raises:
      DvinvError: batches are missing that this run was to make.
    """
    pool = open_pool(config, workdir, teacher)
    if not config.pool and (missing := missing_batches(config, pool)):
        raise DvinvError(f'Batch {missing[0]} is missing from {pool.folder}; run the task synthesis first: it makes it.')
    return pool


def open_control(workdir: Workdir, method: str, teacher_digest: str = '') -> ImagePool:
    """The pool of images that a lesser method makes, whichever task it is for; for the digest see `ImagePool`."""
    return ImagePool(workdir.path / 'controls' / method, teacher_digest)


def all_batches(config) -> list[int]:
    """Numbers of the batches that make up the pool."""
    return [*range(config.synthesis.images // config.synthesis.batch_size)]


def missing_batches(config, pool: ImagePool) -> list[int]:
    """Numbers of the batches that the pool lacks."""
    return sorted({*all_batches(config)} - {*pool.numbers()})
