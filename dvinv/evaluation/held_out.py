"""Scores without data: a part of the pool that no network learns from, on which networks are compared with the teacher.

Images of a pool come in rounds, and the last ones of every round are held out, of the lesser methods' pools as well, so that
all that are compared learn from as many. Where there are real test images, networks are scored on these, and nothing is held
out.
"""

import numpy as np

from dvinv.config import Settings
from dvinv.data.chosen import Chosen
from dvinv.data.pool import ImagePool
from dvinv.evaluation.divergence import divergence
from dvinv.evaluation.scoring import logits_of
from dvinv.networks import Classifier
from dvinv.runtime import preemption

FIGURES = ('held_out_agreement', 'held_out_kl', 'held_out_class_agreement')


def training_rows(settings: Settings, array):
    """Returns the rows of a pool's array (all of it, or of the rounds that there are) that networks learn from."""
    first, held = _parts(settings, len(array))
    return Chosen(array, first) if len(held) else array


def _parts(settings: Settings, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the images of a pool that are learned from, and of those that are held out, ascending."""
    size = count if settings.pool else settings.round_images  # an existing pool comes in one round
    held = settings.held_out_of(size)
    rows = np.arange(count)
    last = rows % size >= size - held
    return rows[~last], rows[last]


class HeldOut:
    """The images of a pool that nothing learns from, and the teacher's answers to them.

    Attributes:
      count: how many there are.
    """

    def __init__(self, settings: Settings, teacher: Classifier, pool: ImagePool):
        """Runs the teacher on them."""
        images, labels = pool.rows('images'), pool.rows('labels')
        _, rows = _parts(settings, len(labels))
        self.count, self._classes = len(rows), teacher.num_classes
        if self.count:
            preemption.leave_if_asked()
            self._images, self._labels = images[rows], labels[rows]
            self._answers = logits_of(teacher, self._images)

    def beside(self, networks: dict[str, Classifier], main: str) -> dict:
        """Returns the `figures` of all networks, with the name of each before them but for `main`; {} without images."""
        if not self.count:
            return {}
        compared = {'' if name == main else f'{name}_': self.figures(network) for name, network in networks.items()}
        found = {f'{prefix}{name}': value for prefix, figures in compared.items() for name, value in figures.items()}
        return {'held_out_images': self.count, **found}

    def figures(self, network: Classifier) -> dict:
        """Returns how near `network` comes to the teacher.

        Returns:
          'held_out_agreement', the share of images that both put into one class; 'held_out_kl', the mean of KL(teacher ||
          network) in nats; 'held_out_class_agreement', the share for each class of the labels, None where it has no image.
        """
        logits = logits_of(network, self._images)
        same = logits.argmax(1) == self._answers.argmax(1)
        by_class = [same[self._labels == label] for label in range(self._classes)]
        shares = [float(part.mean()) if len(part) else None for part in by_class]
        return dict(zip(FIGURES, (float(same.mean()), float(divergence(self._answers, logits)), shares), strict=True))
