"""A concatenation of two sets of images, without a copy: either may be on disk."""

import numpy as np

from dvinv.data.rows import RowArray


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
