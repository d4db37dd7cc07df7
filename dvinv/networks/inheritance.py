"""Initialisation of a student from its teacher's weights, for layers with matching names and shapes (arXiv 2311.18823).

Layers are paired by their names and, within a series of numbered ones such as the blocks of a stage, by depth: the first
with the first, the last with the last, and those in between spread evenly over the series of the teacher.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from dvinv.networks.classifier import flatten, join_names, unflatten

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
