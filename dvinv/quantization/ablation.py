"""The ablation of quantization: scores with ranges from BatchNorm statistics, from the pool and from other images."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dvinv.config import QuantizationSettings
from dvinv.data.dataset import RealData
from dvinv.evaluation.divergence import divergence
from dvinv.evaluation.scoring import among_top, logits_of, top_accuracy, validate_fits
from dvinv.networks import Classifier
from dvinv.networks.quantized.calibration import METHODS, Calibration
from dvinv.networks.quantized.folding import Folded
from dvinv.networks.quantized.layers import with_token_ranges
from dvinv.networks.quantized.network import Bits, quantize, simulated
from dvinv.quantization.bits import bits_of_layers


@dataclasses.dataclass(frozen=True)
class CalibratedNetwork:
    """A folded network and the calibration data of its layers.

    Attributes:
      network: the network.
      inputs: {source: one `Calibration` per layer}; sources are 'no_images', 'pool', 'noise' and 'real'.
    """

    network: Folded
    inputs: dict[str, list[Calibration]]

    def with_source(self, source: str, inputs: list[Calibration]) -> 'CalibratedNetwork':
        """Returns a copy with one more source."""
        return CalibratedNetwork(self.network, {**self.inputs, source: inputs})

    def variables(self, bits: list[Bits], source: str, method: str, correct: bool) -> dict:
        """Returns the quantized variables with ranges from one source, and with bias correction if `correct`.

        The means for bias correction are those of BatchNorm's statistics, or of the source for a network without any.
        """
        source_of_means = 'no_images' if self.network.statistics else source
        means = [layer.means for layer in self.inputs[source_of_means]] if correct else None
        return quantize(self.network, bits, self.inputs[source], method, means)


class Scores:
    """Scores networks on the real test images; all scores are None without real data.

    Attributes:
      float_accuracy: the accuracy of the float network.
    """

    def __init__(self, teacher: Classifier, data: RealData | None):
        self._teacher, self._data = teacher, data
        if data is not None:
            validate_fits(teacher, data)
            self._float = logits_of(teacher, data.test.images)
            self._float_right = among_top(self._float, data.test.labels)
        self.float_accuracy = None if data is None else float(self._float_right.mean())

    def figures(self, network: Classifier) -> dict:
        """Returns the accuracy, the agreement with the float network, and the mean KL(float || quantized).

        The agreement is the share of images for which both networks predict the same class.
        """
        if self._data is None:
            return {'test_accuracy': None, 'test_agreement': None, 'test_kl': None}
        logits = logits_of(network, self._data.test.images)
        return {
            'test_accuracy': top_accuracy(logits, self._data.test.labels),
            'test_agreement': float((logits.argmax(1) == self._float.argmax(1)).mean()),
            'test_kl': float(divergence(self._float, logits)),
        }

    def right(self, apply_fn: Callable, variables: dict) -> np.ndarray | None:
        """Returns whether a network with the teacher's inputs and classes classifies each image correctly, bool [N]."""
        if self._data is None:
            return None
        teacher = self._teacher
        network = Classifier(apply_fn, variables, teacher.image_shape, teacher.num_classes, teacher.mean, teacher.std)
        return among_top(logits_of(network, self._data.test.images), self._data.test.labels)


def source_and_method(settings: QuantizationSettings) -> tuple[str, str]:
    """Returns the source of the ranges and the method to estimate them that the settings ask for."""
    return ('pool' if settings.images else 'no_images'), settings.ranges


def ablation(
    settings: QuantizationSettings,
    scores: Scores,
    calibration: CalibratedNetwork,
    plain: CalibratedNetwork | None,
    setting: str,
) -> dict:
    """Returns the figures of every way to calibrate `setting`, without training.

    Args:
      calibration: the calibration data of the folded network.
      plain: the same without equalisation; None: equalisation is off.
      setting: the bits of weights and inputs, for instance 'w8a8'.
    """
    bits, chosen = bits_of_layers(settings, setting, calibration.network.layers), source_and_method(settings)
    ways: dict[str, tuple[str, str]] = {'no_images': ('no_images', settings.ranges)}
    if settings.images:
        ways |= {method: ('pool', method) for method in METHODS}
    ways |= {control: (control, settings.ranges) for control in settings.controls}
    apply_fn = simulated(calibration.network.apply_fn, calibration.network.layers)
    right = {name: scores.right(apply_fn, calibration.variables(bits, *way, settings.correct)) for name, way in ways.items()}
    right['uncorrected'] = scores.right(apply_fn, calibration.variables(bits, *chosen, False))
    layers = calibration.network.layers
    if any(layer.tokens for layer in layers):
        variables = calibration.variables(bits, *chosen, settings.correct)
        for name, kernels in (('per_layer', ()), ('per_token', None)):
            right[name] = scores.right(
                simulated(calibration.network.apply_fn, with_token_ranges(layers, kernels)), variables
            )
    if plain:
        right['unequalised'] = scores.right(apply_fn, plain.variables(bits, *chosen, settings.correct))
    figures = {f'{name}_test_accuracy': None if mask is None else float(mask.mean()) for name, mask in right.items()}
    for control in settings.controls:
        figures |= _difference(control, right[settings.ranges], right[control])
    return figures


def _difference(control: str, pool_right: np.ndarray | None, control_right: np.ndarray | None) -> dict:
    """Returns the accuracy with the pool minus that with a control, paired by image, and its standard error.

    Args:
      control: the name of the control.
      pool_right, control_right: whether each image is classified correctly, bool [N]; None without real data.
    """
    names = f'pool_minus_{control}', f'pool_minus_{control}_standard_error'
    if pool_right is None or control_right is None:
        return dict.fromkeys(names)
    difference = pool_right.astype(float) - control_right
    return dict(zip(names, (float(difference.mean()), float(difference.std() / len(difference) ** 0.5)), strict=True))
