"""Calibration: recording the inputs of a network's layers on images, or on samples from the BatchNorm statistics."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import Classifier
from dvinv.networks.quantized.folding import Folded
from dvinv.networks.quantized.layers import Layer
from dvinv.networks.quantized.network import with_rules
from dvinv.networks.quantized.ranges import Observation

SAMPLE = 64  # values per layer and image
BATCH = 64
DRAWS = 512  # number of images drawn


def on_images(network: Folded, classifier: Classifier, images) -> list[Observation]:
    """Returns an `Observation` per layer, over pixels uint8 [N, H, W, C] (an array, or rows of a pool)."""
    watch, parts = _watching(network.apply_fn, network.layers), []
    for start in range(0, len(images), BATCH):
        x = classifier.normalise(jnp.asarray(images[start : start + BATCH]))
        parts.append(jax.device_get(watch(network.weights, network.ceilings, {}, None, x)))
    return _joined(parts)


def on_statistics(network: Folded, classifier: Classifier, key: jax.Array) -> list[Observation]:
    """Returns an `Observation` per layer without images: BatchNorm inputs are drawn from Gaussians with its statistics.

    The operations between BatchNorms (ReLUs, sums, poolings) run unchanged. Draws differ by image and channel, but not by
    pixel, so that a mean over space has the largest possible spread. Pixels are drawn uniformly.
    """
    watch, parts = _watching(network.apply_fn, network.layers), []
    statistics = network.statistics
    for part in range(DRAWS // BATCH):
        own = jax.random.fold_in(key, part)
        x = classifier.normalise(jax.random.uniform(own, (BATCH, *classifier.image_shape)))
        parts.append(jax.device_get(watch(network.weights, network.ceilings, statistics, own, x)))
    return _joined(parts)


@functools.lru_cache(maxsize=8)
def _watching(apply_fn: Callable, layers: tuple[Layer, ...]) -> Callable:
    """Returns the compiled function that computes [(low, high, sample, means)] of the layers' inputs."""
    return jax.jit(functools.partial(_watched, apply_fn, layers))


def _watched(apply_fn, layers, weights, ceilings, statistics, key, x):
    """Computes [(low, high, sample, means)] of the layers' inputs.

    The results of layers in `statistics` are replaced by draws with `key`.
    """
    seen = []

    def around(index, bind, operands):
        layer = layers[index]
        value = operands[1 - layer.side].astype(jnp.float32)
        flat = value.reshape(-1)
        places = np.random.default_rng(index).integers(flat.size, size=min(flat.size, SAMPLE * len(x)))
        channels = () if layer.channel is None else tuple(a for a in range(value.ndim) if a != layer.channel)
        seen.append((flat.min(), flat.max(), flat[places], value.mean(channels) if channels else value.mean()[None]))
        result = bind(*operands)
        if str(layer.number) in statistics and layer.last:
            mean, deviation = statistics[str(layer.number)]
            draws = jax.random.normal(
                jax.random.fold_in(key, 1 + index), (len(x), *(1,) * (result.ndim - 2), result.shape[-1])
            )
            result = jnp.broadcast_to(mean + deviation * draws, result.shape).astype(result.dtype)
        return result

    with_rules(apply_fn, layers, around)(weights, ceilings, x)
    return seen


def _joined(parts) -> list[Observation]:
    return [
        Observation(
            float(min(part[0] for part in layer)),
            float(max(part[1] for part in layer)),
            np.concatenate([part[2] for part in layer]),
            np.mean([part[3] for part in layer], 0),
        )
        for layer in zip(*parts, strict=True)
    ]
