"""Loading of the networks of a run, for use outside of it."""

import re
from collections.abc import Callable
from pathlib import Path

from dvinv.errors import DvinvError, listed
from dvinv.inversion import Teacher
from dvinv.inversion.modules import with_classes
from dvinv.networks import Classifier, load_classifier, load_network, module_of, shapes_of
from dvinv.networks.classifier import differing_shapes
from dvinv.networks.quantized.network import load_quantized
from dvinv.runtime.workdir import FINAL_NETWORKS, network_files, network_path, quantized_name
from dvinv.teacher.factories import network_of

# task -> a pattern for the names of its other network files: controls and intermediate steps
OTHERS = {
    'teacher': 'verifier',
    'distillation': r'student_of_\d+|(student|noise|prior_only|real)_after_\d+|noise|prior_only|real',
    'pruning': r'(untuned|magnitude|random|pruned_by_(noise|prior_only|real))(_\d+)?|pruned_\d+',
    'continual': r'(finetune|lwf_mc|replay|joint|deepinversion|always_be_dreaming)(_\d+)?|continual_\d+',
}


def load(workdir, task: str, setting: str = '', *, teacher: Classifier | None = None, module=None) -> tuple[Callable, dict]:
    """Loads a network that `task` wrote to `workdir`.

    The file itself, `workdir`/networks/NAME.safetensors, can be read with any safetensors library.

    Args:
      workdir: the work directory of the run.
      task: the name of the task.
      setting: the network to load. '': the result of the task; else a control, by its name in the config ('noise', 'real'),
        or a file in `workdir`/networks, by its stem ('verifier', 'student_after_6250', 'pruned_2'). For quantization, the
        bits, for instance 'w8a8'; '': those of the smallest file.
      teacher: the teacher that was quantized, needed only if it is a user's own network (teacher.factory) rather than one of
        dvinv.networks: the file has its weights in a few bits, but not its code.
      module: the network of a task other than quantization, if it is a user's own (teacher.factory, student.factory): a Flax
        module, Linen or NNX, or the function or class that returns it. For a pruned network this is the unpruned one. Its
        number of classes does not matter.

    Returns:
      (apply_fn, variables); `apply_fn(variables, x)` returns logits [B, K] of normalised images x [B, H, W, C] in eval mode.

    Raises:
      DvinvError: there is no such task or network (the message lists the existing ones), the task has not finished, or the
        file is damaged.
    """
    if task not in FINAL_NETWORKS:
        raise DvinvError(
            f'The task {task!r} makes no network; choose one of {", ".join(FINAL_NETWORKS)}, optionally with one of its '
            "controls, as in dvinv.load(workdir, 'distillation', 'noise')."
        )
    folder = Path(workdir)
    if task == 'quantization':
        network = load_quantized(_quantized(folder, setting), teacher)
        return network.apply_fn, network.variables
    path = network_path(folder, _other(folder, task, setting) or FINAL_NETWORKS[task])
    if task == 'teacher' and not setting and not path.exists():
        raise DvinvError(
            f'{workdir} has no teacher of its own: either the task teacher has not finished there, or the teacher came from '
            'elsewhere (teacher.weights, teacher.factory in config.json); dvinv.networks.read_classifier reads weights.'
        )
    network = load_classifier(path, module if module is None else _user_module(module, path))
    return network.apply_fn, network.variables


def _other(workdir: Path, task: str, setting: str) -> str:
    """Returns the file stem of one of the task's other networks; '' if `setting` selects the result of the task.

    Raises:
      DvinvError: there is no such file.
    """
    if setting in ('', FINAL_NETWORKS[task]):
        return ''
    others = {stem.removeprefix('pruned_by_'): stem for stem in network_files(workdir) if re.fullmatch(OTHERS[task], stem)}
    if not (stem := others.get(setting.removeprefix('pruned_by_'))):
        raise DvinvError(
            f'The task {task} has no network {setting!r} in {workdir}; besides its result, which is loaded without a name, '
            f'there are {", ".join(others) or "none"}.'
        )
    return stem


def _user_module(source, path: Path):
    """Returns the user's network with the number of classes of the file `path`.

    Raises:
      DvinvError: the names or shapes of the file's weights differ from those of the network.
    """
    variables, about = load_network(path)
    network = network_of(source, about['num_classes'], 'module')
    network = network.module if isinstance(network, Teacher) else network
    network = with_classes(network, about['image_shape'], about['num_classes'])
    expected = shapes_of(module_of(about, network), about['image_shape'])
    if differing := differing_shapes(expected, variables):
        raise DvinvError(
            f'{path} holds other weights than this module has: {listed(differing, 3)} differ; give the module that was '
            'trained.'
        )
    return network


def _quantized(workdir: Path, setting: str) -> Path:
    """Returns the file of a setting, or the smallest file if `setting` is ''.

    Raises:
      DvinvError: there is no such file.
    """
    prefix = quantized_name('')
    files = {stem.removeprefix(prefix): path for stem, path in network_files(workdir).items() if stem.startswith(prefix)}
    chosen = [path for bits, path in files.items() if setting in ('', bits)]
    if not chosen:
        raise DvinvError(
            f'{workdir} has no network quantized to {setting or "any setting"}; there are {", ".join(files) or "none"}, and '
            'the task quantization makes more.'
        )
    return min(chosen, key=lambda path: (path.stat().st_size, path.name))
