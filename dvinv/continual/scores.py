"""The accuracy matrix of networks that were trained on a sequence of tasks, and the figures derived from it."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from dvinv.continual.chains import MAIN
from dvinv.continual.stream import Step, test_images
from dvinv.data.dataset import Split
from dvinv.evaluation.scoring import logits_of
from dvinv.inversion import Teacher
from dvinv.pipeline.run import Run


def figures(run: Run, steps: list[Step], networks: Mapping[str, Sequence[Teacher | None]]) -> dict:
    """Computes the scores of the networks on the real test images of all tasks that they have learned.

    Figures of a control have its name as a prefix; those of the run's own network have no prefix.

    Args:
      steps: the tasks.
      networks: {chain: the network after each task}; None for unknown ones, but never after the last task.
    """
    tests = [test_images(run, step) for step in steps]
    sizes = [len(test.labels) for test in tests]
    scores: dict[str, float | None] = {}
    matrices = {}
    for chain, after_task in networks.items():
        counts = [_correct(network, tests[: task + 1]) if network else [] for task, network in enumerate(after_task)]
        matrix = [[count / size for count, size in zip(row, sizes, strict=False)] or None for row in counts]
        prefix = '' if chain == MAIN else f'{chain}_'
        last = counts[-1]
        scores |= {
            f'{prefix}test_accuracy': sum(last) / sum(sizes),
            f'{prefix}old_test_accuracy': sum(last[:-1]) / sum(sizes[:-1]),
            f'{prefix}new_test_accuracy': last[-1] / sizes[-1],
            f'{prefix}average_accuracy': statistics.fmean(count / size for count, size in zip(last, sizes, strict=True)),
            f'{prefix}forgetting': forgetting(matrix),
        }
        if chain == MAIN:
            scores['old_test_accuracy_before'] = sum(counts[-2]) / sum(sizes[:-1])
        matrices[chain] = matrix
    for control in ('finetune', 'replay'):
        scores.setdefault(f'{control}_test_accuracy', None)
    return {**scores, 'test_images': sum(sizes), 'accuracy_matrix': matrices}


def _correct(network: Teacher, tests: list[Split]) -> list[int]:
    """Counts the images of each task that `network` classifies correctly among all of its classes."""
    images, labels = (np.concatenate([getattr(test, field) for test in tests]) for field in ('images', 'labels'))
    correct = logits_of(network, images).argmax(1) == labels
    ends = np.cumsum([len(test.labels) for test in tests])
    return [int(part.sum()) for part in np.split(correct, ends[:-1])]


def forgetting(matrix: Sequence[list[float] | None]) -> float | None:
    """Computes forgetting: the best earlier accuracy on a task minus the last one (Chaudhry et al., arXiv 1801.10112).

    Args:
      matrix: [task learned][task tested] accuracies, for tested tasks up to the one learned; None for unknown rows.

    Returns:
      The mean over all tasks but the last; None if there are unknown rows.
    """
    known = [row for row in matrix if row]
    if len(known) < len(matrix):
        return None
    *earlier, last = known
    return statistics.fmean(max(row[task] for row in earlier[task:]) - last[task] for task in range(len(earlier)))
