"""Readers of images in files: class folders, and .npz files with exact pixels or JPEG.

In folders there is one sub-folder per class, named after it, with PNG, JPEG, WebP or BMP files directly inside. The label of
a class is its position in `data.class_names`. Without class names, folders that are all named by whole numbers (7, 07) have
these numbers as labels. Otherwise labels count the names from 0 in alphabetical order, where numbers within names are
ordered by value (class_2 before class_10; 2_dog before 10_ship).

An .npz file holds

    images (or x)   numbers [N, H, W, C], [N, H, W] or [N, C, H, W], see `as_pixels`
    labels (or y)   whole numbers [N] or [N, 1], or one-hot [N, K]

or

    jpeg            uint8: the bytes of all JPEG files, one after the other
    offsets         integers [N + 1]: file i is jpeg[offsets[i]:offsets[i + 1]]
    header          optional: bytes with which every file begins
    labels (or y)   as above

and in both, optionally, class_names: strings [K]. Other arrays in the file are ignored.
"""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.runtime.errors import DvinvError, listed, say_once, shape_text

PICTURE_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')
PICTURE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
NPZ_LAYOUTS = ({'images', 'labels'}, {'jpeg', 'offsets', 'labels'})
NPZ_ALIASES = {'x': 'images', 'y': 'labels'}
# {array: (its dtypes, its possible numbers of dimensions, a description of both)}
NPZ_ARRAYS = {
    'images': ((np.number, np.bool_), (3, 4), 'numbers [N, H, W], [N, H, W, C] or [N, C, H, W]'),
    'labels': ((np.number, np.bool_), (1, 2), 'whole numbers [N], or one-hot [N, K]'),
    'jpeg': ((np.uint8,), (1,), 'uint8 [bytes]'),
    'offsets': ((np.integer,), (1,), 'integers [N + 1]'),
    'header': ((np.uint8,), (1,), 'uint8 [bytes]'),
    'class_names': ((np.str_,), (1,), 'strings [K]'),
}
RANGE_TOLERANCE = 1e-3  # fraction of the range by which float pixels may exceed it
DARK = 32  # a warning is printed if no pixel of uint8 images is as bright as this
FEW_CHANNELS = 4  # an axis of at most this length is taken for channels if it precedes a larger height and width


def decode(files: Mapping[str, bytes | Path], image_size: int = 0, mode: str = '') -> UInt8[np.ndarray, 'N H W C']:
    """Returns image files decoded as uint8 [N, H, W, C].

    Args:
      files: {a name for messages: the bytes or the path of a file}, at least one.
      image_size: the size as in `square`; 0 to keep the size of the files, which must all be the same.
      mode: 'RGB' or 'L'; '' for L (C = 1) if every picture is grey, otherwise RGB.

    Raises:
      DvinvError: a file is damaged, has another format or more than 8 bits per channel, or the sizes differ.
    """
    mode = mode or ('L' if all(_mode(*item) == 'L' for item in files.items()) else 'RGB')
    for i, (name, file) in enumerate(files.items()):
        picture = _decode(name, file, mode)
        pixels = np.asarray(square(picture, image_size) if image_size else picture)
        if i == 0:
            images, first_name = np.empty((len(files), *pixels.shape), np.uint8), name
        if pixels.shape != images.shape[1:]:
            size, first_size = (shape_text(shape[:2]) for shape in (pixels.shape, images.shape[1:]))
            raise DvinvError(
                f'All images must have one size, but {first_name} has {first_size} pixels (height x width) and {name} has '
                f'{size}; set data.image_size to resize them.'
            )
        images[i] = pixels
    return images.reshape(*images.shape[:3], -1)


