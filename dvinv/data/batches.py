"""The sources of training batches: images that reside on the devices, or batches that the host reads ahead."""

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32

from dvinv.data.rows import RowArray
from dvinv.networks.arrays import AnyArray, Labels, Pixels
from dvinv.runtime.devices import AXIS, place, platform_of

RESIDENT_SHARE = 0.25  # fraction of a device's free memory that images may take, so that most remains for the training


def fits_on_devices(mesh: Mesh, size: int) -> bool:
    """Returns whether `size` bytes of images should be kept on every device of `mesh`.

    The answer is False on CPU, where host and device share their memory, and on a backend that does not report its memory.
    """
    if platform_of(mesh) == 'cpu':
        return False
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if size > RESIDENT_SHARE * (stats.get('bytes_limit', 0) - stats.get('bytes_in_use', 0)):
            return False
    return True


class ResidentBatches:
    """Batches of images that reside on every device of a mesh; a batch is gathered there by row numbers.

    Attributes:
      arrays: (images uint8 [N, H, W, C], labels int32 [N]) on the devices; rows of images not loaded yet are zeros.
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
    def pick(arrays, chosen: Int32[AnyArray, ' B']) -> tuple[Pixels, Labels]:
        """Returns (images, labels) of the row numbers `chosen`, int32 [B]; for use inside a compiled program."""
        images, labels = arrays
        return images[chosen], labels[chosen]

    def load(self, images: RowArray, labels: RowArray) -> None:
        """Copies the images that were added since the last call to the devices; ignores those beyond the reserved number.

        Args:
          images, labels: all images so far and their labels, in order.
        """
        rows = np.arange(self._loaded, min(len(images), len(self.arrays[1])))
        if len(rows):
            self.arrays = self._write(self.arrays, (images[rows], np.asarray(labels[rows], np.int32)), self._loaded)
            self._loaded += len(rows)

    def each(self, dispatches: Iterable[np.ndarray]) -> Generator[jax.Array, None, None]:
        """Yields the row numbers of every dispatch, int32 [n, B] or [B], on the devices."""
        for rows in dispatches:
            yield place(rows, NamedSharding(self._mesh, _split_batch(rows.ndim - 1)))


class HostBatches:
    """Batches that the host reads from memory or disk, while the devices train on the previous ones.

    Attributes:
      arrays: an empty tuple, unlike in `ResidentBatches`: a batch holds everything that a program needs.
    """

    arrays = ()

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    @staticmethod
    def pick(arrays, chosen):
        """Returns `chosen`, which already is (images, labels)."""
        return chosen

    def load(self, images: RowArray, labels: RowArray) -> None:
        """Sets the arrays from which all following batches are read."""
        self._images, self._labels = images, labels

    def each(self, dispatches: Iterable[np.ndarray]) -> Generator[tuple, None, None]:
        """Yields (images [n, B, H, W, C] or [B, H, W, C], labels) of every dispatch, and reads the next one ahead."""
        with ThreadPoolExecutor(1, 'dvinv-batches') as reader:
            previous: Future | None = None
            for rows in dispatches:
                current = reader.submit(self._read, rows)
                if previous is not None:
                    yield previous.result()
                previous = current
            if previous is not None:
                yield previous.result()

    def _read(self, rows: np.ndarray) -> tuple:
        """Reads the part of the batches that belongs to devices of this process; returns arrays over all devices."""
        sharding = NamedSharding(self._mesh, _split_batch(rows.ndim - 1))
        local_rows = rows[..., _local_part(sharding, rows.shape)]
        flat_rows = local_rows.ravel()
        images, labels = self._images[flat_rows], self._labels[flat_rows]
        batch = images.reshape(*local_rows.shape, *images.shape[1:]), labels.reshape(local_rows.shape)
        if sharding.is_fully_addressable:
            return batch if platform_of(self._mesh) == 'cpu' else jax.device_put(batch, sharding)
        return tuple(jax.make_array_from_process_local_data(sharding, a, rows.shape + a.shape[rows.ndim :]) for a in batch)


def _split_batch(axis: int) -> P:
    """Returns the spec that splits axis number `axis`, the images of a batch, over the mesh."""
    return P(*[None] * axis, AXIS)


def _local_part(sharding: NamedSharding, shape: tuple[int, ...]) -> slice:
    """Returns the slice of the last axis of `shape`, the images of a batch, that is on devices of this process."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[-1].indices(shape[-1]) for index in indices if index is not None]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def _write(arrays, new, start):
    """Returns `arrays` with the rows from `start` on replaced by `new`."""
    return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(arrays, new, strict=True))
