"""Calibration: recording the inputs of layers on images or on samples from the BatchNorm statistics, and their ranges."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dvinv.networks.classifier import Classifier
from dvinv.networks.quantized.folding import Folded
from dvinv.networks.quantized.layers import Layer, with_rules

SAMPLE = 64  # values per layer and image
BATCH = 64
DRAWS = 512  # number of images drawn
METHODS = ('minmax', 'percentile', 'mse')
PERCENT = 99.9  # percentage of the magnitudes on either side of 0 that the range keeps
SHARES = np.linspace(0.02, 1.0, 99)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The recorded inputs of a layer.

    Attributes:
      low, high: the extremes.
      sample: float32 [n], values drawn uniformly.
      means: float32 [I], the mean of each input channel.
    """

    low: float
    high: float
    sample: Float[np.ndarray, ' n']
    means: Float[np.ndarray, ' I']


def on_images(network: Folded, classifier: Classifier, images) -> list[Calibration]:
    """Returns a `Calibration` per layer, over pixels uint8 [N, H, W, C] (an array, or rows of a pool)."""
    record, parts = _compiled(network.apply_fn, network.layers), []
    for start in range(0, len(images), BATCH):
        x = classifier.normalise(jnp.asarray(images[start : start + BATCH]))
        parts.append(jax.device_get(record(network.weights, network.ceilings, {}, None, x)))
    return _joined(parts)


def on_statistics(network: Folded, classifier: Classifier, key: jax.Array) -> list[Calibration]:
    """Returns a `Calibration` per layer without images: BatchNorm inputs are drawn from Gaussians with its statistics.

    The operations between BatchNorms (ReLUs, sums, poolings) run unchanged. Draws differ by image and channel, but not by
    pixel, so that a mean over space has the largest possible spread. Pixels are drawn uniformly.
    """
    record, parts = _compiled(network.apply_fn, network.layers), []
    statistics = network.statistics
    for part in range(DRAWS // BATCH):
        part_key = jax.random.fold_in(key, part)
        x = classifier.normalise(jax.random.uniform(part_key, (BATCH, *classifier.image_shape)))
        parts.append(jax.device_get(record(network.weights, network.ceilings, statistics, part_key, x)))
    return _joined(parts)


@functools.lru_cache(maxsize=8)
def _compiled(apply_fn: Callable, layers: tuple[Layer, ...]) -> Callable:
    """Returns the compiled function that computes [(low, high, sample, means)] of the layers' inputs."""
    return jax.jit(functools.partial(_recorded, apply_fn, layers))


def _recorded(apply_fn, layers, weights, ceilings, statistics, key, x):
    """Computes [(low, high, sample, means)] of the layers' inputs.

    The results of layers in `statistics` are replaced by draws with `key`.
    """
    recorded = []

    def compute_layer(index, bind, operands):
        layer = layers[index]
        value = operands[1 - layer.side].astype(jnp.float32)
        flat = value.reshape(-1)
        places = np.random.default_rng(index).integers(flat.size, size=min(flat.size, SAMPLE * len(x)))
        channels = () if layer.channel is None else tuple(a for a in range(value.ndim) if a != layer.channel)
        recorded.append((flat.min(), flat.max(), flat[places], value.mean(channels) if channels else value.mean()[None]))
        result = bind(*operands)
        if str(layer.number) in statistics and layer.last:
            mean, deviation = statistics[str(layer.number)]
            draws = jax.random.normal(
                jax.random.fold_in(key, 1 + index), (len(x), *(1,) * (result.ndim - 2), result.shape[-1])
            )
            result = jnp.broadcast_to(mean + deviation * draws, result.shape).astype(result.dtype)
        return result

    with_rules(apply_fn, layers, compute_layer)(weights, ceilings, x)
    return recorded


def _joined(parts) -> list[Calibration]:
    return [
        Calibration(
            float(min(part[0] for part in layer)),
            float(max(part[1] for part in layer)),
            np.concatenate([part[2] for part in layer]),
            np.mean([part[3] for part in layer], 0),
        )
        for layer in zip(*parts, strict=True)
    ]


def quantization_parameters(calibration: Calibration, bits: int, method: str) -> tuple[float, float]:
    """Returns (step, zero point) of the 2^bits values to which the inputs of a layer are rounded; see `rounding`.

    Args:
      method: 'minmax': the full range; 'percentile': the range without outliers, see `PERCENT`; 'mse': the range with the
        least squared error.
    """
    sample = calibration.sample
    low, high = min(calibration.low, 0.0), max(calibration.high, 0.0)
    if method == 'percentile':
        below, above = sample[sample < 0], sample[sample > 0]
        low = float(np.percentile(below, 100 - PERCENT)) if low and len(below) else low
        high = float(np.percentile(above, PERCENT)) if high and len(above) else high
    top = 2**bits - 1
    if method != 'mse':
        return _parameters(low, high, top)
    best, least_error = (1.0, 0.0), np.inf
    for share in SHARES:
        step, zero_point = _parameters(share * low, share * high, top)
        error = float(np.mean((_rounded(sample, step, zero_point, top) - sample) ** 2))
        if error < least_error:
            best, least_error = (step, zero_point), error
    return best


def _parameters(low: float, high: float, top: int) -> tuple[float, float]:
    step = (high - low) / top or 1.0
    return step, float(np.rint(-low / step))


def _rounded(x: np.ndarray, step: float, zero_point: float, top: int) -> np.ndarray:
    return (np.clip(np.rint(x / step) + zero_point, 0, top) - zero_point) * step
