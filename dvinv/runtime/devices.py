"""Devices as a 1-D mesh with the axis `data`, over which batches are mapped."""

import contextlib
import functools
import os
from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from dvinv.errors import DvinvError

AXIS = 'data'


def set_cpu_devices(count: int) -> None:
    """Let the CPU backend offer `count` virtual devices (0: one a core). Call before anything touches a device.

    One device leaves half of the cores idle: XLA's convolutions share the work of a small batch badly, whole batches side by
    side do not share any. Whoever has set JAX_NUM_CPU_DEVICES has decided already, where `count` is 0.
    """
    decided = jax.config.jax_num_cpu_devices >= 0 or 'xla_force_host_platform_device_count' in os.environ.get(
        'XLA_FLAGS', ''
    )
    if count or not decided:
        jax.config.update('jax_num_cpu_devices', max(1, count or cores()))


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def platform_of(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu'."""
    return mesh.devices.flat[0].platform


def local_devices() -> list[jax.Device]:
    """Returns the devices of this process, without those of the other processes of a run.

    Raises:
      DvinvError: JAX cannot use the devices that JAX_PLATFORMS names, or those that it finds.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter where nothing is installed for the platform
        platforms = jax.config.jax_platforms
        asked = f'JAX_PLATFORMS is {platforms!r}, but ' if platforms else ''
        reason = (str(error) or 'nothing is installed for it').splitlines()[0]
        raise DvinvError(
            f"{asked}JAX cannot use such a device here ({reason}); install JAX for it, as by pip install -e '.[cuda12]' "
            '(cuda13, tpu), or set JAX_PLATFORMS=cpu.'
        ) from error


def training_mesh(mesh: Mesh) -> Mesh:
    """The mesh to train on: `mesh`, but one device where they are virtual ones that share the same CPU cores.

    They would gain nothing, and a network trained on CPU would come to depend on their number. Of several processes, these
    devices of all.
    """
    return make_mesh(1 if platform_of(mesh) == 'cpu' else mesh.size, of_all=True)


def make_mesh(count: int = 0, of_all: bool = False) -> Mesh:
    """A mesh of the first `count` devices of this process (0: all of them).

    Args:
      of_all: so many devices of each process of the run, in the order of processes.

    Raises:
      DvinvError: fewer devices than asked for, a negative number, or processes with unlike numbers of devices.
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
    """Returns a context in which `mesh` is the current one, if the caller has set another by `jax.set_mesh`."""
    return contextlib.nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(mesh)


def place(tree, sharding: Sharding):
    """`jax.device_put`, also onto devices of other processes, which must be called with the same values."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetch(tree, mesh: Mesh):
    """`jax.device_get`, also of arrays that lie in part with other processes, which must be called too."""
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return jax.device_get(tree)
    return jax.device_get(_gather(mesh)(tree))


@functools.cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
