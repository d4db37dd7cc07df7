"""How a network is quantized: a group of the config, field for field."""

import dataclasses
import fnmatch
import re
from collections.abc import Sequence

from dvinv.errors import DvinvError, listed
from dvinv.networks.quantized.layers import Layer
from dvinv.networks.quantized.network import Bits
from dvinv.networks.quantized.ranges import METHODS

CONTROLS = ('noise', 'real')
SETTING = re.compile(r'w(\d+)a(\d+)')


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """How a network is quantized; a group of the config, field for field."""

    settings: tuple[str, ...] = ('w8a8', 'w6a6', 'w4a4')  # bits of weights and of layers' inputs
    distilled: tuple[str, ...] = ('w4a4',)  # those of them that learn from the float network, on the pool
    edge_bits: int = 8  # the first and the last layer have no fewer
    float_layers: tuple[str, ...] = ()  # patterns (*, ?) of layers that stay in float32
    images: int = 512  # of the pool (and of each control), to take ranges from; 0: none, ranges by BatchNorm's statistics
    ranges: str = 'mse'  # 'minmax', 'percentile' or 'mse' (of least squared error)
    equalise: bool = False  # channels between two layers are brought to a like range; see benchmarks/RESULTS.md
    correct: bool = True  # shifts make up for what rounding does to the means, known from BatchNorm's statistics
    controls: tuple[str, ...] = CONTROLS  # ranges taken from other images
    temperature: float = 3.0  # of the distillation

    def check(self) -> None:
        """Refuse settings that cannot be followed.

        Raises:
          DvinvError: names the field, its value and the choices.
        """
        if not self.settings:
            raise DvinvError("quantization.settings is (); name some, as in settings=('w8a8', 'w4a4').")
        for setting in self.settings:
            bits_of(setting)
        for field, choices in (('distilled', self.settings), ('controls', CONTROLS)):
            for name in getattr(self, field):
                if name not in choices:
                    raise DvinvError(f'quantization.{field} names {name!r}; choose among {", ".join(choices)}.')
        if not 2 <= self.edge_bits <= 8:
            raise DvinvError(f'quantization.edge_bits is {self.edge_bits}; it must be from 2 to 8.')
        if self.ranges not in METHODS:
            raise DvinvError(f'quantization.ranges is {self.ranges!r}; choose one of {", ".join(METHODS)}.')
        if self.images < 0:
            raise DvinvError(f'quantization.images is {self.images}; it must be at least 0.')
        if self.temperature <= 0:
            raise DvinvError(f'quantization.temperature is {self.temperature}; it must be above 0.')
        if not self.images and self.controls:
            raise DvinvError('quantization.images is 0, but quantization.controls names some; they need as many images.')

    def bits(self, setting: str, layers: Sequence[Layer]) -> list[Bits]:
        """Of each layer.

        Raises:
          DvinvError: a pattern of `float_layers` that no layer's name matches, or that leaves nothing to quantize.
        """
        names = [layer.name for layer in layers]
        for pattern in self.float_layers:
            if not fnmatch.filter(names, pattern):
                raise DvinvError(
                    f'quantization.float_layers names {pattern!r}, which matches no layer; there are {listed(names)}.'
                )
        weights, inputs = bits_of(setting)
        edges = (layers[0].kernel, layers[-1].kernel)
        bits = []
        for layer in layers:
            least = self.edge_bits if layer.kernel in edges else 0
            left = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in self.float_layers)
            bits.append(Bits(0, 0) if left else Bits(max(weights, least), max(inputs, least)))
        if not any(of.weights for of in bits):
            raise DvinvError(f'quantization.float_layers is {self.float_layers}, which is all layers; leave some out.')
        return bits


def bits_of(setting: str) -> tuple[int, int]:
    """Bits of weights and of layers' inputs: (4, 8) for 'w4a8'.

    Raises:
      DvinvError: no such setting, or bits outside of 2 to 8.
    """
    match = SETTING.fullmatch(setting) if isinstance(setting, str) else None
    if not match or not all(2 <= int(bits) <= 8 for bits in match.groups()):
        raise DvinvError(
            f'quantization.settings names {setting!r}; it must be like w4a8, with weights and activations of 2 to 8 bits.'
        )
    return int(match[1]), int(match[2])
