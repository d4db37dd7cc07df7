"""Which channels can only be removed together.

Every place along an axis of a variable is an atom. Following the network's operations ties atoms that must go together (the
two sides of a sum, what a convolution makes and the next one takes), and pins those that must stay.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pin:
    """Why atoms must stay: an operation that cannot do without them, and where it is called."""

    operation: str
    where: str


class Ties:
    """Atoms are numbers, counted from 0 as they are made."""

    def __init__(self):
        self._atoms = 0
        self._tied: list[tuple[np.ndarray, np.ndarray]] = []
        self._pinned: list[tuple[np.ndarray, Pin]] = []

    def fresh(self, count: int) -> np.ndarray:
        """New atoms, int64 [count]."""
        self._atoms += count
        return np.arange(self._atoms - count, self._atoms)

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        """`first[i]` and `second[i]`, int [n] both, go together."""
        if first is not second:
            self._tied.append((first, second))

    def pin(self, atoms: np.ndarray, why: Pin) -> None:
        """These atoms must stay."""
        self._pinned.append((atoms, why))

    def units(self) -> np.ndarray:
        """The unit of each atom, int [atoms]: those of one unit go together."""
        from scipy.sparse import coo_array  # late: every run imports this module, and few prune
        from scipy.sparse.csgraph import connected_components

        first, second = (
            np.concatenate([np.zeros(0, int), *sides]) for sides in (*zip(*self._tied, strict=True),) or ((), ())
        )
        graph = coo_array((np.ones(len(first), bool), (first, second)), (self._atoms, self._atoms))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> list[tuple[np.ndarray, Pin]]:
        """What was pinned, and why."""
        return self._pinned
