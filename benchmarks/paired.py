"""Medians of paired measurements, and how far they can be trusted."""

import math
import statistics
from collections.abc import Sequence


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(median, low, high): the median of what is measured lies between the last two with at least this confidence.

    These are two of the values themselves, as many from the ends as the binomial distribution allows (the sign test turned
    round; nothing is assumed of the distribution). Fewer than 6 values have less confidence between them: then all of them.
    """
    ordered, n = sorted(values), len(values)
    outside, cut = 0.0, 0  # probability that the median lies beyond the value `cut` from an end, either end
    while cut < (n - 1) // 2:
        outside += 2 * math.comb(n, cut) / 2**n
        following = outside + 2 * math.comb(n, cut + 1) / 2**n
        if following > 1 - confidence:
            break
        cut += 1
    return statistics.median(ordered), ordered[cut], ordered[n - 1 - cut]
