"""Weights that a network takes over from another one: a student from its teacher, a network from one with fewer classes.

A student inherits the layers with matching names and shapes (arXiv 2311.18823). Layers are paired by their names and, within
a series of numbered ones such as the blocks of a stage, by depth: the first with the first, the last with the last, and
those in between spread evenly over the series of the teacher. A network with more classes has all weights of the smaller
one; only its head, the last layer, has more outputs.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import flax.linen as nn
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.networks.classifier import flatten, join_names, shapes_of, unflatten

NUMBERED = re.compile(r'(.*?)(\d+)')


def inherited(teacher: Mapping, student: Mapping) -> dict:
    """Returns the part of the student's variables that the teacher has weights for.

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
