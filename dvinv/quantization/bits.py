"""The number of bits of each layer of a network."""

import fnmatch
from collections.abc import Sequence

from dvinv.config import QuantizationSettings, bits_of
from dvinv.errors import DvinvError, listed
from dvinv.networks.quantized.layers import Layer
from dvinv.networks.quantized.network import Bits


def bits_of_layers(settings: QuantizationSettings, setting: str, layers: Sequence[Layer]) -> list[Bits]:
    """Returns the bits of weights and inputs of each layer.

    Args:
      setting: the bits of weights and inputs, for instance 'w8a8'.
      layers: the layers of the network.

    Raises:
      DvinvError: a pattern of `float_layers` matches no layer, or the patterns match all layers.
    """
    names = [layer.name for layer in layers]
    for pattern in settings.float_layers:
        if not fnmatch.filter(names, pattern):
            raise DvinvError(
                f'quantization.float_layers names {pattern!r}, which matches no layer; the layers are {listed(names)}.'
            )
    weights, inputs = bits_of(setting)
    edges = (layers[0].kernel, layers[-1].kernel)
    bits = []
    for layer in layers:
        least = settings.edge_bits if layer.kernel in edges else 0
        is_float = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in settings.float_layers)
        bits.append(Bits(0, 0) if is_float else Bits(max(weights, least), max(inputs, least)))
    if not any(layer_bits.weights for layer_bits in bits):
        raise DvinvError(f'quantization.float_layers is {settings.float_layers}, which matches all layers; leave some out.')
    return bits
