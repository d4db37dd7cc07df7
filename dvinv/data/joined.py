"""A concatenation of two sets of images, without a copy: either may be on disk."""

import numpy as np


class Joined:
    """An object that behaves like the array [N + M, ...] of `first` [N, ...] and `second` [M, ...] when indexed by rows.

    Attributes:
      shape, dtype: those of the concatenation.
    """

    def __init__(self, first, second):
        """Takes two arrays, `Rows` or `Joined`, which may differ in shape only in their lengths."""
        self._first, self._second = first, second
        self.shape, self.dtype = (len(first) + len(second), *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns a copy of the rows with these numbers."""
        behind = rows >= len(self._first)
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        found[~behind] = self._first[rows[~behind]]
        found[behind] = self._second[rows[behind] - len(self._first)]
        return found
