"""The accuracy matrix of networks that were trained on a sequence of tasks, and the figures derived from it."""

import statistics

import numpy as np

from dvinv.continual.chains import MAIN
from dvinv.continual.stream import Step, test_images
from dvinv.data.dataset import Split
from dvinv.evaluation.scoring import logits_of
from dvinv.inversion import Teacher
from dvinv.pipeline.run import Run


def figures(run: Run, steps: list[Step], learned: dict[str, list[Teacher | None]]) -> dict:
    """Computes the scores of the networks on the real test images of all tasks that they have learned.

    Figures of a control have its name as a prefix; those of the run's own network have no prefix.

    Args:
      steps: the tasks.
      learned: {chain: the network after each task}; None for unknown ones.
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
    """Counts the images of each task that `network` classifies correctly among all of its classes."""
    images, labels = (np.concatenate([getattr(test, field) for test in tests]) for field in ('images', 'labels'))
    right = logits_of(network, images).argmax(1) == labels
    ends = np.cumsum([len(test.labels) for test in tests])
    return [int(part.sum()) for part in np.split(right, ends[:-1])]


def forgetting(matrix: list[list[float] | None]) -> float | None:
    """Computes forgetting: the best earlier accuracy on a task minus the last one (Chaudhry et al., arXiv 1801.10112).

    Args:
      matrix: [task learned][task tested] accuracies, for tested tasks up to the one learned; None for unknown rows.

    Returns:
      The mean over all tasks but the last; None if there are unknown rows before the last.
    """
    *earlier, last = matrix
    if not all(earlier):
        return None
    return statistics.fmean(max(row[task] for row in earlier[task:]) - last[task] for task in range(len(earlier)))
