"""Which channel units of a network go next, until it costs as little as asked."""

import dataclasses
import math

import numpy as np

from dvinv.errors import DvinvError
from dvinv.networks.channels import cost
from dvinv.networks.channels.cost import Cost
from dvinv.networks.channels.units import STAYS, Channels
from dvinv.pruning.importance import METHODS

EXACT = {'filters': cost.filters, 'flops': cost.flops, 'parameters': cost.parameters}
MEASURES = (*EXACT, 'latency')


@dataclasses.dataclass(frozen=True)
class Removal:
    """What is removed, and how; fields of the config group `pruning`."""

    measure: str = 'flops'  # what `left` is a share of: filters, flops, parameters or latency
    left: float = 0.5  # of the whole network's
    steps: int = 5  # in which it is reached, fine-tuned in between; as many per cent go in each
    importance: str = 'taylor'  # or 'magnitude', 'random'
    importance_batches: int = 10  # batches of the pool that the importance is a mean over
    eta: float = 0.0  # how much of a share of the importance a share of the cost is worth (the paper's hardware-aware term)
    cost: str = 'latency'  # that eta is about; one of the measures
    least: int = 2  # channels that every layer keeps
    multiple: int = 1  # they go so many at a time; with 8, widths stay such as a CPU's or GPU's convolutions like best
    protected: tuple[str, ...] = ()  # layers whose channels stay

    def check(self) -> None:
        """Refuse what cannot be followed."""
        for field in ('measure', 'cost'):
            if getattr(self, field) not in MEASURES:
                raise DvinvError(f'pruning.{field} is {getattr(self, field)!r}; choose one of {", ".join(MEASURES)}.')
        if self.importance not in METHODS:
            raise DvinvError(f'pruning.importance is {self.importance!r}; choose one of {", ".join(METHODS)}.')
        if not 0 < self.left < 1:
            raise DvinvError(f'pruning.left is {self.left}; it must be a share of what the network costs, between 0 and 1.')
        for field in ('steps', 'importance_batches', 'least', 'multiple'):
            if getattr(self, field) < 1:
                raise DvinvError(f'pruning.{field} is {getattr(self, field)}; it must be at least 1.')
        if not 0 <= self.eta < math.inf:
            raise DvinvError(f'pruning.eta is {self.eta}; it must be at least 0 and finite, or cheap units would be kept.')

    @property
    def needs_latency(self) -> bool:
        """Whether a table of latencies must be measured."""
        return 'latency' in (self.measure, self.cost if self.eta else '')

    def target(self, step: int) -> float:
        """The share that is left after a step, 1 to `steps`."""
        return self.left ** (step / self.steps)

    def scores(self, importance: np.ndarray, price: Cost | None, alive: np.ndarray) -> np.ndarray:
        """importance(u) - eta * what the removal of u saves, both as shares of the whole; the lowest go first."""
        scores = importance / max(importance[alive].sum(), np.finfo(float).tiny)
        return scores - self.eta * price.savings(alive) / price.of(alive) if self.eta else scores


def without_lowest(
    channels: Channels, alive: np.ndarray, scores: np.ndarray, price: Cost, most: float, removal: Removal
) -> np.ndarray:
    """`alive` without as many units of the lowest scores as it takes to cost at most `most`, or as can go.

    Args:
      alive, scores: [units].
    """
    alive, made = alive.copy(), [units[units != STAYS] for units in channels.layers.values()]
    held = np.stack([np.bincount(units, minlength=channels.count) for units in made])  # [layers, units]
    stay = np.array([(units == STAYS).sum() for units in channels.layers.values()])
    left = held @ alive + stay
    for bundle in _bundles(held, alive, scores, removal.multiple):
        if price.of(alive) <= most:
            break
        gone = held[:, bundle].sum(1)
        if (left - gone >= removal.least)[gone > 0].all():  # a layer with fewer loses none
            alive[bundle] = False
            left = left - gone
    return alive


def _bundles(held: np.ndarray, alive: np.ndarray, scores: np.ndarray, multiple: int) -> list[np.ndarray]:
    """Units that go at a time, those of the lowest mean score first.

    Units of the same layers are alike; of these the lowest `multiple` are a bundle, and so on. Where their number is no
    multiple, the first bundle makes it one.
    """
    _, kinds = np.unique(held, axis=1, return_inverse=True)
    order, bundles = np.argsort(scores, kind='stable'), []
    for kind in np.unique(kinds[alive]):
        alike = order[(kinds == kind)[order] & alive[order]]
        first = len(alike) % multiple or multiple
        bundles += np.split(alike, range(first, len(alike), multiple))
    return sorted(bundles, key=lambda bundle: (scores[bundle].mean(), bundle[0]))


def least_reachable(channels: Channels, price: Cost, removal: Removal) -> float:
    """The smallest share of the cost that removals lead to, in the order of the units' numbers (others may differ)."""
    whole = np.ones(channels.count, bool)
    left = without_lowest(channels, whole, np.zeros(channels.count), price, -math.inf, removal)
    return price.of(left) / price.of(whole)


def refuse_unreachable(channels: Channels, price: Cost, removal: Removal) -> None:
    """Refuse a target below what can be reached.

    Raises:
      DvinvError: tells the least.
    """
    least = least_reachable(channels, price, removal)
    if removal.left < least:
        raise DvinvError(
            f'pruning.left is {removal.left}, but with {removal.least} channels in every layer at least {least:.3f} of the '
            f'{removal.measure} are left; ask for more, or lower pruning.least.'
        )
