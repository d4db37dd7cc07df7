"""Devices as a 1-D mesh with the axis `data`, over which batches are mapped."""

import os

import jax
from jax.sharding import AxisType, Mesh

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


def training_mesh(mesh: Mesh) -> Mesh:
    """The mesh to train on: `mesh`, but one device where they are virtual ones that share the same CPU cores.

    They would gain nothing, and a network trained on CPU would come to depend on their number.
    """
    return make_mesh(1) if platform_of(mesh) == 'cpu' else mesh


def make_mesh(count: int = 0) -> Mesh:
    """A mesh of the first `count` devices (0: all of them).

    Raises:
      DvinvError: fewer devices than asked for, or a negative number.
    """
    if count < 0:
        raise DvinvError(f'devices is {count}; it must be at least 1, or 0 for all there are.')
    devices = jax.local_devices()  # other processes of a run have theirs
    if count > len(devices):
        raise DvinvError(
            f'devices is {count}, but JAX sees only {len(devices)} ({devices[0].platform}); '
            'lower it, or 0 for all there are.'
        )
    count = count or len(devices)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])
