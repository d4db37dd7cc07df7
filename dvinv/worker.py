"""What a process that is not the leader does: its share of the batches, by the leader's teacher, into the leader's pool.

In a job that is a share of every batch, and the pool is the leader's to write.
"""

import sys

from dvinv import adaptive
from dvinv.pools import missing_batches, open_pool
from dvinv.runtime.workdir import Workdir
from dvinv.sharing import await_call, await_run, await_teacher
from dvinv.synthesizer import Synthesizer, fill_pool


def run(config, workdir: Workdir) -> dict:
    """Make this process's batches; returns no figures, those are the leader's.

    Raises:
      DvinvError: another config than the leader's, a mistake in another process, or as for the task `synthesis`.
      SystemExit: SIGTERM came. Batches that were under way are saved.
    """
    processes, method = workdir.processes, config.synthesis.method
    if config.pool or 'synthesis' not in config.tasks:
        _tell(workdir, 'no batches are to be made, so there is nothing to share')
        return {}
    await_run(config, workdir)
    teacher = await_teacher(config, workdir)
    pool = open_pool(config, workdir, teacher)
    if processes.joined:
        if await_call(workdir):
            # What is missing the leader tells.
            with Synthesizer(
                config, workdir, teacher, pool, method, 'synthesis', method, processes=processes
            ) as synthesizer:
                synthesizer.fill([])
        _tell(workdir, 'its part is done; process 0 goes on alone, and this one waits for its end')
        return {}
    missing = processes.share(missing_batches(config, pool))
    if method == 'adaptive':
        adaptive.fill_share(config, workdir, teacher, pool)
    else:
        fill_pool(config, workdir, teacher, pool, method, 'synthesis', method, processes)
    _tell(workdir, f'its share is done ({len(missing)} batches now); process 0 goes on alone')
    return {}


def _tell(workdir: Workdir, sentence: str) -> None:
    print(f'process {workdir.processes.index}: {sentence}', file=sys.stderr, flush=True)
