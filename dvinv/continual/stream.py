"""The protocol of continual learning: the tasks, the chains of networks that learn them, their moments, the accuracy matrix.

Task 0 is that of the teacher: the classes of the group `data`. In the labels of the network, the classes of task t follow
those of all earlier tasks. Training images are read one task at a time. Reading test images does not read training images,
except with `data.validation`, which uses a part of them for scores.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from dvinv.config import CONTINUAL_LOSSES, ContinualSettings, DataSettings, Settings, parse_group
from dvinv.data.dataset import RealData, RowArray, Split
from dvinv.evaluation import logits_of
from dvinv.inversion import Teacher
from dvinv.networks import Classifier
from dvinv.networks.classifier import MOMENTS
from dvinv.pipeline.run import Run
from dvinv.runtime.devices import is_primary, meet
from dvinv.runtime.errors import DvinvError, listed, shape_text
from dvinv.teacher.task import record_balanced

MAIN = 'continual'
RECORDED_IMAGES = 100  # the number of images that moments are recorded from, unless the teacher's settings name another


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


def chains_of(settings: ContinualSettings) -> dict[str, str]:
    """Returns {name of a chain: loss} for all chains, that of the run first; `joint` is not a chain."""
    losses = {control: settings.loss if control == 'replay' else control for control in settings.controls}
    return {MAIN: settings.loss, **{name: loss for name, loss in losses.items() if name != 'joint'}}


def synthesizing(settings: ContinualSettings) -> list[str]:
    """Returns the names of the chains that learn from images that they synthesize."""
    return [chain for chain, loss in chains_of(settings).items() if chain != 'replay' and loss in CONTINUAL_LOSSES]


def pools_of(settings: ContinualSettings) -> int:
    """Returns the number of pools of all tasks: one for the first, which all chains share, then one per chain."""
    return 1 + (len(settings.steps) - 1) * len(synthesizing(settings))


def name_of(settings: ContinualSettings, chain: str, number: int) -> str:
    """Returns the name of the network of a chain after task `number`; after the last task it is the name of the chain."""
    return chain if number == len(settings.steps) else f'{chain}_{number}'


def names_of_networks(settings: ContinualSettings, number: int) -> list[str]:
    """Returns the names of all networks that result from task `number`."""
    names = [name_of(settings, chain, number) for chain in chains_of(settings)]
    return names + ['joint'] * ('joint' in settings.controls and number == len(settings.steps))


def figures(run: Run, steps: list[Step], networks: Mapping[str, Sequence[Teacher | None]]) -> dict:
    """Computes the scores of the networks on the real test images of all tasks that they have learned.

    Figures of a control have its name as a prefix; those of the run's own network have no prefix.

    Args:
      steps: the tasks.
      networks: {chain: the network after each task}; None for unknown ones, but never after the last task.
    """
    tests = [test_images(run, step) for step in steps]
    sizes = [len(test.labels) for test in tests]
    scores: dict[str, float | None] = {}
    matrices = {}
    for chain, after_task in networks.items():
        counts = [_correct(network, tests[: task + 1]) if network else [] for task, network in enumerate(after_task)]
        matrix = [[count / size for count, size in zip(row, sizes, strict=False)] or None for row in counts]
        prefix = '' if chain == MAIN else f'{chain}_'
        last = counts[-1]
        scores |= {
            f'{prefix}test_accuracy': sum(last) / sum(sizes),
            f'{prefix}old_test_accuracy': sum(last[:-1]) / sum(sizes[:-1]),
            f'{prefix}new_test_accuracy': last[-1] / sizes[-1],
            f'{prefix}average_accuracy': statistics.fmean(count / size for count, size in zip(last, sizes, strict=True)),
            f'{prefix}forgetting': forgetting(matrix),
        }
        if chain == MAIN:
            scores['old_test_accuracy_before'] = sum(counts[-2]) / sum(sizes[:-1])
        matrices[chain] = matrix
    for control in ('finetune', 'replay'):
        scores.setdefault(f'{control}_test_accuracy', None)
    return {**scores, 'test_images': sum(sizes), 'accuracy_matrix': matrices}


def _correct(network: Teacher, tests: list[Split]) -> list[int]:
    """Counts the images of each task that `network` classifies correctly among all of its classes."""
    images, labels = (np.concatenate([getattr(test, field) for test in tests]) for field in ('images', 'labels'))
    correct = logits_of(network, images).argmax(1) == labels
    ends = np.cumsum([len(test.labels) for test in tests])
    return [int(part.sum()) for part in np.split(correct, ends[:-1])]


def forgetting(matrix: Sequence[list[float] | None]) -> float | None:
    """Computes forgetting: the best earlier accuracy on a task minus the last one (Chaudhry et al., arXiv 1801.10112).

    Args:
      matrix: [task learned][task tested] accuracies, for tested tasks up to the one learned; None for unknown rows.

    Returns:
      The mean over all tasks but the last; None if there are unknown rows.
    """
    known = [row for row in matrix if row]
    if len(known) < len(matrix):
        return None
    *earlier, last = known
    return statistics.fmean(max(row[task] for row in earlier[task:]) - last[task] for task in range(len(earlier)))


def names_of_moments(run: Run, teacher: Teacher, number: int) -> dict[str, str]:
    """Returns {chain: name of the file of its moments} for the chains that record moments after task `number`."""
    settings = run.settings.continual
    if MOMENTS not in teacher.variables or number == len(settings.steps):
        return {}
    return {chain: f'moments_{name_of(settings, chain, number)}' for chain in synthesizing(settings)}


def with_recorded(run: Run, chain: str, number: int, current: Teacher) -> Teacher:
    """Returns a network with moments to match by images, or as it is if the first network has no recorded moments.

    Args:
      chain: the chain of the network.
      number: the task that the images are made for.
      current: the network of the chain before that task.
    """
    if MOMENTS not in run.teacher.variables:
        return current
    if number == 1:
        return current.with_variables({MOMENTS: run.teacher.variables[MOMENTS]})
    return current.with_moments(run.workdir.network(names_of_moments(run, run.teacher, number - 1)[chain]))


def record_after_task(run: Run, network: Teacher, name: str, images: RowArray, labels: np.ndarray) -> None:
    """Records the moments of a network at the places of the teacher's, and writes them to the work directory.

    The moments of the first network do not describe the networks that follow it. The moments of those are recorded right
    after each task but the last, from the images that the network has just learned from: synthesized ones of the old
    classes, and real ones of the new classes. No real image of an old class is needed.

    Args:
      network: the network.
      name: the name of the file of moments; nothing happens if it exists.
      images: the images that the network has learned from, uint8 [N, H, W, C].
      labels: their labels, int [N].
    """
    if run.workdir.has_network(name):
        return
    settings = run.settings
    count = settings.teacher.moments_images or RECORDED_IMAGES
    layers = tuple(run.teacher.variables[MOMENTS])
    moments = record_balanced(network, images, labels, count, settings.continual, settings.seed, layers)
    if is_primary():
        moments.save(run.workdir.network(name))
    meet(f'the moments {name}')
