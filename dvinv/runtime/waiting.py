"""Waiting for what another process of the run makes, however often that one dies and comes back meanwhile."""

import sys
import time
from collections.abc import Callable

from dvinv.errors import DvinvError
from dvinv.runtime import preemption
from dvinv.runtime.progress import duration
from dvinv.runtime.workdir import Workdir

POLL = 0.5  # seconds between two looks at the shared folder, at least
SHARE = 0.1  # of the time goes into looks at most: a listing of a large pool on a network file system takes seconds
MISTAKE = 'has ended with a mistake'
TELL = 60.0  # seconds between two lines that say so


def wait_for(workdir: Workdir, ready: Callable[[], bool], what: Callable[[], str], task: str = '') -> None:
    """Return when `ready()`; tell at once, and then every minute, that it is `what()` that is waited for.

    Args:
      task: whose time this is.

    Raises:
      DvinvError: a process of the run has ended with a mistake, and it may never be ready.
      SystemExit: SIGTERM came.
    """
    begin, told, look = time.monotonic(), None, 0.0
    while True:
        if (now := time.monotonic()) >= look:
            if ready():
                return
            look = now + (time.monotonic() - now) / SHARE
        preemption.leave_if_asked()
        if failed := workdir.mistakes.heard():
            index, sentence = next(iter(failed.items()))
            # Who has ended because another did tells of that one.
            raise DvinvError(sentence if MISTAKE in sentence else f'Process {index} {MISTAKE}: {sentence}')
        if told is None or now - told >= TELL:
            so_far = f' ({duration(now - begin)} so far)' if told else ''
            print(f'process {workdir.processes.index}: waiting for {what()}{so_far}', file=sys.stderr, flush=True)
            told = now
        workdir.tick(task)
        time.sleep(POLL)
