"""Range estimation for the inputs of a layer, from a sample of them."""

import dataclasses

import numpy as np

METHODS = ('minmax', 'percentile', 'mse')
PERCENT = 99.9  # percentage of the magnitudes on either side of 0 that the range keeps
SHARES = np.linspace(0.02, 1.0, 99)


@dataclasses.dataclass(frozen=True)
class Observation:
    """The recorded inputs of a layer.

    Attributes:
      low, high: the extremes.
      sample: float32 [n], values drawn uniformly.
      means: float32 [I], the mean of each input channel.
    """

    low: float
    high: float
    sample: np.ndarray
    means: np.ndarray


def grid_of(seen: Observation, bits: int, method: str) -> tuple[float, float]:
    """Returns (step, zero) of the grid of 2^bits values for the inputs of a layer; see `rounding`.

    Args:
      method: 'minmax': the full range; 'percentile': the range without outliers, see `PERCENT`; 'mse': the range with the
        least squared error.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if method == 'percentile':
        below, above = seen.sample[seen.sample < 0], seen.sample[seen.sample > 0]
        low = float(np.percentile(below, 100 - PERCENT)) if low and len(below) else low
        high = float(np.percentile(above, PERCENT)) if high and len(above) else high
    top = 2**bits - 1
    if method != 'mse':
        return _grid(low, high, top)
    best, least = None, np.inf
    for share in SHARES:
        step, zero = _grid(share * low, share * high, top)
        error = float(np.mean((_on_grid(seen.sample, step, zero, top) - seen.sample) ** 2))
        if error < least:
            best, least = (step, zero), error
    return best


def _grid(low: float, high: float, top: int) -> tuple[float, float]:
    step = (high - low) / top or 1.0
    return step, float(np.rint(-low / step))


def _on_grid(x, step, zero, top):
    return (np.clip(np.rint(x / step) + zero, 0, top) - zero) * step
