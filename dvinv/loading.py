"""Networks that a run made, for use elsewhere."""

from collections.abc import Callable
from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.networks import Classifier, load_classifier
from dvinv.networks.quantized.network import load_quantized

# task -> the network file that it ends with
RESULTS = {
    'teacher': 'teacher',
    'distillation': 'student',
    'pruning': 'pruned',
    'continual': 'continual',
    'quantization': 'quantized_',  # and the setting
}


def load(workdir, task: str, setting: str = '', *, teacher: Classifier | None = None) -> tuple[Callable, dict]:
    """(apply_fn, variables) of the network that `task` made in `workdir`.

    `apply_fn(variables, x)` gives logits [B, K] of normalised images x [B, H, W, C], in eval mode. The file itself,
    `workdir`/networks/NAME.safetensors, is readable wherever safetensors is.

    Args:
      setting: of the task quantization, for instance 'w8a8'; '': the one whose file is smallest.
      teacher: that was quantized, where it is a user's own network (teacher.factory) instead of one of dvinv.networks: the
        file has its weights in few bits, but not its program. Not needed otherwise.

    Raises:
      DvinvError: no such task, or it has not finished there, or the file is damaged.
    """
    if task not in RESULTS:
        raise DvinvError(f'The task {task!r} makes no network; choose one of {", ".join(RESULTS)}.')
    if task == 'quantization':
        network = load_quantized(_quantized(Path(workdir) / 'networks', setting), teacher)
        return network.apply_fn, network.variables
    path = Path(workdir) / 'networks' / f'{RESULTS[task]}.safetensors'
    if task == 'teacher' and not path.exists():
        raise DvinvError(
            f'{workdir} has no teacher of its own: either the task teacher has not finished there, or the teacher came from '
            'elsewhere (teacher.weights, teacher.factory in config.json); dvinv.networks.read_classifier reads weights.'
        )
    network = load_classifier(path)
    return network.apply_fn, network.variables


def _quantized(folder: Path, setting: str) -> Path:
    """The file of a setting, or the smallest of all."""
    files = sorted(folder.glob(f'quantized_{setting or "*"}.safetensors'), key=lambda path: (path.stat().st_size, path.name))
    if not files:
        there = sorted(path.stem.removeprefix('quantized_') for path in folder.glob('quantized_*.safetensors'))
        raise DvinvError(
            f'{folder} has no network quantized to {setting or "any setting"}; there are {", ".join(there) or "none"}, and '
            'the task quantization makes more.'
        )
    return files[0]
