"""Networks that a run made, for use elsewhere."""

from collections.abc import Callable
from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.networks import load_classifier

# task -> the network file that it ends with
RESULTS = {'teacher': 'teacher', 'distillation': 'student', 'pruning': 'pruned', 'continual': 'continual'}


def load(workdir, task: str) -> tuple[Callable, dict]:
    """(apply_fn, variables) of the network that `task` made in `workdir`.

    `apply_fn(variables, x)` gives logits [B, K] of normalised images x [B, H, W, C], in eval mode. The file itself,
    `workdir`/networks/NAME.safetensors, is readable wherever safetensors is.

    Raises:
      DvinvError: no such task, or it has not finished there, or the file is damaged.
    """
    if task not in RESULTS:
        raise DvinvError(f'The task {task!r} makes no network; choose one of {", ".join(RESULTS)}.')
    path = Path(workdir) / 'networks' / f'{RESULTS[task]}.safetensors'
    if task == 'teacher' and not path.exists():
        raise DvinvError(
            f'{workdir} has no teacher of its own: either the task teacher has not finished there, or the teacher came from '
            'elsewhere (teacher.weights, teacher.factory in config.json); dvinv.networks.read_classifier reads weights.'
        )
    network = load_classifier(path)
    return network.apply_fn, network.variables
