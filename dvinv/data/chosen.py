"""A view of chosen rows of an array, without a copy: the array may be on disk."""

import numpy as np

from dvinv.data.rows import RowArray


class Chosen:
    """An object that behaves like `array[numbers]` when it is indexed by rows.

    Attributes:
      shape, dtype, ndim: those of the chosen rows.
    """

    def __init__(self, array: RowArray, numbers: np.ndarray):
        """Takes an array and the numbers of the chosen rows, int [n]."""
        self._array, self._numbers = array, numbers
        self.shape, self.dtype, self.ndim = (len(numbers), *array.shape[1:]), array.dtype, len(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        """Returns a copy of rows, by number, slice, or array of numbers or booleans."""
        return self._array[self._numbers[index]]
