"""Several processes that run one program: each makes the same calls, on meshes of the devices of all (SPMD).

JAX's own engine joins them (`jax.distributed`): under SLURM, Open MPI and on Cloud TPU it finds out which process this is,
elsewhere flags say so. They see one file system. Process 0 writes the files of the run, and takes the decisions that depend
on files, clocks or rounding; `decide` hands these to all. A process that dies ends the others; the same command resumes.
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

JOIN = 300  # seconds to wait for all processes to come
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead
WAIT = 3600  # seconds to wait for process 0 or for the slowest process
LOST = 75  # exit status where another process has ended this one: the same command, for all, resumes
# What JAX, Gloo and NCCL say of a collective that another process has left.
GONE = re.compile(r'gloo|nccl|coordination|unavailable|deadline|heartbeat|connection (closed|reset)', re.IGNORECASE)


@contextlib.contextmanager
def joined(distributed: bool | None = None, coordinator: str = '', count: int = 0, index: int = -1):
    """A context in which the processes of the run are joined, if there are several.

    Args:
      distributed: None: as the environment says; False: this process alone; True: there must be several.
      coordinator: 'host:port' of process 0, where the environment does not tell; with `count`, how many processes there are,
        and `index`, which one this is.

    Raises:
      DvinvError: flags that do not fit each other, or nothing tells which process this is.
    """
    if not _several(distributed, coordinator, count, index):
        yield
        return
    _join(coordinator, count, index)
    try:
        yield
        meet('the end of the run')
    except SystemExit:  # preemption, at the same point in all processes
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
    """Whether this is process 0, which writes the files of the run."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        with _time_limit(name):
            multihost_utils.sync_global_devices(name)


def decide(compute: Callable[[], Any], what: str) -> Any:
    """Returns on every process what process 0 computes: a value as JSON knows it.

    Args:
      compute: called by process 0 alone.
      what: names the decision where the wait for it is too long.

    Raises:
      DvinvError: on every process, where `compute` raises it.
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
    """Returns a pytree of arrays as process 0 has it; shapes and dtypes must be the same on all."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def refuse_differing(about: Mapping[str, Any], what: str) -> None:
    """Refuses to go on where `about`, a dict as JSON knows it, is not the same on all processes.

    Raises:
      DvinvError: on every process; names the keys that differ here.
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
    # Within a batch script, but outside srun, there is one process, whatever was allocated.
    counts = 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'
    several = any(environment.get(name, '').isdecimal() and int(environment[name]) > 1 for name in counts)
    return several or len([host for host in environment.get('TPU_WORKER_HOSTNAMES', '').split(',') if host.strip()]) > 1


def _one_a_host(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher has started one process on each host, which then has all devices there."""
    tasks = environment.get('SLURM_STEP_TASKS_PER_NODE') or environment.get('OMPI_COMM_WORLD_LOCAL_SIZE') or '1'
    return re.fullmatch(r'1(\(x\d+\))?', tasks) is not None


def _join(coordinator: str, count: int, index: int) -> None:
    """Joins the processes through `jax.distributed`, before anything touches a device."""
    who = f'process {index} of {count}: ' if coordinator else ''
    say(f'{who}waiting for the other processes')
    # JAX takes one device a process under SLURM and Open MPI where it is told nothing; [] stands for all.
    devices = [] if _one_a_host(os.environ) else None
    given = (coordinator, count, index) if coordinator else ()
    # JAX would abort without a sentence, so it is given longer.
    with _time_limit('all processes to start', JOIN):
        try:
            jax.distributed.initialize(
                *given,
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
    """Ends the process where the context lasts longer: others cannot be waited for, nor can a collective be left."""
    seconds = WAIT if seconds is None else seconds
    timer = threading.Timer(seconds, _end, (f'Waited {seconds:.0f} s for {what}.', LOST))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(sentence: str, status: int) -> None:
    """Ends the process at once: to shut down as usual would wait for the others."""
    say(sentence)
    if status == LOST:
        say('The same command, for all processes, resumes from what was saved.')
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
