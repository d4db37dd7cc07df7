"""Which channel groups of a network go next, until it costs as little as asked."""

import math

import numpy as np

from dvinv.config import PruningSettings
from dvinv.errors import DvinvError
from dvinv.networks.channels import cost
from dvinv.networks.channels.cost import Cost
from dvinv.networks.channels.groups import FIXED, ChannelGroups

EXACT = {'filters': cost.filters, 'flops': cost.flops, 'parameters': cost.parameters}


def removal_scores(settings: PruningSettings, importance: np.ndarray, price: Cost | None, keep: np.ndarray) -> np.ndarray:
    """Returns importance(u) - eta * what the removal of u saves, both as shares of the whole; the lowest go first.

    Args:
      importance: [groups]; `keep`: bool [groups].
      price: what the network costs; None where eta is 0.
    """
    scores = importance / max(importance[keep].sum(), np.finfo(float).tiny)
    return scores - settings.eta * price.savings(keep) / price.of(keep) if price else scores


def without_lowest(
    channels: ChannelGroups, keep: np.ndarray, scores: np.ndarray, price: Cost, most: float, settings: PruningSettings
) -> np.ndarray:
    """`keep` without as many groups of the lowest scores as it takes to cost at most `most`, or as can go.

    Args:
      keep, scores: [groups].
    """
    keep, made = keep.copy(), [groups[groups != FIXED] for groups in channels.layers.values()]
    held = np.stack([np.bincount(groups, minlength=channels.count) for groups in made])  # [layers, groups]
    stay = np.array([(groups == FIXED).sum() for groups in channels.layers.values()])
    left = held @ keep + stay
    for bundle in _bundles(held, keep, scores, settings.round_to):
        if price.of(keep) <= most:
            break
        gone = held[:, bundle].sum(1)
        if (left - gone >= settings.min_channels)[gone > 0].all():  # a layer with fewer loses none
            keep[bundle] = False
            left = left - gone
    return keep


def _bundles(held: np.ndarray, keep: np.ndarray, scores: np.ndarray, multiple: int) -> list[np.ndarray]:
    """Units that go at a time, those of the lowest mean score first.

    Units of the same layers are alike; of these the lowest `multiple` are a bundle, and so on. Where their number is no
    multiple, the first bundle makes it one.
    """
    _, kinds = np.unique(held, axis=1, return_inverse=True)
    order, bundles = np.argsort(scores, kind='stable'), []
    for kind in np.unique(kinds[keep]):
        alike = order[(kinds == kind)[order] & keep[order]]
        first = len(alike) % multiple or multiple
        bundles += np.split(alike, range(first, len(alike), multiple))
    return sorted(bundles, key=lambda bundle: (scores[bundle].mean(), bundle[0]))


def least_reachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> float:
    """The smallest share of the cost that removals lead to, in the order of the groups' numbers (others may differ)."""
    whole = np.ones(channels.count, bool)
    left = without_lowest(channels, whole, np.zeros(channels.count), price, -math.inf, settings)
    return price.of(left) / price.of(whole)


def refuse_unreachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> None:
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
