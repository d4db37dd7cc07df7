"""Images in folders: one sub-folder a class, named after it, with PNG, JPEG, WebP or BMP files directly inside."""

from pathlib import Path

import numpy as np

from dvinv.data.dataset import RealData, Source, Split
from dvinv.data.pictures import decode
from dvinv.errors import DvinvError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def read(source: Source) -> RealData:
    """The folders `source.path` and `source.train_path` (if any) in RGB; label k is the k-th of the sorted class names.

    Raises:
      DvinvError: a folder or a class is missing or empty, or a file cannot be decoded.
    """
    test = _files(source.path)
    train = _files(source.train_path) if source.train_path else None
    alone = sorted(test.keys() ^ train.keys()) if train else []
    if alone:
        raise DvinvError(
            f'{source.path} and {source.train_path} must have the same classes, but only one of them has '
            f'{", ".join(alone[:5])}{", ..." if len(alone) > 5 else ""}.'
        )
    return RealData(train and _split(train, source.image_size), _split(test, source.image_size), len(test))


def _files(path: str) -> dict[str, list[Path]]:
    """The image files of each class; hidden folders and files of other kinds are passed over."""
    if not Path(path).is_dir():
        raise DvinvError(f'The data folder {path} is not there.')
    folders = sorted(entry for entry in Path(path).iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if not folders:
        raise DvinvError(f'The data folder {path} is empty; it must have a sub-folder a class.')
    files = {folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) for folder in folders}
    for name, found in files.items():
        if not found:
            raise DvinvError(f'{Path(path) / name} is empty; a class needs images ({", ".join(SUFFIXES)}) directly inside.')
    return files


def _split(files: dict[str, list[Path]], image_size: int) -> Split:
    images = decode({str(file): file for found in files.values() for file in found}, image_size, 'RGB')
    return Split(images, np.repeat(np.arange(len(files), dtype=np.int32), [len(found) for found in files.values()]))
