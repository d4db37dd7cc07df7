"""Quantization without labels: BatchNorm folding, equalisation, calibration of input ranges, and training of the steps.

Calibration records the inputs of layers on images or on samples from the BatchNorm statistics. Folding, cross-layer
equalisation and bias correction need no image. The code of the network stays as it is: a folded BatchNorm gets variance 1
and scale 1, and its mean becomes the negative of the remaining shift.

Quantization-aware training of kernels, shifts and all steps uses the training loop of other networks. It is LSQ (Esser et
al., arXiv 1902.08153). The parameters are the logarithms of the steps, so that steps stay positive and one learning rate
suits all.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dvinv.networks.classifier import Classifier, flatten, unflatten
from dvinv.networks.quantized_layers import Layer, find_layers, with_rules

SAMPLE_VALUES = 64  # values per layer and image
BATCH_SIZE = 64
DRAWN_IMAGES = 512  # number of images drawn
RANGE_METHODS = ('minmax', 'percentile', 'mse')
PERCENT_KEPT = 99.9  # percentage of the magnitudes on either side of 0 that the range keeps
RANGE_SHARES = np.linspace(0.02, 1.0, 99)


@dataclasses.dataclass(frozen=True)
class Folded:
    """A network prepared for quantization.

    Attributes:
      apply_fn: (weights, x) -> logits, unchanged by folding; see `ceilings`.
      layers: the layers in the order in which they run.
      weights: the variables, float32 numpy arrays.
      statistics: {number of a layer: (mean, standard deviation)}, float32 [C] each: the statistics of the layer's result
        before the shift is added, from its BatchNorm.
      ceilings: {number of an operation f that is a ReLU6: s, float32 [C]}: f(x) must be computed as f(s x) / s, channel by
        channel.
    """

    apply_fn: Callable
    layers: tuple[Layer, ...]
    weights: dict
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    ceilings: dict[str, np.ndarray]


def fold(apply_fn: Callable, variables, image_shape) -> Folded:
    """Folds every BatchNorm that follows exactly one layer into that layer; logits stay the same up to rounding.

    With k = scale / sqrt(variance + epsilon) per channel, kernel' = k kernel and shift = k (bias - mean) + BatchNorm bias.

    Raises:
      DvinvError: see `find_layers`.
    """
    layers = find_layers(apply_fn, variables, image_shape)
    flat = {path: np.array(leaf, np.float32) for path, leaf in flatten(variables).items()}
    uses = collections.Counter(layer.kernel for layer in layers)  # {path of a variable: the number of layers that use it}
    uses.update(layer.norm.mean for layer in layers if layer.norm)
    layers = tuple(
        dataclasses.replace(layer, norm=None)
        if layer.norm and max(uses[layer.kernel], uses[layer.norm.mean]) > 1  # each use would need its own weights
        else layer
        for layer in layers
    )
    statistics = {}
    for layer in layers:
        if norm := layer.norm:
            mean, variance = flat[norm.mean], flat[norm.variance]
            scale = flat[norm.scale] if norm.scale else np.ones_like(mean)
            beta = flat[norm.bias] if norm.bias else np.zeros_like(mean)
            bias = flat[layer.bias] if layer.bias else np.zeros_like(mean)
            factor = scale / np.sqrt(variance + norm.epsilon)
            shift = factor * (bias - mean) + beta
            flat[layer.kernel] = flat[layer.kernel] * _along(factor, flat[layer.kernel], layer.outputs)
            flat[norm.mean], flat[norm.variance] = -shift, np.full_like(variance, 1 - norm.epsilon)
            for path, value in ((norm.scale, 1.0), (norm.bias, 0.0), (layer.bias, 0.0)):
                if path:
                    flat[path] = np.full_like(flat[path], value)
            statistics[str(layer.number)] = (beta - shift, np.abs(scale))
    return Folded(apply_fn, layers, unflatten(flat), statistics, {})


def equalise(network: Folded) -> Folded:
    """Scales the channels between two layers so that all use a similar share of the quantization range; keeps the logits.

    This is cross-layer equalisation (Nagel et al., arXiv 1906.04721, section 4.1) with s = sqrt(r1 / r2) per channel. In the
    paper, r1 and r2 are the ranges of the weights before and after the channel. Here weights have one step per output
    channel, which makes that r1 irrelevant, and the inputs of a layer have one step for all channels. So r1 is the range of
    the channel, known from BatchNorm (mean plus 3 standard deviations), and r2 is the range of the weights that multiply the
    channel, relative to the range of each output. If the next layer is depthwise, there is no trade-off, and s = r1.
    """
    flat, layers = flatten(network.weights), {layer.number: layer for layer in network.layers}
    uses = collections.Counter(layer.kernel for layer in network.layers)
    statistics = dict(network.statistics)
    ceilings: dict[str, np.ndarray] = {}
    for layer in network.layers:
        after = None if layer.feeds is None else layers.get(layer.feeds)
        if after is None or layer.norm is None or not layer.last or uses[after.kernel] > 1 or after.inputs is None:
            continue
        mean, deviation = statistics[str(layer.number)]
        kernel, shift = flat[after.kernel], -flat[layer.norm.mean]
        top = mean + shift + 3 * deviation
        depthwise = (
            after.outputs is not None
            and after.groups == len(top) == kernel.shape[after.outputs]
            and kernel.shape[after.inputs] == 1
        )
        if not depthwise and (after.groups > 1 or kernel.shape[after.inputs] != len(top)):
            continue
        if depthwise:
            factor = np.ones_like(top)
        else:
            share = np.abs(kernel) / np.maximum(np.abs(kernel).max(after.contracted, keepdims=True), 1e-12)
            factor = share.max(tuple(axis for axis in range(kernel.ndim) if axis != after.inputs))
        used = (top > 1e-3 * top.max()) & (factor > 1e-3)  # channels that are hardly used stay as they are
        s = np.where(used, (top / np.maximum(factor, 1e-3)), 1.0)
        s = np.where(used, np.clip(s / np.exp(np.log(s[used]).mean()), 1e-2, 1e2) if used.any() else 1.0, 1.0)
        s = (s if depthwise else np.sqrt(s)).astype(np.float32)
        flat[layer.kernel] = flat[layer.kernel] / _along(s, flat[layer.kernel], layer.outputs)
        flat[layer.norm.mean] = flat[layer.norm.mean] / s
        flat[after.kernel] = kernel * _along(s, kernel, after.outputs if depthwise else after.inputs)
        statistics[str(layer.number)] = (mean / s, deviation / s)
        ceilings |= {str(number): s for number in layer.ceilings}
    return dataclasses.replace(network, weights=unflatten(flat), statistics=statistics, ceilings=ceilings)


def bias_corrected(network: Folded, rounded: dict[str, np.ndarray], means: list[np.ndarray]) -> dict:
    """Returns the weights of `network` with bias correction: shifts compensate the change of each layer's mean result.

    With the error e = rounded kernel - kernel, rounding moves the mean by the sum of e E[x] (Nagel et al., section 4.2).

    Args:
      rounded: {path of a kernel: the rounded kernel}.
      means: the mean of each input channel, float32 [I], one array per layer in the order of `network.layers`.
    """
    flat = dict(flatten(network.weights))
    for layer, mean in zip(network.layers, means, strict=True):
        if layer.kernel not in rounded or not (layer.norm or layer.bias) or layer.inputs is None or layer.outputs is None:
            continue
        error = rounded[layer.kernel] - flat[layer.kernel]
        error = error.sum(tuple(axis for axis in range(error.ndim) if axis not in (layer.inputs, layer.outputs)))
        error = error if layer.inputs < layer.outputs else error.T  # [I / groups, O]
        error = error.reshape(len(error), layer.groups, -1)
        change = np.einsum('gi,igo->go', mean.reshape(layer.groups, -1), error).ravel()
        if layer.norm:
            flat[layer.norm.mean] = flat[layer.norm.mean] + change
        else:
            flat[layer.bias] = flat[layer.bias] - change
    return unflatten(flat)


def _along(values: np.ndarray, array: np.ndarray, axis: int | None) -> np.ndarray:
    """Reshapes `values` [C] so that they broadcast along one axis of `array`."""
    return values.reshape([-1 if index == axis else 1 for index in range(array.ndim)])


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
    for start in range(0, len(images), BATCH_SIZE):
        x = classifier.normalise(jnp.asarray(images[start : start + BATCH_SIZE]))
        parts.append(jax.device_get(record(network.weights, network.ceilings, {}, None, x)))
    return _joined(parts)


def on_statistics(network: Folded, classifier: Classifier, key: jax.Array) -> list[Calibration]:
    """Returns a `Calibration` per layer without images: BatchNorm inputs are drawn from Gaussians with its statistics.

    The operations between BatchNorms (ReLUs, sums, poolings) run unchanged. Draws differ by image and channel, but not by
    pixel, so that a mean over space has the largest possible spread. Pixels are drawn uniformly.
    """
    record, parts = _compiled(network.apply_fn, network.layers), []
    statistics = network.statistics
    for part in range(DRAWN_IMAGES // BATCH_SIZE):
        part_key = jax.random.fold_in(key, part)
        x = classifier.normalise(jax.random.uniform(part_key, (BATCH_SIZE, *classifier.image_shape)))
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
        places = np.random.default_rng(index).integers(flat.size, size=min(flat.size, SAMPLE_VALUES * len(x)))
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
    """Returns (step, zero point) of the 2^bits values to which the inputs of a layer are rounded; see `networks.quantized`.

    Args:
      method: 'minmax': the full range; 'percentile': the range without outliers, see `PERCENT_KEPT`; 'mse': the range
        with the least squared error.
    """
    sample = calibration.sample
    low, high = min(calibration.low, 0.0), max(calibration.high, 0.0)
    if method == 'percentile':
        below, above = sample[sample < 0], sample[sample > 0]
        low = float(np.percentile(below, 100 - PERCENT_KEPT)) if low and len(below) else low
        high = float(np.percentile(above, PERCENT_KEPT)) if high and len(above) else high
    top = 2**bits - 1
    if method != 'mse':
        return _parameters(low, high, top)
    best, least_error = (1.0, 0.0), np.inf
    for share in RANGE_SHARES:
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


class QuantizedModule(nn.Module):
    """`simulated` as a Linen module with given initial parameters. x [B, H, W, C] -> logits [B, K].

    BatchNorms are folded, so train mode is the same as eval mode.
    """

    apply_fn: Callable  # from `quantized.simulated`
    start: Callable  # () -> {name: array}, the initial parameters
    assemble: Callable  # {name: array} -> the variables that apply_fn takes

    @nn.compact
    def __call__(self, x, train: bool = False):
        values = {name: self.param(name, lambda _, value=value: jnp.asarray(value)) for name, value in self.start().items()}
        return self.apply_fn(self.assemble(values), x)


def quantized_module(network: Folded, apply_fn: Callable, variables: dict) -> QuantizedModule:
    """Returns the module that starts at the quantized `variables` of a folded network; see `quantized.simulated`."""
    assemble, start = _assembler(network, variables)
    return QuantizedModule(apply_fn, lambda: start, assemble)


def trained_variables(network: Folded, variables: dict, params: dict) -> dict:
    """Returns the quantized variables with the trained `params` of `quantized_module` in them."""
    assemble, _ = _assembler(network, variables)
    return jax.device_get(jax.jit(assemble)(params))


def _assembler(network: Folded, variables: dict) -> tuple[Callable, dict]:
    """Returns (function of the parameters to all variables, initial parameters)."""
    flat = flatten(variables['weights'])
    shifts = [layer.norm.mean if layer.norm else layer.bias for layer in network.layers]
    places = dict.fromkeys([*(layer.kernel for layer in network.layers), *filter(None, shifts)])
    start = {_name('weights', place): flat[place] for place in places}
    start |= {_name('step', place): np.log(step) for place, step in variables['steps'].items()}
    start['inputs'] = np.log(variables['inputs']['step'])

    def assemble(values: dict) -> dict:
        weights = {place: values.get(_name('weights', place), leaf) for place, leaf in flat.items()}
        steps = {place: jnp.exp(values[_name('step', place)]) for place in variables['steps']}
        inputs = {**variables['inputs'], 'step': jnp.exp(values['inputs'])}
        return {**variables, 'weights': unflatten(weights), 'steps': steps, 'inputs': inputs}

    return assemble, start


def _name(kind: str, place: str) -> str:
    """Returns the name of a parameter, without slashes, which separate names in a checkpoint."""
    return f'{kind}:{place}'.replace('/', '.')
