"""Devices and processes: the mesh over which batches are split, and several processes that run one program (SPMD).

`jax.distributed` joins them. Under SLURM, Open MPI and on Cloud TPU it detects the number of this process; elsewhere flags
give it. All processes must share a file system. Process 0 writes the files of the run and makes the decisions that depend on
files, clocks or rounding; `decide` broadcasts them. If a process dies, the others exit; the same command resumes.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from dvinv.runtime.errors import DvinvError, listed, say, say_once

AXIS = 'data'
JOIN = 300  # seconds to wait for all processes to start
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead
WAIT = 3600  # seconds to wait for process 0 or for the slowest process
LOST = 75  # exit status after the loss of another process: the same command, for all processes, resumes
# Matches the errors of JAX, Gloo and NCCL for a collective that another process has left.
GONE = re.compile(r'gloo|nccl|coordination|unavailable|deadline|heartbeat|connection (closed|reset)', re.IGNORECASE)


def jax_option(name: str) -> Any:
    """Returns the value of an option of JAX, such as 'jax_platforms', which type checkers do not know as an attribute."""
    return getattr(jax.config, name)


def set_cpu_devices(count: int) -> None:
    """Sets the number of virtual devices of the CPU backend; must be called before any device is used.

    One device leaves half of the cores idle: XLA's convolutions parallelise poorly over a small batch, whereas whole batches
    side by side are independent. If `count` is 0, JAX_NUM_CPU_DEVICES (or the flag in XLA_FLAGS) takes precedence if set.

    Args:
      count: the number of virtual devices; 0 for one per core.
    """
    decided = jax_option('jax_num_cpu_devices') >= 0 or 'xla_force_host_platform_device_count' in os.environ.get(
        'XLA_FLAGS', ''
    )
    if count or not decided:
        jax.config.update('jax_num_cpu_devices', max(1, count or cores()))


@contextlib.contextmanager
def usual_promotions():
    """Lets JAX promote ranks and dtypes as usual while the context is open; the caller's settings may forbid it."""
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        yield


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def platform_of(mesh: Mesh) -> str:
    """Returns the platform of the devices of a mesh: 'cpu', 'gpu' or 'tpu'."""
    return mesh.devices.flat[0].platform


def local_devices() -> list[jax.Device]:
    """Returns the devices of this process, without those of the other processes of a run.

    Raises:
      DvinvError: JAX cannot use the devices that JAX_PLATFORMS names, or those that it finds.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: nothing is installed for the platform
        platforms = jax_option('jax_platforms')
        asked = f'JAX_PLATFORMS is {platforms!r}, but ' if platforms else ''
        reason = (str(error) or 'nothing is installed for it').splitlines()[0]
        raise DvinvError(
            f"{asked}JAX cannot use such a device here ({reason}); install JAX for it, as by pip install -e '.[cuda12]' "
            '(cuda13, tpu), or set JAX_PLATFORMS=cpu.'
        ) from error


def training_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh to train on: that of `mesh`, or a single device on CPU, where virtual devices share the same cores.

    Several virtual devices would not be faster, and a network trained on CPU would depend on their number. If there are
    several processes, the mesh has the same number of devices of each process.
    """
    return make_mesh(1 if platform_of(mesh) == 'cpu' else mesh.size, of_all=True)


def make_mesh(count: int = 0, of_all: bool = False) -> Mesh:
    """Returns a mesh of the first `count` devices of this process.

    Args:
      count: the number of devices; 0 for all.
      of_all: whether the mesh has `count` devices of each process of the run, in the order of processes.

    Raises:
      DvinvError: there are fewer devices than `count`, `count` is negative, or a process has too few devices.
    """
    if count < 0:
        raise DvinvError(f'devices is {count}; it must be at least 1, or 0 for all there are.')
    devices = local_devices()
    if count > len(devices):
        raise DvinvError(
            f'devices is {count}, but JAX sees only {len(devices)} ({devices[0].platform}); '
            'lower it, or 0 for all there are.'
        )
    if of_all and jax.process_count() > 1:
        counts = Counter(device.process_index for device in jax.devices())
        if min(counts.values()) < (count or max(counts.values())):
            raise DvinvError(
                f'devices is {count}, but the processes have {sorted(counts.values())} devices; as one batch is split over '
                f'all of them, choose at most {min(counts.values())} a process.'
            )
        count = count or len(devices)
        of_each = ([device for device in jax.devices() if device.process_index == i] for i in sorted(counts))
        devices = [device for own in of_each for device in own[:count]]
    else:
        devices = devices[: count or len(devices)]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def on_mesh(mesh: Mesh):
    """Returns a context in which `mesh` is the current mesh, if the caller has set one by `jax.set_mesh`."""
    return contextlib.nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(mesh)


def place(tree, sharding: Sharding):
    """Places a pytree like `jax.device_put`, also on devices of other processes, which must pass the same values."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetch(tree, mesh: Mesh):
    """Fetches a pytree like `jax.device_get`, also arrays that are partly on other processes, which must call this too."""
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return jax.device_get(tree)
    return jax.device_get(_gather(mesh)(tree))


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def keep_compiled() -> None:
    """Sets JAX's compilation cache to a folder in XDG_CACHE_HOME or ~/.cache, unless one is set; called by main only.

    If there is no such folder (for instance for a user without a home in a container), programs are not cached, and a
    message says so once.
    """
    if jax_option('jax_compilation_cache_dir'):
        return
    try:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dvinv' / 'jax'
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f'{folder} cannot be written to')
    except (RuntimeError, OSError) as error:  # RuntimeError: the home folder of the user is unknown
        say_once(f'Compiled programs are not kept for later runs ({error}); set XDG_CACHE_HOME to a folder for them.')
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


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
