"""Two sets of images one after the other, neither of which is copied: one may lie on disk."""

import numpy as np


class Joined:
    """Looks like an array [N + M, ...] to whoever asks for rows by number: `first` [N, ...], then `second` [M, ...].

    Attributes:
      shape, dtype: of the whole.
    """

    def __init__(self, first, second):
        """Arrays, `Rows` or joined ones, of one shape but for their lengths."""
        self._first, self._second = first, second
        self.shape, self.dtype = (len(first) + len(second), *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers, a copy."""
        behind = rows >= len(self._first)
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        found[~behind] = self._first[rows[~behind]]
        found[behind] = self._second[rows[behind] - len(self._first)]
        return found
