"""A pool that several processes fill: what each waits for, and what the leader gathers."""

import contextlib
import time

from dvinv import teacher
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError, listed
from dvinv.inversion import Teacher
from dvinv.runtime import job, mistakes
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.versions import differing_from, record_in
from dvinv.runtime.waiting import wait_for
from dvinv.runtime.workdir import Workdir


def called(workdir: Workdir) -> str:
    """The leader's notice to its job: batches are to be made here, by all."""
    return f'called-{workdir.path.name}'


def passed(workdir: Workdir) -> str:
    """The leader's notice to its job: all is done here."""
    return f'passed-{workdir.path.name}'


def await_call(workdir: Workdir) -> bool:
    """For all but the leader of a job: wait until batches are to be made; False if none are."""
    there = called(workdir), passed(workdir)
    wait_for(workdir, lambda: any(map(job.heard, there)), lambda: 'process 0 to make batches')
    return not job.heard(there[1])


def await_run(config, workdir: Workdir) -> None:
    """For all but the leader: wait until the leader has begun.

    Raises:
      DvinvError: its config is another, or its versions are.
    """
    wait_for(workdir, lambda: record_in(workdir.path) is not None, lambda: 'process 0 to begin')
    workdir.refuse_other(config)
    _await_versions(workdir)


def _await_versions(workdir: Workdir) -> None:
    """Refuse versions that are not the leader's. Those of an earlier run it has some time to come back and replace."""
    end = time.monotonic() + mistakes.PATIENCE

    def decided() -> bool:
        came = record_in(workdir.path) != workdir.leader_came
        return not differing_from(workdir.path) or came or time.monotonic() >= end

    wait_for(
        workdir, decided, lambda: f'process 0, which was last here under other versions ({differing_from(workdir.path)})'
    )
    if differing := differing_from(workdir.path):
        raise DvinvError(
            f'Process 0 was last in {workdir.path} under other versions than those of process {workdir.processes.index}: '
            f'{differing}. The images would depend on who makes them; install the same versions everywhere, and start all '
            'processes again.'
        )


def await_teacher(config, workdir: Workdir) -> Teacher:
    """For all but the leader: the teacher, as soon as it is trained.

    Raises:
      DvinvError: it is not there, and the run's tasks do not include to train it.
    """
    if 'teacher' in config.tasks:
        wait_for(workdir, lambda: teacher.is_there(config, workdir), lambda: 'the teacher, which process 0 trains')
    return teacher.load(config, workdir)


def await_batches(workdir: Workdir, pool: ImagePool, numbers: list[int], task: str, series: str) -> None:
    """For the leader: wait until these batches are in the pool, then take over what the others have measured of them.

    Args:
      task, series: what their metrics go by.
    """

    batches = []  # that are lacking, when last looked

    def there() -> bool:
        batches[:] = sorted({*numbers} - {*pool.numbers()})
        return not batches

    def lacking() -> str:
        owners = sorted({number % workdir.processes.count for number in batches})
        return (
            f'batches {listed([*map(str, batches)])} of processes {listed([*map(str, owners)])}; start those that died again'
        )

    wait_for(workdir, there, lacking, task)
    others = [Metrics(path) for path in sorted(workdir.path.glob('metrics-*.jsonl'))]
    if others:
        workdir.metrics.gather(others, task, series, numbers)


def drop_measurements(workdir: Workdir) -> None:
    """For the leader, when the pool is whole and all is gathered: nobody writes there any more."""
    for path in workdir.path.glob('metrics-*.jsonl'):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