def resize(images: UInt8[np.ndarray, 'N _ _ C'], image_size: int) -> UInt8[np.ndarray, 'N _ _ C']:
    """Returns images, uint8 [N, H, W, C], made square as in `square`; unchanged if `image_size` is 0."""
    if not image_size or images.shape[1:3] == (image_size, image_size):
        return images
    resized = np.empty((len(images), image_size, image_size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        for channel in range(images.shape[3]):  # channel by channel, since Pillow supports few numbers of channels
            resized[i, ..., channel] = np.asarray(square(Image.fromarray(image[..., channel]), image_size))
    return resized


def square(picture: Image.Image, size: int) -> Image.Image:
    """Returns the centre square of a picture, after its shorter side is resized to `size` with antialiasing."""
    width, height = (round(side * size / min(picture.size)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _mode(name: str, file: bytes | Path) -> str:
    with _opened(name, file) as picture:
        return picture.mode


def _decode(name: str, file: bytes | Path, mode: str) -> Image.Image:
    with _opened(name, file) as picture:
        if picture.mode[0] in 'IF':  # Pillow would clip these modes instead of scaling them
            raise DvinvError(f'{name} has more than 8 bits a channel; convert it to 8 bits.')
        return picture.convert(mode)


@contextlib.contextmanager
def _opened(name: str, file: bytes | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=PICTURE_FORMATS) as picture:
            yield picture
    except DvinvError:
        raise
    except Exception as error:  # Pillow raises many types of errors for a damaged file
        raise DvinvError(
            f'{name} cannot be decoded ({type(error).__name__}): it is damaged, or no {", ".join(PICTURE_FORMATS)} file; '
            'replace or remove it.'
        ) from error


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
    if not folders and any(entry.suffix.lower() in PICTURE_SUFFIXES for entry in Path(path).iterdir()):
        raise DvinvError(
            f'The data folder {path} has images but no sub-folders, so no labels; it must have one sub-folder per class.'
        )
    if not folders:
        raise DvinvError(f'The data folder {path} is empty; it must have one sub-folder per class.')
    files = {folder.name: sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURE_SUFFIXES) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise DvinvError(
                f'{Path(path) / name} is empty; a class needs images ({", ".join(PICTURE_SUFFIXES)}) directly inside.'
            )
    return files


def _split(files: dict[str, list[Path]], labels: dict[str, int], image_size: int) -> Split:
    images = decode({str(path): path for paths in files.values() for path in paths}, image_size, 'RGB')
    return Split(images, np.array([labels[name] for name, paths in files.items() for _ in paths], np.int32))


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
    are_fractions = np.isrealobj(images) and highest <= 1 + RANGE_TOLERANCE and np.issubdtype(images.dtype, np.floating)
    scale = 255 if are_fractions else 1
    least, most = -255 * RANGE_TOLERANCE, 255 * (1 + RANGE_TOLERANCE)
    if not (np.isrealobj(images) and lowest * scale >= least and highest <= most):  # NaN is neither
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
    """Returns the arrays of a file that are among `NPZ_ARRAYS`."""
    if not Path(path).is_file():
        raise DvinvError(f'The data file {path} does not exist.')
    try:
        with open(path, 'rb') as stream, np.load(stream, allow_pickle=False) as file:
            stored_names = {NPZ_ALIASES.get(name, name): name for name in file.files}
            arrays = {name: file[stored_names[name]] for name in NPZ_ARRAYS if name in stored_names}
    except Exception as error:  # NumPy, zipfile and zlib raise many types of errors for a damaged file
        raise DvinvError(
            f'The data file {path} cannot be read ({error}): it is damaged, no .npz archive, or holds Python objects, which '
            'dvinv does not unpickle.'
        ) from error
    if not any(layout <= arrays.keys() for layout in NPZ_LAYOUTS):
        names = ', '.join(file.files[:5]) + (', ...' if len(file.files) > 5 else '')
        raise DvinvError(
            f'{path} holds {len(file.files)} arrays ({names}); it must hold images (or x) and labels (or y), or jpeg, '
            'offsets and labels.'
        )
    for name, array in arrays.items():
        dtypes, dimensions, description = NPZ_ARRAYS[name]
        if not any(np.issubdtype(array.dtype, dtype) for dtype in dtypes) or array.ndim not in dimensions:
            found = f'{array.dtype} {list(array.shape)}'
            raise DvinvError(f'The array {stored_names[name]} of {path} is {found}; it must be {description}.')
    return arrays
