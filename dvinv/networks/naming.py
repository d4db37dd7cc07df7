"""The variables of Flax networks: names and layouts in PyTorch, Keras and Gluon (MXNet), and reuse in other networks.

Flax       params/layer1_0/conv1/kernel    batch_stats/layer1_0/bn1/mean
PyTorch    layer1.0.conv1.weight           layer1.0.bn1.running_mean
Keras      layer1_0/conv1/kernel           layer1_0/bn1/moving_mean
Gluon      resnet0_layer1_0_conv1_weight   resnet0_layer1_0_bn1_running_mean
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import flax.linen as nn
import numpy as np

from dvinv.networks.classifier import flatten, join_names, shapes_of, unflatten
from dvinv.runtime.errors import DvinvError, listed

# {name of a leaf in Flax: its name or names in the other framework}; other leaves have the same name everywhere. Keras has
# two names for a kernel, and other names for the variables of normalisation layers.
PYTORCH = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
KERAS = {'kernel': ('kernel', 'depthwise_kernel'), 'bias': ('bias',)}
KERAS_BATCH_NORM = {'scale': ('gamma',), 'bias': ('beta',), 'mean': ('moving_mean',), 'var': ('moving_variance',)}
GLUON = {'kernel': ('weight',), 'bias': ('bias',)}
GLUON_BATCH_NORM = {'scale': ('gamma',), 'bias': ('beta',), 'mean': ('running_mean',), 'var': ('running_var',)}
# 'squeezenet0_conv0_weight': the network's name comes first, with a number that depends on the process that saved it.
GLUON_KEY = re.compile(r'([a-z]+\d+_)\w+_(weight|bias|gamma|beta|running_mean|running_var)')
# Modules that PyTorch wraps around another: for several devices, for compilation, for recomputation.
WRAPPERS = {'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
AVERAGED = re.compile(r'(^|[._])(ema|averaged?|shadow|swa)([._]|$)')  # matches the name of a copy with averaged weights
NUMBERED = re.compile(r'(.*?)(\d+)')


def find_keys(
    paths: Collection[str],
    keys: Collection[str],
    aliases: Mapping[str, str] | Sequence[Mapping[str, str]],
    counted: bool = True,
) -> dict[str, str]:
    """Returns {path: key in the file}; a key that is not among `keys` is spelled in the way that most of the others are.

    Args:
      paths: the paths of a network's variables in Flax.
      keys: the keys of a file; those of Keras have slashes, those of PyTorch have dots, those of Gluon have neither and one
        prefix.
      aliases: {name of a submodule, its full path with dots, or the full name of a variable: its name in other PyTorch
        repositories}; for several repositories, one such mapping each.
      counted: whether '_1' in the name of a submodule is an index in a list, which PyTorch spells '.1'.
    """
    keras, prefix = any('/' in key for key in keys), _gluon_prefix(keys)
    if keras:
        spellings = {path: _layer_keys(path, paths, '/', KERAS, KERAS_BATCH_NORM) for path in paths}
    elif prefix:
        names = {path: _layer_keys(path, paths, '_', GLUON, GLUON_BATCH_NORM) for path in paths}
        spellings = {path: [prefix + key for key in candidates] for path, candidates in names.items()}
    else:
        repositories = (aliases,) if isinstance(aliases, Mapping) else aliases
        spellings = {path: _torch_keys(path, repositories, counted) for path in paths}
        counts = [sum(key in keys for key in spelled) for spelled in zip(*spellings.values(), strict=True)]
        usual = counts.index(max(counts))
        spellings = {path: [candidates[usual], *candidates] for path, candidates in spellings.items()}
    return {path: next((key for key in candidates if key in keys), candidates[0]) for path, candidates in spellings.items()}


def nested_names(modules: Iterable[tuple[str, str]], parts: Mapping[str, str]) -> dict[str, str]:
    """Returns {name: name elsewhere} of the same parts in several modules, for the `aliases` of a network.

    Args:
      modules: (name of a module, its name elsewhere), with dots.
      parts: {name of a part in each of these modules: its name elsewhere}.
    """
    return {f'{module}.{part}': f'{other}.{name}' for module, other in modules for part, name in parts.items()}


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """The keys of a file that belong to a network.

    Attributes:
      names: {key in a file of only this network: the key in this file}.
      unused: the keys of the file that do not belong to the network.
    """

    names: dict[str, str]
    unused: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """The prefix of the keys in this file, for instance 'module.'; '' if there is none."""
        return next((name.removesuffix(key) for key, name in self.names.items() if name.endswith(key)), '')


def unwrapped(keys: Collection[str], find: Callable[[Collection[str]], dict[str, str]]) -> Unwrapped:
    """Removes the prefixes that wrappers, training frameworks and weight averaging put before a network's keys.

    If less than a tenth of the network's keys is found after that, the keys stay as they are.

    Args:
      keys: the keys of a file.
      find: the function of keys to {path: key} of the network, as `find_keys`.

    Raises:
      DvinvError: the file holds several such networks.
    """
    unchanged = {key: key for key in keys}
    plain = {'.'.join(part for part in key.split('.') if part not in WRAPPERS): key for key in keys}
    plain = plain if len(plain) == len(keys) else unchanged
    for names in (unchanged, plain):
        expected = {*find(names).values()}
        if expected <= names.keys():  # the file may hold averaged copies as well
            copies = {key for key in names if key not in expected and AVERAGED.search(key.rpartition('.')[0])}
            of_network = {key: name for key, name in names.items() if key not in copies}
            return Unwrapped(of_network, tuple(names[key] for key in names if key in copies))
    counts = Counter(key[: end + 1] for key in plain for end, sign in enumerate(key) if sign in './')
    names_by_prefix: dict[str, dict[str, str]] = {}  # {prefix: {key without it: key in this file}}
    missing: dict[str, int] = {}
    for prefix in ['', *sorted(prefix for prefix, count in counts.items() if 2 * count > len(expected))]:
        names_by_prefix[prefix] = {key.removeprefix(prefix): name for key, name in plain.items() if key.startswith(prefix)}
        missing[prefix] = len({*find(names_by_prefix[prefix]).values()} - names_by_prefix[prefix].keys())
    complete = [prefix for prefix in names_by_prefix if not missing[prefix] and not AVERAGED.search(prefix)]
    if len(complete) > 1:
        raise DvinvError(
            f'These weights hold several such networks, under {listed(complete)}, and nothing says which is meant; save the '
            'state dict of one of them.'
        )
    best = min(missing, key=lambda prefix: (missing[prefix], prefix != '', bool(AVERAGED.search(prefix)), len(prefix)))
    if len(expected) - missing[best] < 0.1 * len(expected):
        return Unwrapped(unchanged)
    used = {*names_by_prefix[best].values()}
    return Unwrapped(names_by_prefix[best], tuple(name for name in keys if name not in used))


def to_flax_layout(path: str, key: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts a tensor to the layout that Flax uses for it.

    Kernels of PyTorch and Gluon: OIHW to HWIO, and [out, in] to [in, out]. Depthwise kernels of Keras: [H, W, C, M], for C
    groups, to [H, W, 1, C * M]. Where Flax has a dense layer and PyTorch a convolution over the full image: OIHW to
    [I * H * W, O]. Other tensors have the same layout in all frameworks, except for axes of length 1.

    Args:
      path: the path of the variable in Flax; that of a kernel ends in '/kernel'.
      key: the key of the tensor in the file.
      shape: the shape of the variable in Flax.
    """
    if not path.endswith('/kernel'):
        equal = [length for length in tensor.shape if length > 1] == [length for length in shape if length > 1]
        return tensor.reshape(shape) if equal else tensor
    depthwise = tensor.ndim == len(shape) == 4 and shape[2] == 1  # Keras 3 uses the same name for all kernels
    if key.endswith('/depthwise_kernel') or ('/' in key and depthwise and tensor.shape != shape):
        return tensor.reshape(*tensor.shape[:2], 1, -1)
    if '/' in key:
        return tensor
    if (tensor.ndim, len(shape)) == (4, 2):
        tensor = tensor.reshape(len(tensor), -1)
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _torch_keys(path: str, aliases: Sequence[Mapping[str, str]], counted: bool) -> list[str]:
    """Returns the keys that a variable can have in PyTorch.

    'params/layer2_0/downsample_1/scale' -> ['layer2.0.downsample.1.weight', 'layer2.0.shortcut.1.weight'].
    """
    *modules, leaf = path.split('/')[1:]
    module = re.sub(r'_(\d+)', r'.\1', '.'.join(modules)) if counted else '.'.join(modules)
    leaf = PYTORCH.get(leaf, leaf)
    usual = f'{module}.{leaf}' if module else leaf
    aliased = []
    for names in aliases:
        other = names.get(module) or '.'.join(names.get(name, name) for name in module.split('.'))
        aliased.append(names.get(usual) or (f'{other}.{leaf}' if module else leaf))
    return [usual, *aliased]


