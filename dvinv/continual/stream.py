"""The protocol of continual learning: which classes come when, and from which data set.

Task 0 is the teacher's: the classes of the group `data`. The classes of task t follow those of all tasks before it in the
labels of the network. Training images are read a task at a time; to read test images, those to train on are not touched
(but for `data.validation`, which scores on a part of them).
"""

import dataclasses

import numpy as np

from dvinv.config import DataSettings, Settings, parse_group
from dvinv.data.dataset import Split
from dvinv.errors import DvinvError, listed
from dvinv.networks import Classifier
from dvinv.pipeline.run import Run


@dataclasses.dataclass(frozen=True)
class Step:
    """One task: its data set, and its place among the labels."""

    field: str  # what a refusal calls it
    source: DataSettings
    first: int  # the label of its first class
    classes: int  # how many
    image_shape: tuple[int, int, int]  # H, W, C that the network takes


def sources_of(settings: Settings) -> dict[str, DataSettings]:
    """Returns {field of the config: data set} of task 0 and all that follow.

    Raises:
      DvinvError: a task that is told wrong, or classes that come twice.
    """
    base, sources = settings.data, {'data': settings.data}
    for index, step in enumerate(settings.continual.steps):
        field = f'continual.steps[{index}]'
        # Another data set has nothing of the first; the same one has all but its classes.
        values = {} if 'name' in step else {**vars(base), 'classes': ()}
        other = parse_group(DataSettings, {**values, **step}, field)
        sources[field] = dataclasses.replace(other, validation=base.validation)
    _refuse_overlaps(sources)
    return sources


def _refuse_overlaps(sources: dict[str, DataSettings]) -> None:
    seen = {}
    for field, source in sources.items():
        data_set = source.name, source.path
        for other, classes in seen.get(data_set, {}).items():
            shared = sorted({*source.classes} & {*classes})
            if shared or not (source.classes and classes):
                which = f'the classes {listed([*map(str, shared)])}' if shared else 'all classes of one data set'
                raise DvinvError(f'{other} and {field} overlap: both have {which}; every class must come in one task alone.')
        seen.setdefault(data_set, {})[field] = source.classes


def steps_of(run: Run, teacher: Classifier) -> list[Step]:
    """Task 0, whose classes are the teacher's, and all that follow. Reads no image to train on.

    Raises:
      DvinvError: a task that is told wrong, or that has no images.
    """
    steps, first = [], 0
    for field, source in sources_of(run.settings).items():
        # The teacher's classes are known without its data.
        classes = teacher.num_classes if not steps else len(source.classes) or _scored(run, source, field).num_classes
        steps.append(Step(field, source, first, classes, tuple(teacher.image_shape)))
        first += classes
    return steps


def class_names_of(run: Run, steps: list[Step]) -> list[str]:
    """Returns the names of all classes in the order of the network's labels: numbers where the data have no names."""
    names = []
    for step in steps:
        known = _scored(run, step.source, step.field).class_names
        names += [known[label] if label < len(known) else str(step.first + label) for label in range(step.classes)]
    return names


def training_images(run: Run, step: Step) -> Split:
    """The real images of a task, to learn from; labels are the network's.

    Raises:
      DvinvError: there are none, or none of one of its classes.
    """
    data = run.read_data(step.source)
    if data is None or data.train is None:
        raise DvinvError(
            f'{step.field} has no training images, and a task is not learned without; name some by name and train_path.'
        )
    return _among_all(data.train, step)


def test_images(run: Run, step: Step) -> Split:
    """The real images that a task is scored on; labels are the network's."""
    return _among_all(_scored(run, step.source, step.field).test, step)


def _scored(run: Run, source: DataSettings, field: str):
    data = run.read_data(source if source.validation else dataclasses.replace(source, train_path=''))
    if data is None:
        raise DvinvError(
            f"{field} names no data set, and a task cannot be scored without; give it a name, 'digits' for instance."
        )
    return data


def _among_all(split: Split, step: Step) -> Split:
    """The images as the network takes them, grey ones in all its channels, with its labels."""
    images, labels, channels = split.images, split.labels, step.image_shape[-1]
    if images.shape[-1] == 1 < channels:
        images = np.repeat(images, channels, -1)
    if images.shape[1:] != step.image_shape:
        theirs, ours = ('x'.join(map(str, shape)) for shape in (images.shape[1:], step.image_shape))
        raise DvinvError(
            f'{step.field} has images of {theirs} (height x width x channels), but the network takes {ours}; image_size may '
            'bring them to one size.'
        )
    lacking, highest = sorted({*range(step.classes)} - {*labels.tolist()}), int(labels.max())
    if lacking:
        named = step.source.classes[lacking[0]] if step.source.classes else lacking[0]
        raise DvinvError(f'{step.field} has no image of class {named}; leave the class out, or name more images.')
    if highest >= step.classes:
        raise DvinvError(
            f'{step.field} has the label {highest}, but its test images tell of {step.classes} classes, from 0.'
        )
    return Split(images, (labels + step.first).astype(np.int32))
