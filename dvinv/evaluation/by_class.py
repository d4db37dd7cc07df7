"""Compares the networks of a run class by class on real test images: accuracies, and differences from the teacher.

The figures are written to by_class.json; `report.classes` shows them as tables and matrices.
"""

import numpy as np

from dvinv.data.dataset import Split
from dvinv.evaluation.quality import evenly
from dvinv.evaluation.scoring import logits_of
from dvinv.networks import Classifier

MOST_TEST_IMAGES = 5_000  # maximum number of test images, evenly spaced


def compare(teacher: Classifier, networks: dict[str, Classifier], test: Split) -> dict:
    """Computes accuracies by class, and confusion counts between the teacher and each network.

    Args:
      teacher: the network that the others are compared with.
      networks: {name: network}, with the classes of the teacher.
      test: real images; at most `MOST_TEST_IMAGES` are scored.

    Returns:
      A dict with these entries:
        'images': the number of scored images;
        'classes': the labels that occur among them, ascending;
        'test_images': the number of images of each of these classes;
        'accuracy': {name: list of accuracies, one per class}, including 'teacher';
        'confusion': {name: list of [class by the teacher, class by the network, number of images]}, most frequent first.
    """
    rows = evenly(len(test.labels), MOST_TEST_IMAGES)
    images, labels = test.images[rows], np.asarray(test.labels[rows])
    answers = {name: logits_of(network, images).argmax(1) for name, network in {'teacher': teacher, **networks}.items()}
    classes, counts = np.unique(labels, return_counts=True)
    return {
        'images': len(labels),
        'classes': classes.tolist(),
        'test_images': counts.tolist(),
        'accuracy': {
            name: [float((answer[labels == label] == label).mean()) for label in classes] for name, answer in answers.items()
        },
        'confusion': {name: _pairs(answers['teacher'], answers[name]) for name in networks},
    }


def _pairs(first: np.ndarray, second: np.ndarray) -> list[list[int]]:
    pairs, counts = np.unique(np.stack([first, second], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return [[*pairs[i].tolist(), int(counts[i])] for i in order]
