"""What a network costs with some of its channels gone, and what the removal of each group would save."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dvinv.networks.channels.groups import FIXED, ChannelGroups


@dataclasses.dataclass(frozen=True)
class Term:
    """The cost of one layer or variable, by how many channels are left along its axes.

    Attributes:
      axes: the groups of the places along each.
      price: (numbers of channels left, float [...] an axis) -> cost [...].
    """

    axes: tuple[np.ndarray, ...]
    price: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A sum of terms."""

    count: int  # of groups
    terms: tuple[Term, ...]

    def of(self, keep: np.ndarray) -> float:
        """The cost with the groups that are left, bool [count]."""
        left = np.append(keep, True)
        return float(sum(term.price(*(left[axis].sum() for axis in term.axes)) for term in self.terms))

    def savings(self, keep: np.ndarray) -> np.ndarray:
        """What the removal of each group, alone, would save, float [count]; 0 for those that are gone."""
        left, total = np.append(keep, True), np.zeros(self.count)
        for term in self.terms:
            now = [left[axis].sum() for axis in term.axes]
            mine = [np.bincount(axis[axis != FIXED], minlength=self.count) * keep for axis in term.axes]
            touched = np.flatnonzero(sum(mine))
            if len(touched):
                then = [n - gone[touched] for n, gone in zip(now, mine, strict=True)]
                total[touched] += term.price(*now) - term.price(*then)
        return total


def flops(channels: ChannelGroups) -> Cost:
    """Floating-point operations of convolutions and matrix products for one image, two a multiply-add; exact."""
    return Cost(channels.count, tuple(Term(p.axes, _volume(2 * p.fixed)) for p in channels.products))


def parameters(channels: ChannelGroups) -> Cost:
    """Trained numbers; exact."""
    terms = []
    for path, axes in channels.axes.items():
        if path.startswith('params/'):
            fixed = math.prod(n for n, groups in zip(channels.whole[path].shape, axes, strict=True) if groups is None)
            terms.append(Term(tuple(groups for groups in axes if groups is not None), _volume(fixed)))
    return Cost(channels.count, tuple(terms))


def filters(channels: ChannelGroups) -> Cost:
    """Channels that layers make."""
    return Cost(channels.count, tuple(Term((groups,), _volume(1)) for groups in channels.layers.values()))


def _volume(fixed: int) -> Callable[..., np.ndarray]:
    return lambda *left: fixed * math.prod(left)
