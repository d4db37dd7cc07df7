"""One array stored in pieces in many `.npz` files, read by rows on access: memory only holds the rows that are read.

An uncompressed `.npz` stores its arrays as plain bytes, one row after the other, so that a row is a range of the file.
"""

import bisect
import itertools
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# The local header of a zip archive: 26 bytes not needed here, the length of the name, and the length of the extra field.
LOCAL_HEADER = struct.Struct('<26xHH')


class Rows:
    """An object that behaves like an array [N, ...] when it is indexed by rows; every access reads from disk.

    Attributes:
      shape, dtype, ndim: those of the whole array.
    """

    def __init__(self, files: Sequence[Path], name: str):
        """Opens the array `name` of all `files`, in order; the arrays of the files may differ only in length.

        Raises:
          ValueError: there are no files, or the arrays differ in shape or dtype.
        """
        self._pieces = [_Piece(file, name) for file in files]
        if not self._pieces or len({(piece.shape[1:], piece.dtype) for piece in self._pieces}) > 1:
            raise ValueError(f'{len(files)} files do not hold one array {name} in pieces')
        self._starts = [0, *itertools.accumulate(piece.shape[0] for piece in self._pieces)]
        self.shape, self.dtype = (self._starts[-1], *self._pieces[0].shape[1:]), self._pieces[0].dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Returns a copy of rows, by number, slice, or array of numbers or booleans, with the shape that NumPy returns."""
        wanted = np.arange(len(self))[index]  # raises the errors that NumPy raises
        numbers = wanted.ravel()
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        order = np.argsort(numbers, kind='stable')
        position = 0
        while position < len(order):  # reads all wanted rows of one piece together
            piece = bisect.bisect_right(self._starts, numbers[order[position]]) - 1
            end = np.searchsorted(numbers, self._starts[piece + 1], sorter=order)
            places = order[position:end]
            found[places] = self._pieces[piece].read(numbers[places] - self._starts[piece])
            position = end
        return found.reshape(*np.shape(wanted), *self.shape[1:])


class _Piece:
    """The part of the array that one file holds."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as member:
            about = archive.getinfo(f'{name}.npy')
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, self.dtype = read(member)
            header = member.tell()
        self._plain = about.compress_type == zipfile.ZIP_STORED and not fortran
        if self._plain:
            with open(path, 'rb') as file:
                file.seek(about.header_offset)
                self._offset = about.header_offset + 30 + sum(LOCAL_HEADER.unpack(file.read(30))) + header

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
