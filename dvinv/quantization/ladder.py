"""The rungs of quantization, scored: what ranges by BatchNorm's statistics, by the pool and by other images are worth."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dvinv.config import QuantizationSettings
from dvinv.data.dataset import RealData
from dvinv.evaluation.divergence import divergence
from dvinv.evaluation.scoring import among_top, logits_of, validate_fits
from dvinv.networks import Classifier
from dvinv.networks.quantized.folding import Folded
from dvinv.networks.quantized.network import Bits, quantize, simulated
from dvinv.networks.quantized.ranges import METHODS, Observation
from dvinv.quantization.bits import bits_of_layers


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A folded network, and what its layers were fed with: {source: a layer an `Observation`}.

    Sources are 'no_images', 'pool', 'noise' and 'real'.
    """

    network: Folded
    seen: dict[str, list[Observation]]

    def beside(self, source: str, seen: list[Observation]) -> 'Ladder':
        """The same with one more source."""
        return Ladder(self.network, {**self.seen, source: seen})

    def variables(self, bits: list[Bits], source: str, method: str, correct: bool) -> dict:
        """The quantized variables with ranges from a source that was observed."""
        means = [told.means for told in self.seen['no_images']] if correct else None
        return quantize(self.network, bits, self.seen[source], method, means)


class Scores:
    """Accuracies of networks on the real test images; None without real data.

    Attributes:
      float_accuracy: the float network's.
    """

    def __init__(self, teacher: Classifier, data: RealData | None):
        self._teacher, self._data = teacher, data
        if data is not None:
            validate_fits(teacher, data)
            self._float = logits_of(teacher, data.test.images)
            self._float_right = among_top(self._float, data.test.labels)
        self.float_accuracy = None if data is None else float(self._float_right.mean())

    def figures(self, network: Classifier) -> dict:
        """Accuracy, the share of images that it puts into the float network's class, the mean KL(float || it) of answers."""
        if self._data is None:
            return {'test_accuracy': None, 'test_agreement': None, 'test_kl': None}
        logits = logits_of(network, self._data.test.images)
        return {
            'test_accuracy': float(among_top(logits, self._data.test.labels).mean()),
            'test_agreement': float((logits.argmax(1) == self._float.argmax(1)).mean()),
            'test_kl': float(divergence(self._float, logits)),
        }

    def right(self, apply_fn: Callable, variables: dict) -> np.ndarray | None:
        """Whether a network like the teacher puts each image into its class; bool [N]."""
        if self._data is None:
            return None
        teacher = self._teacher
        pictures = teacher.image_shape, teacher.num_classes, teacher.mean, teacher.std
        network = Classifier(apply_fn, variables, *pictures)
        return among_top(logits_of(network, self._data.test.images), self._data.test.labels)


def rungs(settings: QuantizationSettings, scores: Scores, ladder: Ladder, plain: Ladder | None, setting: str) -> dict:
    """Figures of every way to calibrate `setting`, without learning.

    Args:
      plain: the same without equalisation; None: it is off.
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
    """How much more is right by the pool than by a control, image by image, with its standard error."""
    names = f'pool_minus_{control}', f'pool_minus_{control}_standard_error'
    if ours is None:
        return dict.fromkeys(names)
    difference = ours.astype(float) - theirs
    return dict(zip(names, (float(difference.mean()), float(difference.std() / len(difference) ** 0.5)), strict=True))
