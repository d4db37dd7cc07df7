"""What a network costs with some of its channels gone, and what the removal of each unit would save."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dvinv.networks.channels.units import STAYS, Channels


@dataclasses.dataclass(frozen=True)
class Term:
    """The cost of one layer or variable, by how many channels are left along its axes.

    Attributes:
      axes: the units of the places along each.
      price: (numbers of channels left, float [...] an axis) -> cost [...].
    """

    axes: tuple[np.ndarray, ...]
    price: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A sum of terms."""

    count: int  # of units
    terms: tuple[Term, ...]

    def of(self, alive: np.ndarray) -> float:
        """The cost with the units that are left, bool [count]."""
        left = np.append(alive, True)
        return float(sum(term.price(*(left[axis].sum() for axis in term.axes)) for term in self.terms))

    def savings(self, alive: np.ndarray) -> np.ndarray:
        """What the removal of each unit, alone, would save, float [count]; 0 for those that are gone."""
        left, total = np.append(alive, True), np.zeros(self.count)
        for term in self.terms:
            now = [left[axis].sum() for axis in term.axes]
            mine = [np.bincount(axis[axis != STAYS], minlength=self.count) * alive for axis in term.axes]
            touched = np.flatnonzero(sum(mine))
            if len(touched):
                then = [n - gone[touched] for n, gone in zip(now, mine, strict=True)]
                total[touched] += term.price(*now) - term.price(*then)
        return total


def flops(channels: Channels) -> Cost:
    """Floating-point operations of convolutions and matrix products for one image, two a multiply-add; exact."""
    return Cost(channels.count, tuple(Term(p.axes, _volume(2 * p.fixed)) for p in channels.products))


def parameters(channels: Channels) -> Cost:
    """Trained numbers; exact."""
    terms = []
    for path, axes in channels.axes.items():
        if path.startswith('params/'):
            fixed = math.prod(n for n, units in zip(channels.whole[path].shape, axes, strict=True) if units is None)
            terms.append(Term(tuple(units for units in axes if units is not None), _volume(fixed)))
    return Cost(channels.count, tuple(terms))


def filters(channels: Channels) -> Cost:
    """Channels that layers make."""
    return Cost(channels.count, tuple(Term((units,), _volume(1)) for units in channels.layers.values()))


def _volume(fixed: int) -> Callable[..., np.ndarray]:
    return lambda *left: fixed * math.prod(left)
