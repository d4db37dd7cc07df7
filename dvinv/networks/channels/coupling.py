"""Coupling of channels that can only be removed together.

Every place along an axis of a variable is a slot. Following the operations of a network couples slots that must be removed
together (those of the two sides of a sum, or of a convolution's outputs and the next one's inputs), and pins slots that must
stay.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pin:
    """The reason why slots must stay: an operation that needs all of them, and the path of the module that calls it."""

    operation: str
    module: str


class Coupling:
    """Slots, numbered from 0 in the order in which they are created, with their couplings and pins."""

    def __init__(self) -> None:
        self._slots = 0
        self._coupled: list[tuple[np.ndarray, np.ndarray]] = []
        self._pinned: list[tuple[np.ndarray, Pin]] = []

    def fresh(self, count: int) -> np.ndarray:
        """Creates slots; returns their numbers, int64 [count]."""
        self._slots += count
        return np.arange(self._slots - count, self._slots)

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """Records that `first[i]` and `second[i]`, int [n] both, can only be removed together."""
        if first is not second:
            self._coupled.append((first, second))

    def pin(self, slots: np.ndarray, reason: Pin) -> None:
        """Records that these slots must stay."""
        self._pinned.append((slots, reason))

    def groups(self) -> np.ndarray:
        """Returns the group of each slot, int [number of slots]; slots of one group can only be removed together."""
        from scipy.sparse import coo_array  # imported late, because every run imports this module and few prune
        from scipy.sparse.csgraph import connected_components

        first, second = (
            np.concatenate([np.zeros(0, int), *sides]) for sides in (*zip(*self._coupled, strict=True),) or ((), ())
        )
        graph = coo_array((np.ones(len(first), bool), (first, second)), (self._slots, self._slots))
        return connected_components(graph, directed=False)[1]

    def pins(self) -> list[tuple[np.ndarray, Pin]]:
        """Returns the pinned slots, each array with its reason."""
        return self._pinned
