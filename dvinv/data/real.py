"""Reads real images by data set name, for training teachers, for controls and for scoring.

No synthesized pixel depends on them.
"""

import dataclasses

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData
from dvinv.data.digits import read_digits
from dvinv.data.folders import read_folders
from dvinv.data.npz import read_npz
from dvinv.data.prepared import read_prepared
from dvinv.errors import DvinvError, shape_text

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
