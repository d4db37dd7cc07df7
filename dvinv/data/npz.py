"""Images in an .npz file, as exact pixels or as JPEG.

    images (or x)   numbers [N, H, W, C], [N, H, W] or [N, C, H, W], see `as_pixels`
    labels (or y)   whole numbers [N] or [N, 1], or one-hot [N, K]

or

    jpeg            uint8: the bytes of all JPEG files, one after the other
    offsets         integers [N + 1]: file i is jpeg[offsets[i]:offsets[i + 1]]
    header          optional: bytes with which every file begins
    labels (or y)   as above

and in both, optionally, class_names: strings [K]. Other arrays in the file are ignored.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.pictures import decode, resize
from dvinv.errors import DvinvError, say_once

LAYOUTS = ({'images', 'labels'}, {'jpeg', 'offsets', 'labels'})
ALIASES = {'x': 'images', 'y': 'labels'}
# {array: (its dtypes, its possible numbers of dimensions, a description of both)}
ARRAYS = {
    'images': ((np.number, np.bool_), (3, 4), 'numbers [N, H, W], [N, H, W, C] or [N, C, H, W]'),
    'labels': ((np.number, np.bool_), (1, 2), 'whole numbers [N], or one-hot [N, K]'),
    'jpeg': ((np.uint8,), (1,), 'uint8 [bytes]'),
    'offsets': ((np.integer,), (1,), 'integers [N + 1]'),
    'header': ((np.uint8,), (1,), 'uint8 [bytes]'),
    'class_names': ((np.str_,), (1,), 'strings [K]'),
}
EDGE = 1e-3  # fraction of the range by which float pixels may exceed it
DARK = 32  # a warning is printed if no pixel of uint8 images is as bright as this
FEW_CHANNELS = 4  # an axis of at most this length is taken for channels if it precedes a larger height and width


def read_npz(source: DataSettings) -> RealData:
    """Reads the files `source.path` and `source.train_path` (if given).

    The number of classes is that of the class names, or else follows from the highest label or the one-hot labels.

    Raises:
      DvinvError: a file is missing or damaged, its arrays are not as described at the top of this module, or the two files
        name different classes.
    """
    test, names, test_classes = _read(source.path, source.image_size)
    train: Split | None = None
    train_names, train_classes = names, 0
    if source.train_path:
        train, train_names, train_classes = _read(source.train_path, source.image_size)
    if names and train_names and names != train_names:
        raise DvinvError(f'{source.path} and {source.train_path} have different class_names; they must be the same.')
    class_names = tuple(names or train_names)
    highest = max(int(split.labels.max()) for split in (test, train) if split)
    if class_names and highest >= len(class_names):
        path = source.path if names else source.train_path
        raise DvinvError(
            f'The class_names of {path} are those of the labels 0 to {len(class_names) - 1}, but the highest label is '
            f'{highest}.'
        )
    num_classes = len(class_names) or max(highest + 1, test_classes, train_classes)
    return RealData(train, test, num_classes, class_names=class_names)


def _read(path: str, image_size: int) -> tuple[Split, list[str], int]:
    """Returns the images of one file, its class names, and the number of classes of one-hot labels (0 for other labels)."""
    arrays = _arrays(path)
    labels, classes = _as_labels(arrays['labels'], path)
    count = len(arrays['images']) if 'images' in arrays else len(arrays['offsets']) - 1
    if count != len(labels) or not count:
        raise DvinvError(f'{path} has {max(count, 0)} images and {len(labels)} labels; there must be one label per image.')
    invalid = labels[(labels < 0) | (labels >= 2**31)]
    if len(invalid):
        raise DvinvError(f'{path} has the label {invalid[0]}; labels count the classes from 0.')
    if 'images' in arrays:
        images = resize(as_pixels(arrays['images'], path), image_size)
    else:
        images = decode(_jpeg_files(arrays, path), image_size)
    names = arrays['class_names'].tolist() if 'class_names' in arrays else []
    return Split(images, labels.astype(np.int32)), names, classes


def as_pixels(images: np.ndarray, path: str) -> np.ndarray:
    """Returns images as uint8 [N, H, W, C].

    Values of types other than uint8 and bool are taken as fractions of white if none is above 1 (floating-point types only,
    because integers do not show their scale). They are taken as levels from 0 to 255, and rounded, if the largest is above
    127: images without a brighter pixel are unlikely. Values that exceed either end of the range by at most a thousandth of
    it, as after interpolation, are clipped.

    Args:
      images: [N, H, W, C], [N, H, W], or [N, C, H, W] with at most `FEW_CHANNELS` channels.
      path: the path of their file, for messages.

    Raises:
      DvinvError: the scale of the values is unknown, or they are not pixels.
    """
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[1] <= FEW_CHANNELS < min(images.shape[2:]):
        images = np.moveaxis(images, 1, -1)
    if images.dtype == np.uint8 or not images.size:
        if 0 < images.max(initial=0) < DARK:
            say_once(f'The brightest pixel of {path} is {images.max()} of 255: are its images of another scale?')
        return images.astype(np.uint8, copy=False)
    if images.dtype == np.bool_:
        return images * np.uint8(255)
    lowest, highest = images.min(), images.max()
    are_fractions = np.isrealobj(images) and highest <= 1 + EDGE and np.issubdtype(images.dtype, np.floating)
    scale = 255 if are_fractions else 1
    if not (np.isrealobj(images) and lowest * scale >= -255 * EDGE and highest <= 255 * (1 + EDGE)):  # NaN is neither
        raise DvinvError(
            f'The images of {path} are {images.dtype} from {lowest:g} to {highest:g}; they must be pixels, before any '
            'normalisation: uint8, or numbers from 0 to 1 or from 0 to 255.'
        )
    if scale == 1 and highest <= 127:
        raise DvinvError(
            f'The images of {path} are {images.dtype} from {lowest:g} to {highest:g}, so their scale is unknown; save '
            'them as uint8 from 0 (black) to 255 (white).'
        )
    # Images are converted one by one to save memory.
    return np.stack([np.rint(image * np.float64(scale)).clip(0, 255).astype(np.uint8) for image in images])


def _as_labels(labels: np.ndarray, path: str) -> tuple[np.ndarray, int]:
    """Returns integer labels [N], and the number of classes if the labels are one-hot [N, K], otherwise 0."""
    classes = 0
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
            raise DvinvError(
                f'The labels of {path} are {labels.dtype} {list(labels.shape)}, but not one-hot; they must be whole numbers '
                '[N], one label per image.'
            )
        classes, labels = labels.shape[1], labels.argmax(1)
    if not np.issubdtype(labels.dtype, np.integer):
        if not (np.isrealobj(labels) and np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
            raise DvinvError(
                f'The labels of {path} are {labels.dtype} and not all integers; they must count the classes from 0.'
            )
        labels = labels.astype(np.float64).astype(np.int64)
    return labels, classes


def _jpeg_files(arrays: dict[str, np.ndarray], path: str) -> dict[str, bytes]:
    """Returns {a name for messages: the bytes of a JPEG file}."""
    offsets, jpeg = arrays['offsets'].astype(np.int64), arrays['jpeg'].tobytes()
    header = arrays['header'].tobytes() if 'header' in arrays else b''
    if offsets[0] < 0 or offsets[-1] > len(jpeg) or (np.diff(offsets) < 0).any():
        raise DvinvError(f'The offsets of {path} must ascend from 0 to at most {len(jpeg)}, the length of jpeg.')
    return {f'image {i} of {path}': header + jpeg[start:end] for i, (start, end) in enumerate(pairwise(offsets))}


def _arrays(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a file that are among `ARRAYS`."""
    if not Path(path).is_file():
        raise DvinvError(f'The data file {path} does not exist.')
    try:
        with open(path, 'rb') as stream, np.load(stream, allow_pickle=False) as file:
            stored_names = {ALIASES.get(name, name): name for name in file.files}
            arrays = {name: file[stored_names[name]] for name in ARRAYS if name in stored_names}
    except Exception as error:  # NumPy, zipfile and zlib raise many types of errors for a damaged file
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
        dtypes, dimensions, description = ARRAYS[name]
        if not any(np.issubdtype(array.dtype, dtype) for dtype in dtypes) or array.ndim not in dimensions:
            found = f'{array.dtype} {list(array.shape)}'
            raise DvinvError(f'The array {stored_names[name]} of {path} is {found}; it must be {description}.')
    return arrays
