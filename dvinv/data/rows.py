"""One array that lies in pieces in many `.npz` files, read by rows as they are asked for: memory holds what was asked.

An `.npz` that was not compressed has its arrays as they are, one row after the other, so a row is a place in the file.
"""

import bisect
import itertools
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Of a zip archive's local header: 26 bytes that do not matter here, the lengths of the name and of what follows it.
LOCAL_HEADER = struct.Struct('<26xHH')


class Rows:
    """Looks like an array [N, ...] to whoever indexes it by rows; every access reads from disk.

    Attributes:
      shape, dtype, ndim: of the whole.
    """

    def __init__(self, files: Sequence[Path], name: str):
        """The array `name` of all `files`, in order; they may differ in length alone.

        Raises:
          ValueError: no files, or arrays that do not fit together.
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
        """Rows by number, slice, or array of numbers or booleans, as NumPy would give them: a copy."""
        wanted = np.arange(len(self))[index]  # refuses what NumPy refuses
        numbers = wanted.ravel()
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        order = np.argsort(numbers, kind='stable')
        position = 0
        while position < len(order):  # the wanted rows of one piece together
            piece = bisect.bisect_right(self._starts, numbers[order[position]]) - 1
            end = np.searchsorted(numbers, self._starts[piece + 1], sorter=order)
            places = order[position:end]
            found[places] = self._pieces[piece].read(numbers[places] - self._starts[piece])
            position = end
        return found.reshape(*np.shape(wanted), *self.shape[1:])


class _Piece:
    """The array of one file."""

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
        """Rows [n, ...] of these numbers, ascending."""
        if not self._plain:  # a file that somebody compressed
            with np.load(self._path, allow_pickle=False) as arrays:
                return arrays[self._name][numbers]
        rows = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        size = rows[:1].nbytes
        with open(self._path, 'rb', buffering=0) as file:
            # Neighbours in one go. Not by np.memmap, whose pages would count as this process's memory.
            for first, last in _runs(numbers):
                block = os.pread(file.fileno(), size * (last - first), self._offset + size * int(numbers[first]))
                rows[first:last] = np.frombuffer(block, self.dtype).reshape(-1, *self.shape[1:])
        return rows


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """[(first, last + 1)] positions of ascending numbers that follow one another without a gap."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [*itertools.pairwise([0, *cuts.tolist(), len(numbers)])]