def _layer_keys(path: str, paths: Collection[str], separator: str, leaves: dict, batch_norm: dict) -> list[str]:
    """Returns the keys that a variable can have in Keras or Gluon.

    'params/conv1/kernel' -> ['conv1/kernel', 'conv1/depthwise_kernel']; 'params/bn1/bias' -> ['bn1/beta'].
    """
    *modules, leaf = path.split('/')[1:]
    layer = '/'.join(modules)
    normalises = f'batch_stats/{layer}/mean' in paths or f'params/{layer}/scale' in paths
    names = (batch_norm if normalises else leaves).get(leaf, (leaf,))
    return [separator.join([*modules, name]) for name in names]


def _gluon_prefix(keys: Collection[str]) -> str:
    """Returns the most common prefix of Gluon keys, such as 'squeezenet0_'; '' if the keys are not those of Gluon."""
    if any('.' in key for key in keys):
        return ''
    prefixes = Counter(match[1] for match in map(GLUON_KEY.fullmatch, keys) if match)
    return max(prefixes, key=lambda prefix: prefixes[prefix], default='')


def inherited(teacher: Mapping, student: Mapping) -> dict:
    """Returns the part of the student's variables that the teacher has weights for.

    A student inherits the layers with matching names and shapes (arXiv 2311.18823). Layers are paired by their names and,
    within a series of numbered ones such as the blocks of a stage, by depth: the first with the first, the last with the
    last, and those in between spread evenly over the series of the teacher.

    Args:
      teacher: the variables of the teacher, {'params': ..., 'batch_stats': ...}, arrays.
      student: the variables of the student, arrays or shapes.

    Returns:
      Nested dicts with the structure of `student`, with the teacher's weights for all layers that have the same shapes in
      both networks; may be empty.
    """
    names: dict[str, str] = {}  # {path in the student: path in the teacher}
    for collection in student:
        if collection in teacher:
            names |= _paired(teacher[collection], student[collection], (collection,), (collection,))
    of_teacher, of_student = flatten(teacher), flatten(student)
    layers = defaultdict(list)
    for path in of_student:
        layers[path.partition('/')[2].rpartition('/')[0]].append(path)
    inherited_arrays: dict[str, np.ndarray] = {}
    for paths in layers.values():
        if all(path in names and np.shape(of_teacher[names[path]]) == np.shape(of_student[path]) for path in paths):
            inherited_arrays |= {path: np.asarray(of_teacher[names[path]]) for path in paths}
    return unflatten(inherited_arrays)


