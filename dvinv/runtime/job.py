"""Several processes that stand and fall together: what `bn_stats = 'global'` needs, where one batch is split over all.

They join through `jax.distributed`. Process 0, the leader, holds the list of notices that all of them read: a SIGTERM to one
is one to all, a mistake of one ends all, and all stay until the leader has finished. A process that dies without a word
(kill -9, a machine that is lost) ends the others within `TIMEOUT` seconds: a collective fails, or heartbeats are missed.
"""

import atexit
import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
import time

import jax
from jax._src import distributed as jax_distributed  # its list of keys and values has no public name

from dvinv.errors import DvinvError
from dvinv.runtime import preemption
from dvinv.runtime.devices import local_devices
from dvinv.runtime.processes import Processes, processes

ADDRESS = 'DVINV_COORDINATOR'  # host:port of the leader; launch/local.sh and launch/tpu_pod.sh set it
JOIN = 300  # seconds to wait for all to come
TIMEOUT = 30  # seconds without a heartbeat after which a process counts as dead; also to wait for others when leaving
STATUS = 75  # of a process that another's death has ended: launch/local.sh starts it again
POLL = 0.5  # seconds between two looks at the notices
FOLDER = 'dvinv'

_job = None


@contextlib.contextmanager
def job(distributed: bool | None, bn_stats: str):
    """The processes of the run; with `bn_stats` 'global', joined into one job while the context lasts.

    Args:
      distributed: as for `processes`.

    Raises:
      DvinvError: as `processes`, or they cannot be joined.
    """
    global _job
    mine = processes(distributed)
    if bn_stats != 'global' or mine.count == 1:
        yield mine
        return
    _join(mine)
    _job = _Job(mine)
    try:
        yield dataclasses.replace(mine, joined=True)
        _job.finish()
    except SystemExit:  # SIGTERM, of which all hear: they leave together
        _job.close()
        _job.notify('leave')
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as error:
        _end(f'The run cannot go on: {str(error).splitlines()[0]}', STATUS)
    except BaseException as error:
        _job.close()
        _job.notify('mistake', str(error) or type(error).__name__)
        _linger(mine)
        # Nobody waits for the others then, as jax.distributed would.
        atexit.register(_leave_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def notify(notice: str) -> None:
    """Let all processes of the job know; nothing where there is no job."""
    if _job is not None:
        _job.notify(notice)


def heard(notice: str) -> bool:
    """Whether a process has notified the job."""
    return _job is not None and notice in _job.notices


class _Job:
    """The notices: {what: a text}, read again and again by a thread of each process."""

    def __init__(self, mine: Processes):
        self._mine, self._client = mine, jax_distributed.global_state.client
        self.notices = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def notify(self, notice: str, text: str = '') -> None:
        self._client.key_value_set(f'{FOLDER}/{notice}', f'{self._mine.index} {text}', allow_overwrite=True)

    def finish(self) -> None:
        """The leader has done all; the others stay until it has."""
        if self._mine.leader:
            self.notify('over')
        while 'over' not in self.notices:
            preemption.leave_if_asked()
            time.sleep(POLL / 5)
        self.close()
        jax.distributed.shutdown()

    def close(self) -> None:
        """Listen no more."""
        self._closing.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._closing.wait(POLL):
            try:
                found = dict(self._client.key_value_dir_get(FOLDER))
                self.notices = {key.rpartition('/')[2]: text for key, text in found.items()}
                if 'leave' in self.notices:
                    preemption.ask()
                elif preemption.asked():
                    self.notify('leave')
            except jax.errors.JaxRuntimeError:
                _end('Process 0 of the run has died.', STATUS)
            if mistake := self.notices.get('mistake'):
                _linger(self._mine)
                index, _, sentence = mistake.partition(' ')
                _end(f'Process {index} has ended with a mistake: {sentence}', 1)


def _linger(mine: Processes) -> None:
    """After a mistake: without the list of notices, which ends with the leader, others would be aborted before they tell."""
    if mine.leader:
        time.sleep(4 * POLL)


def _join(mine: Processes) -> None:
    """`jax.distributed`, before anything touches a device. Where not all come within `JOIN` seconds, the process ends.

    Raises:
      DvinvError: nobody tells where the leader is.
    """
    address = os.environ.get(ADDRESS)
    if address and not re.fullmatch(r'.+:\d+', address):
        raise DvinvError(f'{ADDRESS} is {address!r}; it must be the host and a free port of process 0, as 10.0.0.2:8476.')
    # Until something is under way SIGTERM may end the process at once, as it waits in a call that no note would end. JAX's
    # own service for it would take the signal away from preemption.py.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print(f'process {mine.index}: waiting for all {mine.count} processes', file=sys.stderr, flush=True)
    jax.config.update('jax_enable_preemption_service', False)
    # JAX would abort the process, so it is given longer than ours.
    sentence = f'Not all {mine.count} processes of the run came within {JOIN} seconds; start them all.'
    patience = threading.Timer(JOIN, _end, (sentence, STATUS))
    patience.daemon = True
    patience.start()
    try:
        # No ids: all devices, also under SLURM, where JAX would take one a process.
        jax.distributed.initialize(
            address or None,
            mine.count,
            mine.index,
            local_device_ids=[],
            initialization_timeout=2 * JOIN,
            heartbeat_timeout_seconds=TIMEOUT,
            shutdown_timeout_seconds=TIMEOUT,
        )
        local_devices()
        found = jax.process_index(), jax.process_count()
    except ValueError as error:
        raise DvinvError(
            f"bn_stats is 'global', which splits one batch over the devices of {mine.count} processes, but nothing tells "
            f'where process 0 is: set {ADDRESS} to its host and a free port, as launch/local.sh does; or choose '
            "bn_stats='device'."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        _end(f'The {mine.count} processes of the run did not come together: {str(error).splitlines()[0]}', STATUS)
    finally:
        patience.cancel()
        signal.signal(signal.SIGTERM, handler)
    if found != (mine.index, mine.count):
        _end(
            f'This is process {mine.index} of {mine.count}, but to JAX {found[0]} of {found[1]}; on Cloud TPU, start them '
            'by JOINED=1 launch/tpu_pod.sh.',
            1,
        )


def _end(sentence: str, status: int) -> None:
    """End the process now: others, or threads that wait for them, cannot be waited for."""
    print(f'dvinv: {sentence}', file=sys.stderr)
    if status == STATUS:
        print('dvinv: the same command for all processes goes on from what is saved.', file=sys.stderr)
    _leave_at_once(status)


def _leave_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
