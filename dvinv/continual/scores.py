"""What networks that learned task after task have kept: the accuracy matrix, and the figures that follow from it."""

import statistics

import numpy as np

from dvinv.continual.chains import MAIN
from dvinv.continual.stream import Step, test_images
from dvinv.data.dataset import Split
from dvinv.evaluation.scoring import logits_of
from dvinv.inversion import Teacher
from dvinv.pipeline.run import Run


def figures(run: Run, steps: list[Step], learned: dict[str, list[Teacher | None]]) -> dict:
    """Returns what the networks score on the real test images of all tasks that they have learned.

    Names without a control's in front are the run's own network's.
    """
    tests = [test_images(run, step) for step in steps]
    sizes = [len(test.labels) for test in tests]
    found = {}
    matrices = {}
    for chain, networks in learned.items():
        rights = [network and _rights(network, tests[: task + 1]) for task, network in enumerate(networks)]
        matrices[chain] = [row and [right / size for right, size in zip(row, sizes, strict=False)] for row in rights]
        prefix = '' if chain == MAIN else f'{chain}_'
        last = rights[-1]
        found |= {
            f'{prefix}test_accuracy': sum(last) / sum(sizes),
            f'{prefix}old_test_accuracy': sum(last[:-1]) / sum(sizes[:-1]),
            f'{prefix}new_test_accuracy': last[-1] / sizes[-1],
            f'{prefix}average_accuracy': statistics.fmean(matrices[chain][-1]),
            f'{prefix}forgetting': forgetting(matrices[chain]),
        }
        if chain == MAIN:
            found['old_test_accuracy_before'] = sum(rights[-2]) / sum(sizes[:-1])
    for control in ('finetune', 'replay'):
        found.setdefault(f'{control}_test_accuracy', None)
    return {**found, 'test_images': sum(sizes), 'accuracy_matrix': matrices}


def _rights(network: Teacher, tests: list[Split]) -> list[int]:
    """How many images of each task `network` puts into their class, among all classes that it knows."""
    images, labels = (np.concatenate([getattr(test, field) for test in tests]) for field in ('images', 'labels'))
    right = logits_of(network, images).argmax(1) == labels
    ends = np.cumsum([len(test.labels) for test in tests])
    return [int(part.sum()) for part in np.split(right, ends[:-1])]


def forgetting(matrix: list[list[float] | None]) -> float | None:
    """Mean over all tasks but the last of the best earlier accuracy less the last one (Chaudhry et al., arXiv 1801.10112).

    Args:
      matrix: [task learned][task tested] accuracies, of a task from its own row on. None where rows are unknown.
    """
    *earlier, last = matrix
    if not all(earlier):
        return None
    return statistics.fmean(max(row[task] for row in earlier[task:]) - last[task] for task in range(len(earlier)))
