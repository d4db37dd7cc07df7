"""Real images, by data set name: for training teachers, for controls, for scoring. No synthesized pixel depends on them."""

import dataclasses
import functools

from dvinv.data import digits, folders, npz, prepared
from dvinv.data.dataset import RealData, Source
from dvinv.errors import DvinvError

# name -> (reader, the fields of the config's group `data` that it takes)
DATA_SETS = {
    'digits': (digits.read, ('image_size',)),
    'cifar10': (prepared.read, ('path',)),
    'cifar100': (prepared.read, ('path',)),
    'npz': (npz.read, ('path', 'train_path', 'image_size')),
    'folders': (folders.read, ('path', 'train_path', 'image_size', 'class_names')),
}


def load_real(group) -> RealData | None:
    """The real data of a run; None for the name '': a run without any.

    Args:
      group: the config's group `data`, or anything with the fields of a `Source`.

    Raises:
      DvinvError: no data set has this name or takes these fields, or what it names cannot be read.
    """
    source = Source(**{field.name: getattr(group, field.name) for field in dataclasses.fields(Source)})
    lists = {name: tuple(getattr(source, name)) for name in ('classes', 'class_names')}  # hashable
    return _load(dataclasses.replace(source, **lists)) if source.name else None


@functools.lru_cache(maxsize=1)  # the tasks of a run ask for the same; two large data sets may not fit into memory
def _load(source: Source) -> RealData:
    data = _read(dataclasses.replace(source, classes=(), validation=False))
    if source.classes:
        data = _of_classes(data, source.classes)
    if not source.validation:
        return data
    if not data.train:
        raise DvinvError('data.validation holds out a fifth of the training images, but data.train_path names none.')
    train, test = data.train.divided(0.2)
    return dataclasses.replace(data, train=train, test=test)


def _of_classes(data: RealData, classes: tuple[int, ...]) -> RealData:
    known = {*range(data.num_classes)}
    if len({*classes}) < len(classes) or not {*classes} <= known:
        raise DvinvError(
            f'The classes are to be {classes}; name different ones of the {data.num_classes} that the data set has, 0 to '
            f'{data.num_classes - 1}.'
        )
    train, test = (split and split.of_classes(classes) for split in (data.train, data.test))
    if not len(test.labels):
        raise DvinvError(f'Of the classes {classes} there is no image to score on; name others.')
    names = tuple(data.class_names[label] for label in classes) if data.class_names else ()
    return dataclasses.replace(data, train=train, test=test, num_classes=len(classes), class_names=names)


@functools.lru_cache(maxsize=1)  # before classes are chosen: a data set that comes in tasks is read once
def _read(source: Source) -> RealData:
    if source.name not in DATA_SETS:
        raise DvinvError(f'There is no data set {source.name!r}; choose one of {", ".join(sorted(DATA_SETS))}.')
    reader, fields = DATA_SETS[source.name]
    for name in ('path', 'train_path', 'image_size', 'class_names'):
        value = getattr(source, name)
        if value and name not in fields:
            raise DvinvError(f'data.{name} is {value!r}, but the data set {source.name!r} takes none; leave it out.')
    if 'train_path' in fields and not source.path:
        raise DvinvError(f"data.path is ''; name what the data set {source.name!r} scores on.")
    if source.image_size < 0:
        raise DvinvError(f'data.image_size is {source.image_size}; it must be 0 (as the images are) or above.')
    names = source.class_names
    if not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise DvinvError(f'data.class_names is {names}; it must be different folder names, in the order of labels.')
    data = reader(source)
    if data.train and data.train.images.shape[1:] != data.image_shape:
        ours, theirs = ('x'.join(map(str, shape)) for shape in (data.train.images.shape[1:], data.image_shape))
        raise DvinvError(f'Training images are {ours} (height x width x channels), but the images to score on {theirs}.')
    return data
