"""Which channels can only be removed together.

Every place along an axis of a variable is a slot. Following the operations of a network couples slots that must go together
(the two sides of a sum, what a convolution makes and the next one takes), and pins those that must stay.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pin:
    """Why slots must stay: an operation that cannot do without them, and where it is called."""

    operation: str
    where: str


class Coupling:
    """Atoms are numbers, counted from 0 as they are made."""

    def __init__(self):
        self._slots = 0
        self._coupled: list[tuple[np.ndarray, np.ndarray]] = []
        self._pinned: list[tuple[np.ndarray, Pin]] = []

    def fresh(self, count: int) -> np.ndarray:
        """New slots, int64 [count]."""
        self._slots += count
        return np.arange(self._slots - count, self._slots)

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """`first[i]` and `second[i]`, int [n] both, go together."""
        if first is not second:
            self._coupled.append((first, second))

    def pin(self, slots: np.ndarray, why: Pin) -> None:
        """These slots must stay."""
        self._pinned.append((slots, why))

    def groups(self) -> np.ndarray:
        """The group of each slot, int [slots]: those of one group go together."""
        from scipy.sparse import coo_array  # late: every run imports this module, and few prune
        from scipy.sparse.csgraph import connected_components

        first, second = (
            np.concatenate([np.zeros(0, int), *sides]) for sides in (*zip(*self._coupled, strict=True),) or ((), ())
        )
        graph = coo_array((np.ones(len(first), bool), (first, second)), (self._slots, self._slots))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> list[tuple[np.ndarray, Pin]]:
        """What was pinned, and why."""
        return self._pinned
