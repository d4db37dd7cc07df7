"""Data sets: images with labels in splits, arrays that are read by rows on access, and batches for training.

`Rows` is one array stored in parts in many `.npz` files; `Chosen` and `Joined` are views of other arrays, without a copy. An
uncompressed `.npz` stores its arrays as plain bytes, one row after the other, so that a row is a range of the file.
"""

import bisect
import dataclasses
import itertools
import os
import struct
import zipfile
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, Integer, UInt8

from dvinv.runtime.devices import AXIS, place, platform_of
from dvinv.runtime.errors import DvinvError

# The local header of a zip archive: 26 bytes not needed here, the length of the name, and the length of the extra field.
LOCAL_HEADER = struct.Struct('<26xHH')
RESIDENT_SHARE = 0.25  # fraction of a device's free memory that images may take, so that most remains for the training


@runtime_checkable  # for the tests, which check the types of arguments
class RowArray(Protocol):
    """An array, or an object that behaves like one when it is indexed by rows: `Rows`, `Chosen` or `Joined`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""

    @property
    def dtype(self) -> np.dtype:
        """The type of its numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Rows:
    """An object that behaves like an array [N, ...] when it is indexed by rows; every access reads from disk.

    Attributes:
      shape, dtype: those of the whole array.
    """

    def __init__(self, files: Sequence[Path], name: str):
        """Opens the array `name` of all `files`, in order; the arrays of the files may differ only in length.

        Raises:
          ValueError: there are no files, or the arrays differ in shape or dtype.
        """
        self._parts = [_Part(file, name) for file in files]
        if not self._parts or len({(part.shape[1:], part.dtype) for part in self._parts}) > 1:
            raise ValueError(f'{len(files)} files do not hold one array {name} in parts')
        self._starts = [0, *itertools.accumulate(part.shape[0] for part in self._parts)]
        self.shape, self.dtype = (self._starts[-1], *self._parts[0].shape[1:]), self._parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Returns a copy of rows, by number, slice, or array of numbers or booleans, with the shape that NumPy returns."""
        selected = np.arange(len(self))[index]  # raises the errors that NumPy raises
        numbers = selected.ravel()
        rows = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        order = np.argsort(numbers, kind='stable')
        start = 0
        while start < len(order):  # reads all selected rows of one part together
            part = bisect.bisect_right(self._starts, numbers[order[start]]) - 1
            end = int(np.searchsorted(numbers, self._starts[part + 1], sorter=order))
            positions = order[start:end]
            rows[positions] = self._parts[part].read(numbers[positions] - self._starts[part])
            start = end
        return rows.reshape(*np.shape(selected), *self.shape[1:])


class Chosen:
    """An object that behaves like `array[numbers]` when it is indexed by rows.

    Attributes:
      shape, dtype: those of the chosen rows.
    """

    def __init__(self, array: RowArray, numbers: np.ndarray):
        """Takes an array and the numbers of the chosen rows, int [n]."""
        self._array, self._numbers = array, numbers
        self.shape, self.dtype = (len(numbers), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Returns a copy of rows, by number, slice, or array of numbers or booleans."""
        return self._array[self._numbers[index]]


class Joined:
    """An object that behaves like the array [N + M, ...] of `first` [N, ...] and `second` [M, ...] when indexed by rows.

    Attributes:
      shape, dtype: those of the concatenation.
    """

    def __init__(self, first: RowArray, second: RowArray):
        """Takes two arrays, which may differ in shape only in their lengths."""
        self._first, self._second = first, second
        self.shape, self.dtype = (len(first) + len(second), *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns a copy of the rows with these numbers."""
        in_second = rows >= len(self._first)
        joined = np.empty((len(rows), *self.shape[1:]), self.dtype)
        joined[~in_second] = self._first[rows[~in_second]]
        joined[in_second] = self._second[rows[in_second] - len(self._first)]
        return joined


class _Part:
    """The part of `Rows` that one file holds."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as member:
            entry = archive.getinfo(f'{name}.npy')
            version = np.lib.format.read_magic(member)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran_order, self.dtype = read_header(member)
            header_size = member.tell()
        self._plain = entry.compress_type == zipfile.ZIP_STORED and not fortran_order
        if self._plain:
            with open(path, 'rb') as file:
                file.seek(entry.header_offset)
                local_header = file.read(LOCAL_HEADER.size)
                self._offset = entry.header_offset + len(local_header) + sum(LOCAL_HEADER.unpack(local_header)) + header_size

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows with these numbers, [n, ...]; the numbers must be ascending."""
        if not self._plain:  # a file that was compressed later
            with np.load(self._path, allow_pickle=False) as arrays:
                return arrays[self._name][numbers]
        rows = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        size = rows[:1].nbytes
        with open(self._path, 'rb', buffering=0) as file:
            # Adjacent rows are read at once. The pages of an np.memmap would count as memory of this process.
            for first, last in _runs(numbers):
                block = os.pread(file.fileno(), size * (last - first), self._offset + size * int(numbers[first]))
                rows[first:last] = np.frombuffer(block, self.dtype).reshape(-1, *self.shape[1:])
        return rows


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Returns the positions (first, last + 1) of every run of consecutive numbers, for ascending numbers."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [*itertools.pairwise([0, *cuts.tolist(), len(numbers)])]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: UInt8[np.ndarray, 'N H W C']
    labels: Integer[np.ndarray, ' N']

    def of_classes(self, classes: tuple[int, ...]) -> 'Split':
        """Returns only the images of these classes, in their old order; labels become positions in `classes`."""
        matches = self.labels[:, None] == np.asarray(classes)
        kept = matches.any(1)
        return Split(self.images[kept], matches[kept].argmax(1).astype(np.int32))

    def divided(self, held_out: int | float) -> tuple['Split', 'Split']:
        """Returns two parts with the same share of every class.

        The seed is 0 regardless of the seed of the run, so that the test images are always the same.

        Args:
          held_out: the number of images in the second part (int), or its fraction of all images (float).

        Raises:
          DvinvError: there are too few images to have every class in both parts.
        """
        from sklearn.model_selection import train_test_split  # imported late, because it takes a second

        try:
            parts = train_test_split(np.arange(len(self.labels)), test_size=held_out, stratify=self.labels, random_state=0)
        except ValueError as error:
            raise DvinvError(
                f'{len(self.labels)} training images of {len(np.unique(self.labels))} classes are too few to hold out '
                'a fifth with every class in both parts; use more, or set data.validation=False.'
            ) from error
        first, second = (Split(self.images[part], self.labels[part]) for part in parts)
        return first, second


@dataclasses.dataclass(frozen=True)
class RealData:
    """A data set with a split to train on and a split that is only scored.

    Attributes:
      train: the split to train on; None if there is none.
      test: the split to score on.
      num_classes: the number of classes.
      by_position: whether the labels are positions among names that do not identify the classes of a network; a network that
        fits the data set then has exactly `num_classes` classes.
      class_names: the names of all classes in the order of their labels, for display; () if unknown.
    """

    train: Split | None
    test: Split
    num_classes: int
    by_position: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of an image."""
        return self.test.images.shape[1:]


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
    def pick(
        arrays, chosen: Int32[jax.Array | np.ndarray, ' B']
    ) -> tuple[UInt8[jax.Array, 'B H W C'], Integer[jax.Array, ' B']]:
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
