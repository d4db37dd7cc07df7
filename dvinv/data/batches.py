"""Where the batches of a training come from: images that lie on the devices, or batches that are read ahead on the host."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.runtime.devices import AXIS, place, platform_of

RESIDENT_SHARE = 0.25  # of the free memory of a device: what images may take of it, so that most is left for the training


def fits_on_devices(mesh: Mesh, size: int) -> bool:
    """Returns whether `size` bytes of images should lie on every device of `mesh`.

    Never on CPU, where host and device share their memory, nor on a backend that does not report its memory.
    """
    if platform_of(mesh) == 'cpu':
        return False
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if size > RESIDENT_SHARE * (stats.get('bytes_limit', 0) - stats.get('bytes_in_use', 0)):
            return False
    return True


class ResidentBatches:
    """Batches of images that lie on every device of a mesh; a batch is gathered there, by the numbers of its images.

    Attributes:
      arrays: (images uint8 [N, H, W, C], labels int32 [N]) on the devices; zeros where an image has not come yet.
    """

    def __init__(self, mesh: Mesh, count: int, image_shape):
        """Reserves memory for `count` images of `image_shape`, [H, W, C]."""
        self._everywhere = NamedSharding(mesh, P())
        self._mesh, self._loaded = mesh, 0

        def zeros():
            return jnp.zeros((count, *image_shape), jnp.uint8), jnp.zeros(count, jnp.int32)

        self.arrays = jax.jit(zeros, out_shardings=self._everywhere)()
        self._write = jax.jit(_write, donate_argnums=0, out_shardings=self._everywhere)

    @staticmethod
    def pick(arrays, chosen):
        """Returns (images, labels) of the rows `chosen`, int32 [B]; for use inside a compiled program."""
        images, labels = arrays
        return images[chosen], labels[chosen]

    def load(self, images, labels) -> None:
        """Copies the images that were not there at the last call; those beyond the reserved number are left out.

        Args:
          images, labels: all so far, in order; arrays, or what is indexed by row numbers like arrays.
        """
        rows = np.arange(self._loaded, min(len(images), len(self.arrays[1])))
        if len(rows):
            self.arrays = self._write(self.arrays, (images[rows], np.asarray(labels[rows], np.int32)), self._loaded)
            self._loaded += len(rows)

    def each(self, dispatches: Iterable[np.ndarray]) -> Iterator[jax.Array]:
        """Yields the row numbers, int32 [n, B] or [B], of every dispatch, on the devices."""
        for rows in dispatches:
            yield place(rows, NamedSharding(self._mesh, _split_batch(rows.ndim - 1)))


class HostBatches:
    """Batches that the host reads, from memory or disk, while the devices train on those before.

    Attributes:
      arrays: nothing, unlike `ResidentBatches`: all that a program needs is in a batch.
    """

    arrays = ()

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    @staticmethod
    def pick(arrays, chosen):
        """Returns `chosen`, which is (images, labels) already."""
        return chosen

    def load(self, images, labels) -> None:
        """Takes the arrays, or what is indexed by rows like arrays, that all batches from now on are read from."""
        self._images, self._labels = images, labels

    def each(self, dispatches: Iterable[np.ndarray]) -> Iterator[tuple]:
        """Yields (images [n, B, H, W, C] or [B, H, W, C], labels) of every dispatch, and reads the next one meanwhile."""
        with ThreadPoolExecutor(1, 'dvinv-batches') as reader:
            ahead = None
            for rows in dispatches:
                reading = reader.submit(self._read, rows)
                if ahead is not None:
                    yield ahead.result()
                ahead = reading
            if ahead is not None:
                yield ahead.result()

    def _read(self, rows: np.ndarray) -> tuple:
        """The part of the batches that lies on devices of this process, as an array over all of them."""
        sharding = NamedSharding(self._mesh, _split_batch(rows.ndim - 1))
        own = rows[..., _own_part(sharding, rows.shape)]
        flat = own.ravel()
        images, labels = self._images[flat], self._labels[flat]
        batch = images.reshape(*own.shape, *images.shape[1:]), labels.reshape(own.shape)
        if sharding.is_fully_addressable:
            return batch if platform_of(self._mesh) == 'cpu' else jax.device_put(batch, sharding)
        return tuple(jax.make_array_from_process_local_data(sharding, a, rows.shape + a.shape[rows.ndim :]) for a in batch)


def _split_batch(axis: int) -> P:
    """Returns the spec that splits the axis of the images of a batch over the mesh."""
    return P(*[None] * axis, AXIS)


def _own_part(sharding: NamedSharding, shape: tuple[int, ...]) -> slice:
    """Returns which images of a batch, the last axis of `shape`, lie on devices of this process: neighbours."""
    parts = [index[-1].indices(shape[-1]) for index in sharding.addressable_devices_indices_map(shape).values()]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def _write(arrays, new, start):
    """Returns `arrays` with the rows from `start` on replaced by `new`."""
    return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(arrays, new, strict=True))
