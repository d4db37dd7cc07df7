"""The choice of the channel groups to remove until a network reaches a target cost."""

import math

import numpy as np

from dvinv.config import PruningSettings
from dvinv.errors import DvinvError
from dvinv.networks.channels import cost
from dvinv.networks.channels.cost import Cost, KeepMask, PerGroup
from dvinv.networks.channels.groups import FIXED, ChannelGroups

EXACT = {'filters': cost.filters, 'flops': cost.flops, 'parameters': cost.parameters}


def removal_scores(settings: PruningSettings, importance: PerGroup, price: Cost | None, keep: KeepMask) -> PerGroup:
    """Computes importance(u) - eta * savings(u) per group u, both relative to the network; the lowest are removed first.

    Args:
      importance: the importance of each group, [groups].
      price: the cost of the network; None if eta is 0.
      keep: the keep mask before the removal, bool [groups].
    """
    scores = importance / max(importance[keep].sum(), np.finfo(float).tiny)
    return scores - settings.eta * price.savings(keep) / price.total(keep) if price else scores


def without_lowest(
    channels: ChannelGroups, keep: KeepMask, scores: PerGroup, price: Cost, most: float, settings: PruningSettings
) -> KeepMask:
    """Removes the groups of the lowest scores until the cost is at most `most` or no more can be removed.

    Args:
      keep, scores: the keep mask before the removal and the scores, [groups].
      price: the cost of the network.

    Returns:
      The keep mask after the removal, bool [groups].
    """
    keep, layers = keep.copy(), channels.layers.values()
    channels_in = np.stack([np.bincount(groups[groups != FIXED], minlength=channels.count) for groups in layers])
    fixed = np.array([(groups == FIXED).sum() for groups in layers])
    remaining = channels_in @ keep + fixed  # the number of channels of each layer
    for bundle in _bundles(channels_in, keep, scores, settings.round_to):
        if price.total(keep) <= most:
            break
        removed = channels_in[:, bundle].sum(1)
        if (remaining - removed >= settings.min_channels)[removed > 0].all():  # else a layer would fall below the minimum
            keep[bundle] = False
            remaining = remaining - removed
    return keep


def _bundles(channels_in: np.ndarray, keep: KeepMask, scores: PerGroup, round_to: int) -> list[np.ndarray]:
    """Returns bundles of groups that are removed together, those of the lowest mean score first.

    Groups with channels in the same layers are of the same kind. Groups of a kind are sorted by score and bundled by
    `round_to`. If their number is not a multiple of it, the first bundle is smaller, so that a multiple remains.

    Args:
      channels_in: the number of channels of each group in each layer, [layers, groups].
      keep, scores: the keep mask before the removal and the scores, [groups].
      round_to: the number of groups in a bundle.
    """
    _, kinds = np.unique(channels_in, axis=1, return_inverse=True)
    order, bundles = np.argsort(scores, kind='stable'), []
    for kind in np.unique(kinds[keep]):
        groups = order[(kinds == kind)[order] & keep[order]]
        first = len(groups) % round_to or round_to
        bundles += np.split(groups, range(first, len(groups), round_to))
    return sorted(bundles, key=lambda bundle: (scores[bundle].mean(), bundle[0]))


def least_reachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> float:
    """Computes the smallest reachable ratio of the cost if groups are removed by number (other orders may differ)."""
    keep_all = np.ones(channels.count, bool)
    keep = without_lowest(channels, keep_all, np.zeros(channels.count), price, -math.inf, settings)
    return price.total(keep) / price.total(keep_all)


def refuse_unreachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> None:
    """Refuses a target ratio that cannot be reached.

    Raises:
      DvinvError: the target is too low; the message says the smallest reachable ratio.
    """
    least = least_reachable(channels, price, settings)
    if settings.target_ratio < least:
        raise unreachable(settings, f'at least {least:.3f}')


def unreachable(settings: PruningSettings, remaining: str) -> DvinvError:
    """Returns the error for a target ratio that cannot be reached; `remaining` is the ratio that can."""
    return DvinvError(
        f'pruning.target_ratio is {settings.target_ratio}, but with {settings.min_channels} channels in every layer '
        f'{remaining} of the {settings.measure} remain; raise it, or lower pruning.min_channels.'
    )
