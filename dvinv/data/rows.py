"""Arrays that are read by rows on access, so that memory only holds the rows that are read.

`Rows` is one array stored in parts in many `.npz` files; `Chosen` and `Joined` are views of other arrays, without a copy. An
uncompressed `.npz` stores its arrays as plain bytes, one row after the other, so that a row is a range of the file.
"""

import bisect
import itertools
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

# The local header of a zip archive: 26 bytes not needed here, the length of the name, and the length of the extra field.
LOCAL_HEADER = struct.Struct('<26xHH')


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
