"""Devices as a 1-D mesh with the axis `data`, over which batches are mapped."""

import jax
from jax.sharding import AxisType, Mesh

from dvinv.errors import DvinvError

AXIS = 'data'


def set_cpu_devices(count: int) -> None:
    """Let the CPU backend offer `count` virtual devices. Call before anything touches a device."""
    if count > 1:
        jax.config.update('jax_num_cpu_devices', count)


def training_mesh(mesh: Mesh) -> Mesh:
    """The mesh to train on: `mesh`, but one device where they are virtual ones that share the same CPU cores.

    They would gain nothing, and a network trained on CPU would come to depend on their number.
    """
    return make_mesh(1) if mesh.devices.flat[0].platform == 'cpu' else mesh


def make_mesh(count: int = 0) -> Mesh:
    """A mesh of the first `count` devices (0: all of them).

    Raises:
      DvinvError: fewer devices than asked for, or a negative number.
    """
    if count < 0:
        raise DvinvError(f'devices is {count}; it must be at least 1, or 0 for all there are.')
    devices = jax.devices()
    if count > len(devices):
        raise DvinvError(
            f'devices is {count}, but JAX sees only {len(devices)} ({devices[0].platform}); '
            'lower it, or 0 for all there are.'
        )
    count = count or len(devices)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])
