"""The cost of a network after the removal of some channels, and the saving by the removal of each channel group."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from dvinv.networks.channels.groups import FIXED, ChannelGroups

KeepMask = Bool[np.ndarray, ' groups']  # whether each channel group is kept
PerGroup = Float[np.ndarray, ' groups']


@dataclasses.dataclass(frozen=True)
class Term:
    """The cost of one layer or variable as a function of the numbers of remaining channels along its axes.

    Attributes:
      axes: For each axis of channels, the groups of its places.
      price: (number of remaining channels of each axis, float [...]) -> cost [...].
    """

    axes: tuple[np.ndarray, ...]
    price: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of a network: a sum of terms."""

    count: int  # the number of channel groups
    terms: tuple[Term, ...]

    def total(self, keep: KeepMask) -> float:
        """Computes the cost of the network with the groups in the keep mask, bool [count]."""
        kept = np.append(keep, True)  # with the entry that FIXED, -1, reads
        return float(sum(term.price(*(kept[axis].sum() for axis in term.axes)) for term in self.terms))

    def savings(self, keep: KeepMask) -> PerGroup:
        """Computes the saving by the removal of each group alone, float [count]; 0 for groups that are removed already."""
        kept, savings = np.append(keep, True), np.zeros(self.count)
        for term in self.terms:
            counts = [kept[axis].sum() for axis in term.axes]
            # For each axis, the number of its channels in each group that is not removed yet.
            of_groups = [np.bincount(axis[axis != FIXED], minlength=self.count) * keep for axis in term.axes]
            groups = np.flatnonzero(sum(of_groups))
            if len(groups):
                without = [count - sizes[groups] for count, sizes in zip(counts, of_groups, strict=True)]
                savings[groups] += term.price(*counts) - term.price(*without)
        return savings


def flops(channels: ChannelGroups) -> Cost:
    """Returns the number of floating-point operations of convolutions and matrix products for one image as a cost; exact.

    A multiply-add counts as two operations.
    """
    return Cost(channels.count, tuple(Term(p.axes, _volume(2 * p.fixed)) for p in channels.products))


def parameters(channels: ChannelGroups) -> Cost:
    """Returns the number of trained parameters as a cost; exact."""
    terms = []
    for path, axes in channels.axes.items():
        if path.startswith('params/'):
            fixed = math.prod(n for n, groups in zip(channels.flat_shapes[path].shape, axes, strict=True) if groups is None)
            terms.append(Term(tuple(groups for groups in axes if groups is not None), _volume(fixed)))
    return Cost(channels.count, tuple(terms))


def filters(channels: ChannelGroups) -> Cost:
    """Returns the number of output channels of all layers as a cost."""
    return Cost(channels.count, tuple(Term((groups,), _volume(1)) for groups in channels.layers.values()))


def _volume(fixed: int) -> Callable[..., np.ndarray]:
    return lambda *counts: fixed * math.prod(counts)
