"""Several processes that run one program: all make the same calls, on meshes of the devices of all processes (SPMD).

`jax.distributed` joins them. Under SLURM, Open MPI and on Cloud TPU it detects the number of this process; elsewhere flags
give it. All processes must share a file system. Process 0 writes the files of the run and makes the decisions that depend on
files, clocks or rounding; `decide` broadcasts them. If a process dies, the others exit; the same command resumes.
"""

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dvinv.errors import DvinvError, listed, say

JOIN = 300  # seconds to wait for all processes to start
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead
WAIT = 3600  # seconds to wait for process 0 or for the slowest process
LOST = 75  # exit status after the loss of another process: the same command, for all processes, resumes
# Matches the errors of JAX, Gloo and NCCL for a collective that another process has left.
GONE = re.compile(r'gloo|nccl|coordination|unavailable|deadline|heartbeat|connection (closed|reset)', re.IGNORECASE)


@contextlib.contextmanager
def joined(distributed: bool | None = None, coordinator: str = '', count: int = 0, index: int = -1):
    """Returns a context in which the processes of the run are joined, if there are several.

    Args:
      distributed: None to detect the processes from the environment; False to run as a single process; True if there must be
        several processes.
      coordinator: 'host:port' of process 0, if the environment does not define the processes.
      count: the number of processes, with `coordinator`.
      index: the number of this process, with `coordinator`.

    Raises:
      DvinvError: the flags contradict each other, or the number of this process is unknown.
    """
    if not _several(distributed, coordinator, count, index):
        yield
        return
    _join(coordinator, count, index)
    try:
        yield
        meet('the end of the run')
    except SystemExit:  # preemption, which happens at the same point in all processes
        jax.distributed.shutdown()
        raise
    except DvinvError as error:
        _end(f'process {jax.process_index()}: {error}', 1)
    except Exception as error:
        if isinstance(error, ValueError | RuntimeError) and GONE.search(str(error)):
            _end(f'Another process of the run has ended, and says why ({str(error).splitlines()[0][:200]}).', LOST)
        traceback.print_exc()
        _end(f'process {jax.process_index()} has failed.', 1)
    else:
        jax.distributed.shutdown()


def is_primary() -> bool:
    """Returns whether this is process 0, which writes the files of the run."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes have reached this barrier."""
    if jax.process_count() > 1:
        with _time_limit(name):
            multihost_utils.sync_global_devices(name)


def decide(compute: Callable[[], Any], what: str) -> Any:
    """Returns on every process the value that process 0 computes.

    Args:
      compute: returns a value that JSON can represent; only process 0 calls it.
      what: the name of the decision, for the message if the wait for it is too long.

    Raises:
      DvinvError: on every process, if `compute` raises it.
    """
    if jax.process_count() == 1:
        return compute()
    answer = {}
    if is_primary():
        try:
            answer = {'value': compute()}
        except DvinvError as error:
            answer = {'error': str(error)}
    with _time_limit(what):
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        text = multihost_utils.broadcast_one_to_all(text if is_primary() else np.zeros(size, np.uint8))
    answer = json.loads(np.asarray(text).tobytes())
    if 'error' in answer:
        raise DvinvError(answer['error'])
    return answer['value']


def of_primary(tree):
    """Returns the pytree of arrays of process 0 on every process; shapes and dtypes must be the same on all."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def refuse_differing(about: Mapping[str, Any], what: str) -> None:
    """Validates that `about` is the same on all processes.

    Args:
      about: a dict that JSON can represent.
      what: a noun for its contents, for the message.

    Raises:
      DvinvError: on every process, if `about` differs on any; the message names the keys that differ on this process.
    """
    if jax.process_count() == 1:
        return
    about, absent = json.loads(json.dumps(about)), object()
    first = decide(lambda: about, what)
    differing = [
        f'{key} ({first.get(key)!r} in process 0, {about.get(key)!r} here)'
        for key in sorted({*first, *about})
        if first.get(key, absent) != about.get(key, absent)
    ]
    if multihost_utils.process_allgather(np.array(bool(differing))).any():
        here = listed(differing, 8) if differing else 'another process says how'
        raise DvinvError(f'The {what} of the processes differ: {here}. Give all processes the same, and start them again.')


def _several(distributed: bool | None, coordinator: str, count: int, index: int) -> bool:
    """Returns whether there are other processes to join."""
    if distributed is False:
        return False
    if not (coordinator or count or index >= 0):
        return bool(distributed) or _found(os.environ)
    if not (coordinator and count >= 1 and index >= 0):
        raise DvinvError(
            f'--coordinator is {coordinator!r}, --num_processes {count} and --process_id {index}; give all three (the host '
            'and a free port of process 0, how many processes there are, and which one this is, from 0), or none of them '
            'under SLURM, Open MPI and on Cloud TPU.'
        )
    if not re.fullmatch(r'.+:\d+', coordinator):
        raise DvinvError(f'--coordinator is {coordinator!r}; it must be host:port, with a free port.')
    if index >= count:
        raise DvinvError(f'--process_id is {index}, but --num_processes is {count}; the first counts from 0.')
    return count > 1


def _found(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher has started several processes: srun, mpirun, or a TPU slice of several hosts."""
    # In a batch script outside srun there is a single process, regardless of the allocation.
    counts = 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'
    several = any(environment.get(name, '').isdecimal() and int(environment[name]) > 1 for name in counts)
    return several or len([host for host in environment.get('TPU_WORKER_HOSTNAMES', '').split(',') if host.strip()]) > 1


def _one_a_host(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher has started one process per host, which then uses all devices of the host."""
    tasks = environment.get('SLURM_STEP_TASKS_PER_NODE') or environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') or '1'
    return re.fullmatch(r'1(\(x\d+\))?', tasks) is not None


def _join(coordinator: str, count: int, index: int) -> None:
    """Joins the processes through `jax.distributed`, before any device is used."""
    who = f'process {index} of {count}: ' if coordinator else ''
    say(f'{who}waiting for the other processes')
    # By default JAX uses one device per process under SLURM and Open MPI; [] stands for all devices.
    devices: list[int] | None = [] if _one_a_host(os.environ) else None
    # JAX would abort without a clear message, so its own timeout is longer.
    with _time_limit('all processes to start', JOIN):
        try:
            jax.distributed.initialize(
                coordinator or None,
                count if coordinator else None,
                index if coordinator else None,
                local_device_ids=devices,
                initialization_timeout=2 * JOIN,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=HEARTBEAT,
            )
            jax.devices()
        except ValueError as error:
            raise DvinvError(
                'There should be several processes, but nothing tells JAX where they are: start them by srun or mpirun, on '
                'Cloud TPU by launch/tpu_pod.sh, or give --coordinator, --num_processes and --process_id.'
            ) from error
        except RuntimeError as error:
            _end(f'The processes did not come together: {str(error).splitlines()[0]}', LOST)


@contextlib.contextmanager
def _time_limit(what: str, seconds: float | None = None):
    """Returns a context that ends the process if it lasts longer, because a collective cannot be interrupted otherwise."""
    seconds = WAIT if seconds is None else seconds
    timer = threading.Timer(seconds, _end, (f'Waited {seconds:.0f} s for {what}.', LOST))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(sentence: str, status: int) -> None:
    """Ends the process immediately, because a regular shutdown would wait for the other processes."""
    say(sentence)
    if status == LOST:
        say('The same command, for all processes, resumes from what was saved.')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
