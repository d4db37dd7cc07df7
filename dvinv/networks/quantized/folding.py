"""BatchNorms folded into the layers before them, channels scaled to a like range, shifts corrected: all without an image.

The network's own code runs on: a folded BatchNorm has variance 1, scale 1, and as its mean minus the one shift that is left.
"""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.quantized.layers import Layer, find_layers


@dataclasses.dataclass(frozen=True)
class Folded:
    """A network made ready to be quantized.

    Attributes:
      apply_fn: (weights, x) -> logits, as it was; see `ceilings`.
      layers: in the order in which they run.
      weights: its variables, float32 numpy arrays.
      statistics: {number of a layer: (mean, deviation)}, float32 [C] each: what its BatchNorm knows of its result, before
        the shift is added.
      ceilings: {number of an operation f that is a ReLU6: s, float32 [C]}: it is to be f(s x) / s, channel by channel.
    """

    apply_fn: Callable
    layers: tuple[Layer, ...]
    weights: dict
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    ceilings: dict[str, np.ndarray]


def fold(apply_fn: Callable, variables, image_shape) -> Folded:
    """Every BatchNorm that only follows one layer becomes part of it; the network computes what it did, up to rounding.

    With k = scale / sqrt(variance + epsilon) a channel: kernel' = k kernel, shift = k (bias - mean) + the BatchNorm's bias.

    Raises:
      DvinvError: see `find_layers`.
    """
    layers = find_layers(apply_fn, variables, image_shape)
    flat = {path: np.array(leaf, np.float32) for path, leaf in flatten(variables).items()}
    uses = collections.Counter(layer.kernel for layer in layers)
    uses.update(layer.norm.mean for layer in layers if layer.norm)
    layers = tuple(
        dataclasses.replace(layer, norm=None)
        if layer.norm and max(uses[layer.kernel], uses[layer.norm.mean]) > 1  # each use would need weights of its own
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
    """Channels between two layers scaled such that all have a like share of the few values; computes what it did.

    Cross-layer equalisation (Nagel et al., arXiv 1906.04721, section 4.1) with s = sqrt(r1 / r2) a channel. There r1 and r2
    are the ranges of the weights before and after it. Here weights have a step an output channel, which makes r1 irrelevant,
    and the inputs of a layer one step for all channels; so r1 is the range of the channel, known from BatchNorm (its mean
    plus 3 deviations), and r2 that of the weights that meet it, as a share of each output's own. After a depthwise layer
    follows no compromise: s = r1.
    """
    flat, layers = flatten(network.weights), {layer.number: layer for layer in network.layers}
    uses = collections.Counter(layer.kernel for layer in network.layers)
    statistics, ceilings = dict(network.statistics), {}
    for layer in network.layers:
        after = layers.get(layer.feeds)
        if after is None or layer.norm is None or not layer.last or uses[after.kernel] > 1 or after.inputs is None:
            continue
        mean, deviation = statistics[str(layer.number)]
        kernel, shift = flat[after.kernel], -flat[layer.norm.mean]
        top = mean + shift + 3 * deviation
        alone = after.groups == len(top) == kernel.shape[after.outputs] and kernel.shape[after.inputs] == 1
        if not alone and (after.groups > 1 or kernel.shape[after.inputs] != len(top)):
            continue
        if alone:
            factor = np.ones_like(top)
        else:
            share = np.abs(kernel) / np.maximum(np.abs(kernel).max(after.contracted, keepdims=True), 1e-12)
            factor = share.max(tuple(axis for axis in range(kernel.ndim) if axis != after.inputs))
        live = (top > 1e-3 * top.max()) & (factor > 1e-3)  # a channel that is hardly used stays as it is
        s = np.where(live, (top / np.maximum(factor, 1e-3)), 1.0)
        s = np.where(live, np.clip(s / np.exp(np.log(s[live]).mean()), 1e-2, 1e2) if live.any() else 1.0, 1.0)
        s = (s if alone else np.sqrt(s)).astype(np.float32)
        flat[layer.kernel] = flat[layer.kernel] / _along(s, flat[layer.kernel], layer.outputs)
        flat[layer.norm.mean] = flat[layer.norm.mean] / s
        flat[after.kernel] = kernel * _along(s, kernel, after.outputs if alone else after.inputs)
        statistics[str(layer.number)] = (mean / s, deviation / s)
        ceilings |= {str(number): s for number in layer.ceilings}
    return dataclasses.replace(network, weights=unflatten(flat), statistics=statistics, ceilings=ceilings)


def corrected(network: Folded, whole: dict[str, np.ndarray], means: list[np.ndarray]) -> dict:
    """The weights of `network` whose shifts make up for what rounding does to the mean of every layer's result.

    With the error e = rounded kernel - kernel the mean moves by the sum of e E[x] (Nagel et al., section 4.2).

    Args:
      whole: {path of a kernel: it, rounded}.
      means: float32 [I] of each layer's input channels; `network.layers` in order.
    """
    flat = dict(flatten(network.weights))
    for layer, mean in zip(network.layers, means, strict=True):
        if layer.kernel not in whole or not (layer.norm or layer.bias) or None in (layer.inputs, layer.outputs):
            continue
        error = whole[layer.kernel] - flat[layer.kernel]
        error = error.sum(tuple(axis for axis in range(error.ndim) if axis not in (layer.inputs, layer.outputs)))
        error = error if layer.inputs < layer.outputs else error.T  # [I / groups, O]
        error = error.reshape(len(error), layer.groups, -1)
        moved = np.einsum('gi,igo->go', mean.reshape(layer.groups, -1), error).ravel()
        if layer.norm:
            flat[layer.norm.mean] = flat[layer.norm.mean] + moved
        else:
            flat[layer.bias] = flat[layer.bias] - moved
    return unflatten(flat)


def _along(values: np.ndarray, like: np.ndarray, axis: int) -> np.ndarray:
    """`values` [C] in the shape in which they are broadcast along one axis of `like`."""
    return values.reshape([-1 if index == axis else 1 for index in range(like.ndim)])
