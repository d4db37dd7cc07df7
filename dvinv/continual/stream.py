"""The protocol of continual learning: the order of the tasks, and the classes and data set of each.

Task 0 is that of the teacher: the classes of the group `data`. In the labels of the network, the classes of task t follow
those of all earlier tasks. Training images are read one task at a time. Reading test images does not read training images,
except with `data.validation`, which uses a part of them for scores.
"""

import dataclasses
import itertools

import numpy as np

from dvinv.config import DataSettings, Settings, parse_group
from dvinv.data.dataset import RealData, Split
from dvinv.errors import DvinvError, listed, shape_text
from dvinv.networks import Classifier
from dvinv.pipeline.run import Run


@dataclasses.dataclass(frozen=True)
class Step:
    """One task: its data set, and its range of labels."""

    field: str  # its config field, for error messages
    source: DataSettings
    first: int  # the label of its first class
    classes: int  # the number of its classes
    image_shape: tuple[int, int, int]  # H, W, C that the network takes


def sources_of(settings: Settings) -> dict[str, DataSettings]:
    """Returns {config field: data set} of all tasks, from task 0.

    Raises:
      DvinvError: the settings of a task are invalid, or two tasks share classes.
    """
    base, sources = settings.data, {'data': settings.data}
    for index, step in enumerate(settings.continual.steps):
        field = f'continual.steps[{index}]'
        # A task with another data set inherits none of the settings in `data`; otherwise it inherits all but the classes.
        values = {} if 'name' in step else {**vars(base), 'classes': ()}
        other = parse_group(DataSettings, {**values, **step}, field)
        sources[field] = dataclasses.replace(other, validation=base.validation)
    _refuse_overlaps(sources)
    return sources


def _refuse_overlaps(sources: dict[str, DataSettings]) -> None:
    for (other_field, other), (field, source) in itertools.combinations(sources.items(), 2):
        if (other.name, other.path) == (source.name, source.path):
            shared = sorted({*source.classes} & {*other.classes})
            if shared or not (source.classes and other.classes):
                which = f'the classes {listed([*map(str, shared)])}' if shared else 'all classes of one data set'
                raise DvinvError(
                    f'{other_field} and {field} overlap: both have {which}; every class must be in one task only.'
                )


def steps_of(run: Run, teacher: Classifier) -> list[Step]:
    """Returns all tasks, from task 0, which has the teacher's classes. It reads no training images.

    Raises:
      DvinvError: the settings of a task are invalid, or it has no images.
    """
    (height, width, channels), first = teacher.image_shape, 0
    steps: list[Step] = []
    for field, source in sources_of(run.settings).items():
        # The number of the teacher's classes is known without its data.
        classes = teacher.num_classes if not steps else len(source.classes) or _scored(run, source, field).num_classes
        steps.append(Step(field, source, first, classes, (height, width, channels)))
        first += classes
    return steps


def class_names_of(run: Run, steps: list[Step]) -> list[str]:
    """Returns the names of all classes in the order of the network's labels; numbers if the data have no names."""
    names: list[str] = []
    for step in steps:
        in_data = _scored(run, step.source, step.field).class_names
        names += [in_data[label] if label < len(in_data) else str(step.first + label) for label in range(step.classes)]
    return names


def training_images(run: Run, step: Step) -> Split:
    """Returns the real training images of a task, with labels of the network.

    Raises:
      DvinvError: there are none, or none of one of its classes.
    """
    data = run.read_data(step.source)
    if data is None or data.train is None:
        raise DvinvError(
            f'{step.field} has no training images, and a task cannot be learned without them; set its name and train_path.'
        )
    return _among_all(data.train, step)


def test_images(run: Run, step: Step) -> Split:
    """Returns the real test images of a task, with labels of the network."""
    return _among_all(_scored(run, step.source, step.field).test, step)


def _scored(run: Run, source: DataSettings, field: str) -> RealData:
    """Returns the data of a task without reading training images, unless test images are a part of them."""
    data = run.read_data(source if source.validation else dataclasses.replace(source, train_path=''))
    if data is None:
        raise DvinvError(
            f"{field} names no data set, and a task cannot be scored without one; give it a name, 'digits' for instance."
        )
    return data


def _among_all(split: Split, step: Step) -> Split:
    """Returns a split with grey images repeated to the network's channels, and with labels of the network.

    Raises:
      DvinvError: the images have another shape than the network takes, or classes and labels do not match.
    """
    images, labels, channels = split.images, split.labels, step.image_shape[-1]
    if images.shape[-1] == 1 < channels:
        images = np.repeat(images, channels, -1)
    if images.shape[1:] != step.image_shape:
        found, expected = (shape_text(shape) for shape in (images.shape[1:], step.image_shape))
        raise DvinvError(
            f'{step.field} has images of {found} (height x width x channels), but the network takes {expected}; set its '
            'image_size.'
        )
    missing, highest = sorted({*range(step.classes)} - {*labels.tolist()}), int(labels.max())
    if missing:
        label = step.source.classes[missing[0]] if step.source.classes else missing[0]
        raise DvinvError(f'{step.field} has no image of class {label}; leave the class out, or add images of it.')
    if highest >= step.classes:
        raise DvinvError(
            f'{step.field} has the label {highest}, but its test images are of {step.classes} classes, counted from 0.'
        )
    return Split(images, (labels + step.first).astype(np.int32))
