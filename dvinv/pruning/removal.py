"""Which channel units of a network go next, until it costs as little as asked."""

import math

import numpy as np

from dvinv.config import PruningSettings
from dvinv.errors import DvinvError
from dvinv.networks.channels import cost
from dvinv.networks.channels.cost import Cost
from dvinv.networks.channels.units import STAYS, Channels

EXACT = {'filters': cost.filters, 'flops': cost.flops, 'parameters': cost.parameters}


def removal_scores(settings: PruningSettings, importance: np.ndarray, price: Cost | None, alive: np.ndarray) -> np.ndarray:
    """Returns importance(u) - eta * what the removal of u saves, both as shares of the whole; the lowest go first.

    Args:
      importance: [units]; `alive`: bool [units].
      price: what the network costs; None where eta is 0.
    """
    scores = importance / max(importance[alive].sum(), np.finfo(float).tiny)
    return scores - settings.eta * price.savings(alive) / price.of(alive) if price else scores


def without_lowest(
    channels: Channels, alive: np.ndarray, scores: np.ndarray, price: Cost, most: float, settings: PruningSettings
) -> np.ndarray:
    """`alive` without as many units of the lowest scores as it takes to cost at most `most`, or as can go.

    Args:
      alive, scores: [units].
    """
    alive, made = alive.copy(), [units[units != STAYS] for units in channels.layers.values()]
    held = np.stack([np.bincount(units, minlength=channels.count) for units in made])  # [layers, units]
    stay = np.array([(units == STAYS).sum() for units in channels.layers.values()])
    left = held @ alive + stay
    for bundle in _bundles(held, alive, scores, settings.round_to):
        if price.of(alive) <= most:
            break
        gone = held[:, bundle].sum(1)
        if (left - gone >= settings.min_channels)[gone > 0].all():  # a layer with fewer loses none
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


def least_reachable(channels: Channels, price: Cost, settings: PruningSettings) -> float:
    """The smallest share of the cost that removals lead to, in the order of the units' numbers (others may differ)."""
    whole = np.ones(channels.count, bool)
    left = without_lowest(channels, whole, np.zeros(channels.count), price, -math.inf, settings)
    return price.of(left) / price.of(whole)


def refuse_unreachable(channels: Channels, price: Cost, settings: PruningSettings) -> None:
    """Refuse a target below what can be reached.

    Raises:
      DvinvError: tells the least.
    """
    least = least_reachable(channels, price, settings)
    if settings.target_ratio < least:
        raise DvinvError(
            f'pruning.target_ratio is {settings.target_ratio}, but with {settings.min_channels} channels in every layer at '
            f'least {least:.3f} of the {settings.measure} are left; ask for more, or lower pruning.min_channels.'
        )
