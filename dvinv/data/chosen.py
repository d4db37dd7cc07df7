"""Some of the rows of an array, none of which is copied: it may lie on disk."""

import numpy as np


class Chosen:
    """Looks like `array[numbers]` to whoever asks for rows by number.

    Attributes:
      shape, dtype, ndim: of what was chosen.
    """

    def __init__(self, array, numbers: np.ndarray):
        """Rows of an array or of what is indexed like one, by their numbers, int [n]."""
        self._array, self._numbers = array, numbers
        self.shape, self.dtype, self.ndim = (len(numbers), *array.shape[1:]), array.dtype, len(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Rows by number, slice, or array of numbers or booleans, a copy."""
        return self._array[self._numbers[index]]
