"""Reads real images by data set name, for training teachers, for controls and for scoring.

No synthesized pixel depends on them.
"""

import dataclasses
import os
import textwrap

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.files import decode, read_folders, read_npz, resize
from dvinv.runtime.errors import DvinvError, shape_text


def read_digits(source: DataSettings) -> RealData:
    """Returns the 1,797 scanned digits, 8x8 grey (or enlarged): 1,437 training and 360 test images, stratified."""
    from sklearn.datasets import load_digits  # imported late, because it takes a second and other runs do not need it

    bunch = load_digits()
    pixels = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    return RealData(*Split(resize(pixels, source.image_size), bunch.target.astype(np.int32)).divided(360), num_classes=10)


def read_prepared(source: DataSettings) -> RealData:
    """Reads the data set `source.name` from array_record files below `source.path`, the `data_dir` of TFDS.

    An empty path stands for the default of TFDS.

    Raises:
      DvinvError: the data set is missing, has another format or is damaged, or the package array-record is missing.
    """
    import tensorflow_datasets as tfds  # imported late, because it takes a second and only cifar10 and cifar100 need it

    folder = tfds.core.Path(source.path or tfds.core.constants.DATA_DIR) / source.name
    data_dir = f', data_dir={source.path!r}' if source.path else ''
    command = (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({source.name!r}{data_dir}, '
        f"file_format='array_record').download_and_prepare()\""
    )
    way_out = f'prepare it once, in any environment that has TensorFlow: {command}'
    if not folder.exists():
        raise DvinvError(f'The data set {source.name} is not in {folder.parent}; {way_out}')
    try:
        builder = tfds.builder(source.name, data_dir=source.path or None, file_format='array_record')
        sources = builder.as_data_source(['train', 'test'], decoders={'image': tfds.decode.SkipDecoding()})
        train, test = (list(examples) for examples in sources)
    except ImportError as error:
        raise DvinvError(f'To read {folder}, the package array-record is needed: pip install array-record.') from error
    except Exception as error:  # TFDS raises many types of errors
        raise DvinvError(
            f'{folder} cannot be read ({textwrap.shorten(str(error), 200)}); delete it, and {way_out}'
        ) from error
    features = builder.info.features
    if not ({'image', 'label'} <= {*features} and hasattr(features['label'], 'num_classes')):
        raise DvinvError(
            f"{folder} has the features {', '.join(features)}; it must have 'image', and 'label' of classes; delete it, and "
            f'{way_out}'
        )
    label = features['label']
    names = tuple(getattr(label, 'names', ()))
    return RealData(_prepared_split(train, folder), _prepared_split(test, folder), label.num_classes, class_names=names)


def _prepared_split(examples: list[dict], folder: os.PathLike) -> Split:
    files = {f'image {i} of {folder}': example['image'] for i, example in enumerate(examples)}
    return Split(decode(files, mode='RGB'), np.array([example['label'] for example in examples], np.int32))


# {name: (reader, fields of the config's group `data` that the reader takes)}
DATA_SETS = {
    'digits': (read_digits, ('image_size',)),
    'cifar10': (read_prepared, ('path',)),
    'cifar100': (read_prepared, ('path',)),
    'npz': (read_npz, ('path', 'train_path', 'image_size')),
    'folders': (read_folders, ('path', 'train_path', 'image_size', 'class_names')),
}


def load_real(settings: DataSettings) -> RealData | None:
    """Reads real data; returns None for the name '', which stands for a run without real data.

    Raises:
      DvinvError: no data set has this name or takes these fields, or the data cannot be read.
    """
    return Datasets().load(settings)


class Datasets:
    """A reader of real data that caches the last data set and its last choice of classes.

    It caches no more, because two large data sets may not fit into memory.
    """

    def __init__(self) -> None:
        """Creates an empty cache; reads nothing yet."""
        self._unfiltered: tuple[DataSettings, RealData] | None = None
        self._last: tuple[DataSettings, RealData] | None = None

    def load(self, settings: DataSettings) -> RealData | None:
        """Reads real data, or returns it from the cache; see `load_real`."""
        if not settings.name:
            return None
        if self._last is None or self._last[0] != settings:
            self._last = settings, self._filtered(settings)
        return self._last[1]

    def _filtered(self, settings: DataSettings) -> RealData:
        """Returns the classes and splits of a data set that the settings choose."""
        unfiltered = dataclasses.replace(settings, classes=(), validation=False)
        if self._unfiltered is None or self._unfiltered[0] != unfiltered:
            self._unfiltered = unfiltered, _read(unfiltered)
        data = self._unfiltered[1]
        if settings.classes:
            data = _of_classes(data, settings.classes)
        if not settings.validation:
            return data
        if not data.train:
            raise DvinvError('data.validation holds out a fifth of the training images, but data.train_path names none.')
        train, test = data.train.divided(0.2)
        return dataclasses.replace(data, train=train, test=test)


def _of_classes(data: RealData, classes: tuple[int, ...]) -> RealData:
    known = {*range(data.num_classes)}
    if len({*classes}) < len(classes) or not {*classes} <= known:
        raise DvinvError(
            f'data.classes is {classes}; name different classes of the {data.num_classes} that the data set has, 0 to '
            f'{data.num_classes - 1}.'
        )
    test, train = data.test.of_classes(classes), data.train and data.train.of_classes(classes)
    if not len(test.labels):
        raise DvinvError(f'The data set has no test image of the classes {classes}; name others.')
    names = tuple(data.class_names[label] for label in classes) if data.class_names else ()
    return dataclasses.replace(data, train=train, test=test, num_classes=len(classes), class_names=names)


def _read(source: DataSettings) -> RealData:
    if source.name not in DATA_SETS:
        raise DvinvError(f'There is no data set {source.name!r}; choose one of {", ".join(sorted(DATA_SETS))}.')
    reader, fields = DATA_SETS[source.name]
    for name in ('path', 'train_path', 'image_size', 'class_names'):
        value = getattr(source, name)
        if value and name not in fields:
            raise DvinvError(f'data.{name} is {value!r}, but the data set {source.name!r} takes none; leave it out.')
    if 'train_path' in fields and not source.path:
        raise DvinvError(f"data.path is ''; give the path of the test images of the data set {source.name!r}.")
    if source.image_size < 0:
        raise DvinvError(f'data.image_size is {source.image_size}; it must be at least 0 (0: the size of the images).')
    names = source.class_names
    if not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise DvinvError(f'data.class_names is {names}; it must be different folder names, in the order of labels.')
    data = reader(source)
    if data.train and data.train.images.shape[1:] != data.image_shape:
        train, test = (shape_text(shape) for shape in (data.train.images.shape[1:], data.image_shape))
        raise DvinvError(f'Training images are {train} (height x width x channels), but test images are {test}.')
    return data
