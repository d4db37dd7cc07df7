"""Devices as a 1-D mesh with the axis `data`, over which batches are split; and the cache of what is compiled for them."""

import contextlib
import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from dvinv.errors import DvinvError, say_once

AXIS = 'data'


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
