"""Networks that a run made, for use elsewhere."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.inversion import Teacher
from dvinv.inversion.modules import with_classes
from dvinv.networks import Classifier, load_classifier, load_network, module_of, shapes_of
from dvinv.networks.classifier import flatten
from dvinv.networks.quantized.network import load_quantized
from dvinv.teacher.factories import network_of

# task -> the network file that it ends with
RESULTS = {
    'teacher': 'teacher',
    'distillation': 'student',
    'pruning': 'pruned',
    'continual': 'continual',
    'quantization': 'quantized_',  # and the setting
}


def load(workdir, task: str, setting: str = '', *, teacher: Classifier | None = None, module=None) -> tuple[Callable, dict]:
    """(apply_fn, variables) of the network that `task` made in `workdir`.

    `apply_fn(variables, x)` gives logits [B, K] of normalised images x [B, H, W, C], in eval mode. The file itself,
    `workdir`/networks/NAME.safetensors, is readable wherever safetensors is.

    Args:
      setting: of the task quantization, for instance 'w8a8'; '': the one whose file is smallest.
      teacher: that was quantized, where it is a user's own network (teacher.factory) instead of one of dvinv.networks: the
        file has its weights in few bits, but not its program. Not needed otherwise.
      module: the network of other tasks, where it is a user's own (teacher.factory, student.factory): a Flax module, Linen
        or NNX, or the function or class that gives it; the whole one of a pruned network, and with any number of classes.

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
    network = load_classifier(path, module if module is None else _own(module, path))
    return network.apply_fn, network.variables


def _own(source, path: Path):
    """Returns the user's network of the file `path`, with as many classes."""
    variables, about = load_network(path)
    network = network_of(source, about['num_classes'], 'module')
    network = network.module if isinstance(network, Teacher) else network
    whole = with_classes(network, about['image_shape'], about['num_classes'])
    expected = shapes_of(module_of(about, whole), about['image_shape'])
    ours, theirs = ({name: np.shape(leaf) for name, leaf in flatten(tree).items()} for tree in (expected, variables))
    if differing := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise DvinvError(f'{path} holds other weights than this module has: {listed(differing, 3)} differ; give its own.')
    return whole


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
