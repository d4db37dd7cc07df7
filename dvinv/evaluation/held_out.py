"""Evaluation without data: networks are compared with the teacher on a part of the pool that no network is trained on.

The images of a pool are made in rounds, and the last images of every round are held out. The same holds for the pools of the
controls, so that all networks that are compared are trained on equally many images. If there are real test images, networks
are scored on these, and nothing is held out.
"""

from typing import Any

import numpy as np

from dvinv.config import Settings
from dvinv.data.pool import ImagePool
from dvinv.data.rows import Chosen, RowArray
from dvinv.evaluation.divergence import divergence
from dvinv.evaluation.scoring import logits_of
from dvinv.networks import Classifier
from dvinv.runtime import preemption

FIGURES = ('held_out_agreement', 'held_out_kl', 'held_out_class_agreement')


def training_rows(settings: Settings, array: RowArray) -> RowArray:
    """Returns the rows of a pool's array that networks are trained on; the array may cover only the rounds made so far."""
    training, held_out = _parts(settings, len(array))
    return Chosen(array, training) if len(held_out) else array


def training_set(settings: Settings, pool: ImagePool) -> tuple[RowArray, RowArray]:
    """Returns the images and labels of a pool that networks are trained on, see `training_rows`."""
    return training_rows(settings, pool.rows('images')), training_rows(settings, pool.rows('labels'))


def _parts(settings: Settings, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers of the training images of a pool and those of the held-out images, both ascending."""
    round_size = count if settings.pool else settings.round_images  # an existing pool is a single round
    rows = np.arange(count)
    is_held_out = rows % round_size >= round_size - settings.held_out_of(round_size)
    return rows[~is_held_out], rows[is_held_out]


class HeldOut:
    """The held-out images of a pool, and the teacher's logits for them.

    Attributes:
      count: the number of held-out images.
    """

    def __init__(self, settings: Settings, teacher: Classifier, pool: ImagePool):
        """Runs the teacher on the held-out images of `pool`."""
        images, labels = pool.rows('images'), pool.rows('labels')
        _, rows = _parts(settings, len(labels))
        self.count, self._classes = len(rows), teacher.num_classes
        if self.count:
            preemption.leave_if_asked()
            self._images, self._labels = images[rows], labels[rows]
            self._teacher_logits = logits_of(teacher, self._images)

    def beside(self, networks: dict[str, Classifier], main: str) -> dict:
        """Returns the `figures` of all networks, prefixed by their names except for that of `main`; {} without images."""
        if not self.count:
            return {}
        results: dict[str, Any] = {'held_out_images': self.count}
        for network_name, network in networks.items():
            prefix = '' if network_name == main else f'{network_name}_'
            results |= {f'{prefix}{name}': value for name, value in self.figures(network).items()}
        return results

    def figures(self, network: Classifier) -> dict:
        """Computes how closely `network` agrees with the teacher on the held-out images.

        Returns:
          A dict with 'held_out_agreement', the fraction of images that both assign the same class; 'held_out_kl', the mean
          of KL(teacher || network) in nats; and 'held_out_class_agreement', the agreement for each class of the labels, None
          for a class without images.
        """
        logits = logits_of(network, self._images)
        agrees = logits.argmax(1) == self._teacher_logits.argmax(1)
        by_class = [agrees[self._labels == label] for label in range(self._classes)]
        class_agreement = [float(part.mean()) if len(part) else None for part in by_class]
        kl = float(divergence(self._teacher_logits, logits))
        return dict(zip(FIGURES, (float(agrees.mean()), kl, class_agreement), strict=True))
