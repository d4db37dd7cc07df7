"""BatchNorm folding, cross-layer equalisation and bias correction, without any image.

The code of the network stays as it is: a folded BatchNorm gets variance 1 and scale 1, and its mean becomes the negative of
the remaining shift.
"""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.quantized.layers import Layer, find_layers


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
