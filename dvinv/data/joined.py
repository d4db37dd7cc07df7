"""Two sets of images one after the other, neither of which is copied: one may lie on disk."""

import numpy as np


class Joined:
    """Looks like an array [N + M, ...] to whoever asks for rows by number: `first` [N, ...], then `second` [M, ...]."""

    def __init__(self, first, second):
        """Arrays, or `Rows`, of one shape but for their lengths."""
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers, a copy."""
        behind = rows >= len(self._first)
        found = np.empty((len(rows), *self._first.shape[1:]), self._first.dtype)
        found[~behind] = self._first[rows[~behind]]
        found[behind] = self._second[rows[behind] - len(self._first)]
        return found
