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
from dvinv.networks.quantized.network import Bits, quantize, simulated
from dvinv.quantization.bits import bits_of_layers


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A folded network and the calibration data of its layers: {source: one `Calibration` per layer}.

    Sources are 'no_images', 'pool', 'noise' and 'real'.
    """

    network: Folded
    seen: dict[str, list[Calibration]]

    def beside(self, source: str, seen: list[Calibration]) -> 'Ladder':
        """Returns a copy with one more source."""
        return Ladder(self.network, {**self.seen, source: seen})

    def variables(self, bits: list[Bits], source: str, method: str, correct: bool) -> dict:
        """Returns the quantized variables with ranges from one source, and with bias correction if `correct`."""
        means = [told.means for told in self.seen['no_images']] if correct else None
        return quantize(self.network, bits, self.seen[source], method, means)


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
        pictures = teacher.image_shape, teacher.num_classes, teacher.mean, teacher.std
        network = Classifier(apply_fn, variables, *pictures)
        return among_top(logits_of(network, self._data.test.images), self._data.test.labels)


def rungs(settings: QuantizationSettings, scores: Scores, ladder: Ladder, plain: Ladder | None, setting: str) -> dict:
    """Returns the figures of every way to calibrate `setting`, without training.

    Args:
      ladder: the calibration data of the folded network.
      plain: the same without equalisation; None: equalisation is off.
      setting: the bits of weights and inputs, for instance 'w8a8'.
    """
    bits, source = bits_of_layers(settings, setting, ladder.network.layers), 'pool' if settings.images else 'no_images'
    ways = {'no_images': ('no_images', settings.ranges)}
    if settings.images:
        ways |= {method: ('pool', method) for method in METHODS}
    ways |= {control: (control, settings.ranges) for control in settings.controls}
    apply_fn = simulated(ladder.network.apply_fn, ladder.network.layers)
    right = {
        name: scores.right(apply_fn, ladder.variables(bits, seen, method, settings.correct))
        for name, (seen, method) in ways.items()
    }
    right['uncorrected'] = scores.right(apply_fn, ladder.variables(bits, source, settings.ranges, False))
    if plain:
        right['unequalised'] = scores.right(apply_fn, plain.variables(bits, source, settings.ranges, settings.correct))
    figures = {f'{name}_test_accuracy': None if of is None else float(of.mean()) for name, of in right.items()}
    for control in settings.controls:
        figures |= _difference(control, right[settings.ranges], right[control])
    return figures


def _difference(control: str, ours: np.ndarray | None, theirs: np.ndarray | None) -> dict:
    """Returns the accuracy with the pool minus that with a control, paired by image, and its standard error."""
    names = f'pool_minus_{control}', f'pool_minus_{control}_standard_error'
    if ours is None:
        return dict.fromkeys(names)
    difference = ours.astype(float) - theirs
    return dict(zip(names, (float(difference.mean()), float(difference.std() / len(difference) ** 0.5)), strict=True))
