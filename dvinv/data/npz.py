"""Images in an .npz file, as exact pixels or as JPEG.

    images (or x)   uint8 [N, H, W, C] or [N, H, W]
    labels (or y)   integers [N]

or

    jpeg            uint8: the bytes of all JPEG files, one after the other
    offsets         integers [N + 1]: file i is jpeg[offsets[i]:offsets[i + 1]]
    header          optional: bytes that every file begins with
    labels (or y)   integers [N]

and in both, optionally, class_names: strings [K]. Other arrays may be there, and are not looked at.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from dvinv.data.dataset import RealData, Source, Split
from dvinv.data.pictures import decode, resize
from dvinv.errors import DvinvError

LAYOUTS = ({'images', 'labels'}, {'jpeg', 'offsets', 'labels'})
ALIASES = {'x': 'images', 'y': 'labels'}
# array -> its type, how many dimensions it may have, and both in words
ARRAYS = {
    'images': (np.uint8, (3, 4), 'uint8 [N, H, W] or [N, H, W, C]'),
    'labels': (np.integer, (1,), 'integers [N]'),
    'jpeg': (np.uint8, (1,), 'uint8 [bytes]'),
    'offsets': (np.integer, (1,), 'integers [N + 1]'),
    'header': (np.uint8, (1,), 'uint8 [bytes]'),
    'class_names': (np.str_, (1,), 'strings [K]'),
}


def read(source: Source) -> RealData:
    """The files `source.path` and `source.train_path` (if any); as many classes as they name, or as the highest label tells.

    Raises:
      DvinvError: a file is missing or damaged, its arrays are not those above, or the two name different classes.
    """
    test, names = _read(source.path, source.image_size)
    train, train_names = _read(source.train_path, source.image_size) if source.train_path else (None, names)
    if names and train_names and names != train_names:
        raise DvinvError(f'{source.path} and {source.train_path} have different class_names; they must be the same.')
    named = len(names or train_names)
    highest = max(int(split.labels.max()) for split in (test, train) if split)
    if named and highest >= named:
        path = source.path if names else source.train_path
        raise DvinvError(
            f'The class_names of {path} are those of the labels 0 to {named - 1}, but the highest label is {highest}.'
        )
    return RealData(train, test, named or highest + 1)


def _read(path: str, image_size: int) -> tuple[Split, list[str]]:
    """The images of one file, and its class names."""
    arrays = _arrays(path)
    labels = arrays['labels']
    count = len(arrays['images']) if 'images' in arrays else len(arrays['offsets']) - 1
    if count != len(labels) or not count:
        raise DvinvError(f'{path} has {max(count, 0)} images and {len(labels)} labels; there must be a label an image.')
    wrong = labels[(labels < 0) | (labels >= 2**31)]
    if len(wrong):
        raise DvinvError(f'{path} has the label {wrong[0]}; labels count the classes from 0.')
    if 'images' in arrays:
        images = arrays['images']
        images = resize(images if images.ndim == 4 else images[..., None], image_size)
    else:
        images = decode(_files(arrays, path), image_size)
    return Split(images, labels.astype(np.int32)), arrays['class_names'].tolist() if 'class_names' in arrays else []


def _files(arrays: dict[str, np.ndarray], path: str) -> dict[str, bytes]:
    """The JPEG files by a name for sentences."""
    offsets, jpeg = arrays['offsets'].astype(np.int64), arrays['jpeg'].tobytes()
    header = arrays['header'].tobytes() if 'header' in arrays else b''
    if offsets[0] < 0 or offsets[-1] > len(jpeg) or (np.diff(offsets) < 0).any():
        raise DvinvError(f'The offsets of {path} must ascend from 0 to at most {len(jpeg)}, the length of jpeg.')
    return {f'image {i} of {path}': header + jpeg[start:end] for i, (start, end) in enumerate(pairwise(offsets))}


def _arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file that are among `ARRAYS`."""
    if not Path(path).is_file():
        raise DvinvError(f'The data file {path} is not there.')
    try:
        with open(path, 'rb') as raw, np.load(raw, allow_pickle=False) as file:
            here = {ALIASES.get(name, name): name for name in file.files}
            arrays = {name: file[here[name]] for name in ARRAYS if name in here}
    except Exception as error:  # a damaged file makes NumPy, zipfile and zlib raise anything
        raise DvinvError(
            f'The data file {path} cannot be read ({error}): it is damaged, no .npz archive, or holds Python objects, which '
            'dvinv does not unpickle.'
        ) from error
    if not any(layout <= arrays.keys() for layout in LAYOUTS):
        names = ', '.join(file.files[:5]) + (', ...' if len(file.files) > 5 else '')
        raise DvinvError(
            f'{path} holds {len(file.files)} arrays ({names}); it must hold images (or x) and labels (or y), or jpeg, '
            'offsets and labels.'
        )
    for name, array in arrays.items():
        dtype, dimensions, words = ARRAYS[name]
        if not np.issubdtype(array.dtype, dtype) or array.ndim not in dimensions:
            raise DvinvError(f'The array {here[name]} of {path} is {array.dtype} {list(array.shape)}; it must be {words}.')
    return arrays
