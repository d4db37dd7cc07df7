"""Images in folders: one sub-folder per class, named after it, with PNG, JPEG, WebP or BMP files directly inside.

The label of a class is its position in `data.class_names`. Without class names, folders that are all named by whole numbers
(7, 07) have these numbers as labels. Otherwise labels count the names from 0 in alphabetical order, where numbers within
names are ordered by value (class_2 before class_10; 2_dog before 10_ship).
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.pictures import decode
from dvinv.errors import DvinvError, listed

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def read_folders(source: DataSettings) -> RealData:
    """Reads the folders `source.path` and `source.train_path` (if given) in RGB, with the labels of `labels_of`.

    Raises:
      DvinvError: a folder or a class is missing or empty, a name has no label, or a file cannot be decoded.
    """
    test = _files_of_classes(source.path)
    train = _files_of_classes(source.train_path) if source.train_path else None
    labels, by_position = labels_of(sorted({*test, *(train or test)}), source.class_names, source.path)
    unmatched = sorted(test.keys() ^ train.keys()) if train else []
    if unmatched and by_position:
        raise DvinvError(
            f'{source.path} and {source.train_path} must have the same classes, but only one of them has '
            f'{", ".join(unmatched[:5])}{", ..." if len(unmatched) > 5 else ""}.'
        )
    num_classes = len(source.class_names) or max(labels.values()) + 1
    names = source.class_names or (tuple(sorted(labels, key=lambda name: labels[name])) if by_position else ())
    train_split = _split(train, labels, source.image_size) if train else None
    return RealData(train_split, _split(test, labels, source.image_size), num_classes, by_position, names)


def labels_of(names: list[str], class_names: tuple[str, ...], path: str) -> tuple[dict[str, int], bool]:
    """Returns ({name of a folder: its label}, whether the labels are only positions among these names).

    Args:
      names: the names of the folders.
      class_names: the names of all classes in the order of the labels; () to derive labels from the names, as described at
        the top of this module.
      path: the path of the folder that holds them, for error messages.

    Raises:
      DvinvError: two names have the same label, or a name is not among `class_names`.
    """
    if class_names:
        labels = {name: label for label, name in enumerate(class_names)}
        if unknown := [name for name in names if name not in labels]:
            raise DvinvError(
                f'{path} has the folders {listed(unknown, 5)}, which data.class_names does not name; it must name the '
                'folders of all classes, in the order of their labels.'
            )
        return {name: labels[name] for name in names}, False
    if all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):  # longer numbers are not labels
        labels = {name: int(name) for name in names}
        label, count = Counter(labels.values()).most_common(1)[0]
        if count > 1:
            same_label = [name for name in names if labels[name] == label]
            raise DvinvError(f'The folders {" and ".join(same_label)} of {path} are both of the class {label}; join them.')
        return labels, False
    return {name: label for label, name in enumerate(sorted(names, key=_sort_key))}, True


def _sort_key(name: str) -> list[tuple[str, int]]:
    """Returns the sort key of a name, for instance [('class_', 0), ('', 10), ('', 0)] for 'class_10'."""
    return [('', int(part)) if part.isdecimal() else (part, 0) for part in re.split('([0-9]+)', name)]


def _files_of_classes(path: str) -> dict[str, list[Path]]:
    """Returns the image files of each class; ignores hidden folders and files of other types."""
    if not Path(path).is_dir():
        raise DvinvError(f'The data folder {path} does not exist.')
    folders = sorted(entry for entry in Path(path).iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if not folders and any(entry.suffix.lower() in SUFFIXES for entry in Path(path).iterdir()):
        raise DvinvError(
            f'The data folder {path} has images but no sub-folders, so no labels; it must have one sub-folder per class.'
        )
    if not folders:
        raise DvinvError(f'The data folder {path} is empty; it must have one sub-folder per class.')
    files = {folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise DvinvError(f'{Path(path) / name} is empty; a class needs images ({", ".join(SUFFIXES)}) directly inside.')
    return files


def _split(files: dict[str, list[Path]], labels: dict[str, int], image_size: int) -> Split:
    images = decode({str(path): path for paths in files.values() for path in paths}, image_size, 'RGB')
    return Split(images, np.array([labels[name] for name, paths in files.items() for _ in paths], np.int32))