def _paired(teacher, student, teacher_path: tuple[str, ...], student_path: tuple[str, ...]) -> dict[str, str]:
    """Returns {path of a variable in the student: path in the teacher} within two modules."""
    if not isinstance(student, Mapping) or not isinstance(teacher, Mapping):
        leaves = not isinstance(student, Mapping) and not isinstance(teacher, Mapping)
        return {join_names(student_path): join_names(teacher_path)} if leaves else {}
    pairs: dict[str, str] = {}
    of_teacher = _series(teacher)
    for series, names in _series(student).items():
        teacher_names = of_teacher.get(series, [])
        for position, name in enumerate(names):
            if teacher_names:
                teacher_name = teacher_names[_spread(position, len(names), len(teacher_names))]
                paths = (*teacher_path, teacher_name), (*student_path, name)
                pairs |= _paired(teacher[teacher_name], student[name], *paths)
    return pairs


def _series(module: Mapping) -> dict[str, list[str]]:
    """Returns {name without the number at its end: the full names, in the order of their numbers}."""
    series = defaultdict(list)
    for name in module:
        match = NUMBERED.fullmatch(name)
        series[match[1] if match else name].append((int(match[2]) if match else 0, name))
    return {stem: [name for _, name in sorted(names)] for stem, names in series.items()}


def _spread(position: int, count: int, teacher_count: int) -> int:
    """Maps a position among `count` layers to one among `teacher_count`, so that the first and last layers correspond."""
    return round(position * (teacher_count - 1) / max(1, count - 1))


def head_of(build: Callable[[int], nn.Module], image_shape) -> str:
    """Returns the path of the head, for instance 'Dense_1': the layer that changes its shape with `num_classes`.

    Args:
      build: the function of `num_classes` to the Linen module.
      image_shape: H, W, C.
    """
    two_classes, three_classes = (flatten(shapes_of(build(num_classes), image_shape)['params']) for num_classes in (2, 3))
    (layer,) = {path.rpartition('/')[0] for path, leaf in two_classes.items() if leaf.shape != three_classes[path].shape}
    return layer


def grown(variables, smaller) -> dict:
    """Returns `variables` of a network (numpy arrays) with the weights of a network of fewer classes copied into them.

    The outputs of the head are its last axis; the first of them become those of `smaller`, the others stay as they are.

    Args:
      smaller: the variables of the network of fewer classes.

    Raises:
      DvinvError: the networks differ in more than the number of classes; the message names the variables that do not fit.
    """
    new, old = flatten(variables), flatten(smaller)
    wrong = {path for path in {*new, *old} if not _fits(new.get(path), old.get(path))}
    growing = {path for path in {*new} - wrong if new[path].shape != old[path].shape}
    if wrong or len({path.rpartition('/')[0] for path in growing}) > 1:
        raise DvinvError(
            f'A network cannot go on from one that is built otherwise: {listed(sorted(wrong | growing), 3)} differ. Is it '
            'another width?'
        )
    return unflatten({path: _beginning(np.array(leaf), np.asarray(old[path])) for path, leaf in new.items()})


def _fits(leaf, beginning) -> bool:
    """Returns whether `beginning` has the shape of `leaf`, except for its last axis, which may be shorter."""
    if leaf is None or beginning is None or leaf.ndim != beginning.ndim:
        return False
    return leaf.shape[:-1] == beginning.shape[:-1] and leaf.shape[-1:] >= beginning.shape[-1:]


def _beginning(leaf: np.ndarray, beginning: np.ndarray) -> np.ndarray:
    leaf[..., : beginning.shape[-1]] = beginning
    return leaf
