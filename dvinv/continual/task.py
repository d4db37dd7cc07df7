"""The task `continual`: class-incremental learning, task by task, without real images of old classes.

Before each task, images of all classes so far are synthesized from the current network. Then outputs for the new classes are
added to its head, and it is trained on these images and on the task's real images (arXiv 1912.08795, section 3.4). Controls
go through the same tasks side by side with it. Only the controls `replay` and `joint` use real images of old classes.

With `synthesis.method = 'adaptive'`, the images are synthesized in competition with a student of the network. It has the
architecture and the settings of the run's student, is trained on these images meanwhile, and is deleted when the pool is
finished.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from dvinv.continual.losses import always_be_dreaming_terms, cross_entropy, deepinversion_terms, lwf_mc_terms, total
from dvinv.continual.stream import (
    MAIN,
    Step,
    chains_of,
    class_names_of,
    figures,
    name_of,
    names_of_moments,
    names_of_networks,
    pools_of,
    record_after_task,
    steps_of,
    synthesizing,
    test_images,
    training_images,
    with_recorded,
)
from dvinv.data.dataset import Joined, RowArray, Split
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import hints_of, student_of, validate_student
from dvinv.distillation.student import job_of as student_job
from dvinv.inversion import Teacher, from_linen
from dvinv.inversion.linen_modules import LinenModule, trained_part, with_classes
from dvinv.inversion.programs import in_precision
from dvinv.inversion.teacher import teacher_of
from dvinv.networks import create, load_network, shapes_of
from dvinv.networks.classifier import differing_shapes, flatten
from dvinv.networks.naming import head_of
from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, heat_map
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, percent
from dvinv.runtime.devices import is_primary
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis.synthesizer import fill_in_competition, fill_pool, validate_count, validate_synthesis
from dvinv.training.step import Rounds, TrainJob, rounds_of
from dvinv.training.trainer import PlannedTraining, TrainTarget, train_network

# See `training.trainer.TrainTarget`; the same for all networks, so that compared networks start from the same state.
ROLE = 4
PER_CLASS = 12  # images in a row of a grid
LOSSES = {
    'deepinversion': 'Synthesized images, the loss of DeepInversion',
    'always_be_dreaming': 'Synthesized images, the loss of Always Be Dreaming',
}
CONTROLS = {
    'finetune': 'New images alone (fine-tuning)',
    'lwf_mc': 'New images alone, LwF.MC',
    'replay': 'Real images of old classes (oracle)',
    'joint': 'All real images at once (joint training)',
    **LOSSES,
}


def validate(run: Run) -> None:
    """Validates that the tasks can be learned.

    Training images are not required for tasks with all networks in the work directory.

    Raises:
      DvinvError: a setting is invalid, or images are missing; the message names the field, its value and the way out.
    """
    settings, teacher, devices = run.settings.continual, run.planned_teacher, run.training_mesh.size
    if settings.batch_size % (2 * devices):
        raise DvinvError(
            f'continual.batch_size is {settings.batch_size}; half of a batch is of new classes and half of old ones, and '
            f'each half is split over the devices ({devices}); choose a multiple of {2 * devices}.'
        )
    if not settings.steps:
        raise DvinvError("continual.steps is empty; name the classes to learn, ({'classes': (5, 6)},) for instance.")
    if run.settings.pool:
        raise DvinvError(f'pool is {run.settings.pool!r}, but the task makes pools of its own; leave it out.')
    if run.settings.synthesis.classes:
        raise DvinvError('synthesis.classes is set, but images of all classes so far are made; leave it out.')
    run.once(validate_synthesis)
    if run.settings.trains_student:
        run.once(validate_student)
    _validate_network(run)
    steps = steps_of(run, teacher)
    validate_count(run, 'synthesis.images', run.settings.synthesis.images, steps[-1].first)
    old_images = sorted({'replay', 'joint'} & {*settings.controls})
    if old_images and run.data is not None and run.data.train is None:
        raise DvinvError(
            f'continual.controls names {old_images[0]}, which needs real images of the old classes, but there are none; '
            'leave it out, or set data.train_path.'
        )
    # Test images first, then training images: reading them in turn would open each data set twice for every task.
    for step in steps:
        test_images(run, step)
    for number, step in enumerate(steps):
        needed = [*names_of_networks(settings, number), *names_of_moments(run, teacher, number).values()]
        if number and all(map(run.is_finished, needed)):
            continue
        if number or old_images:
            training_images(run, step)


def _validate_network(run: Run) -> None:
    """Validates that the head of the teacher matches its data and settings, and that the losses support it."""
    run.validate_changeable()
    settings, group, teacher = run.settings.continual, run.settings.teacher, run.planned_teacher
    blank = network_of(run, teacher, teacher.num_classes)
    if differing_shapes(*(trained_part(network.variables) for network in (blank, teacher))):
        raise DvinvError(
            f'The teacher is not the {group.network} of width {group.width} that the config names, so it cannot grow a '
            'head; set teacher.network and teacher.width to those of its weights.'
        )
    if group.factory:
        with_classes(teacher.module, teacher.image_shape, teacher.num_classes + 1)  # refuses heads that cannot grow
    data = run.data
    if data is not None and data.num_classes != teacher.num_classes:
        raise DvinvError(
            f"The teacher's head has {teacher.num_classes} classes, but data has {data.num_classes}; set data.classes to "
            "the teacher's and continual.steps to those to learn, or give teacher.weights of another network."
        )
    if 'always_be_dreaming' in (settings.loss, *settings.controls):
        if group.factory and not isinstance(teacher.module, LinenModule):
            raise DvinvError(
                "The loss 'always_be_dreaming' captures the inputs of the head, which works for Linen modules only, and the "
                f"network of teacher.factory {group.factory!r} is an NNX model; choose 'deepinversion'."
            )
        head = head_path(run, teacher)
        kernel = flatten(blank.variables['params'])[f'{head}/kernel']
        if kernel.ndim != 2:
            raise DvinvError(
                f'The head of {group.factory or group.network} ({head}) is not a dense layer, which the loss '
                "'always_be_dreaming' requires; choose 'deepinversion'."
            )


def run(run: Run) -> dict:
    """Learns all tasks, then scores every network after every task on the real test images; returns the figures."""
    settings, teacher = run.settings.continual, run.teacher
    steps = steps_of(run, teacher)
    grown = [network_of(run, teacher, step.first + step.classes) for step in steps]
    first = dataclasses.replace(grown[0], variables=trained_part(teacher.variables))
    learned = {chain: [first] for chain in chains_of(settings)}
    for number in range(1, len(steps)):
        train_task(run, steps[: number + 1], grown[number], learned)
    networks: dict[str, Sequence[Teacher | None]] = {**learned}
    if 'joint' in settings.controls:
        joint = train_jointly(run, steps, grown[-1], learned[MAIN][0])
        networks['joint'] = [None] * (len(steps) - 1) + [joint]
    return {**figures(run, steps, networks), 'tasks': len(steps), 'updates': settings.updates}


def planned_trainings(run: Run) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`, all as for the last task, which has the most classes."""
    settings, teacher = run.settings.continual, run.planned_teacher
    steps = steps_of(run, teacher)
    module = network_of(run, teacher, steps[-1].first + steps[-1].classes).module
    loss_fn, head = loss_of(run, settings.loss, teacher)
    rounds = Rounds(run.settings.synthesis.images)
    job = TrainJob(settings, loss_fn, rounds, teacher.variables, rounds, head)
    networks = (len(steps) - 1) * (len(chains_of(settings)) + ('joint' in settings.controls))
    trainings = [PlannedTraining('continual', module, job, teacher, networks, teacher)]
    if run.settings.synthesis.method == 'adaptive':  # a temporary student for every pool
        job = student_job(run, teacher, rounds_of(run.settings), hints_of(run, teacher))
        trainings.append(PlannedTraining('student', run.student_module(teacher), job, teacher, pools_of(settings), teacher))
    return trainings


def complete(run: Run) -> bool:
    """Returns whether the network files of the finished task still exist; users delete damaged files to recompute them."""
    settings = run.settings.continual
    return all(run.workdir.has_network(name) for name in names_of_networks(settings, len(settings.steps)))


def train_task(run: Run, steps: list[Step], like: Teacher, learned: dict[str, list[Teacher]]) -> None:
    """Trains every chain of `learned` on the last of `steps`, and appends the resulting network to it.

    All synthesis precedes reading the task's images. Networks that exist already are not trained again: a task with all its
    networks in the work directory needs no images.

    Args:
      steps: the tasks up to the one to learn.
      like: the network with the classes of all these tasks; its variables are shapes.
      learned: {chain: the network after each task}; appended to in place.
    """
    settings, workdir, number = run.settings.continual, run.workdir, len(steps) - 1
    chains = chains_of(settings)
    paths = {chain: workdir.network(name_of(settings, chain, number)) for chain in chains}
    moments = names_of_moments(run, run.teacher, number)
    # In the same order on all processes, since each question about a file is a collective.
    files = {chain: [path.stem, *filter(None, [moments.get(chain)])] for chain, path in paths.items()}
    unfinished = [chain for chain, names in files.items() if not all(map(workdir.has_network, names))]
    if unfinished:
        old = {
            chain: pool_of(run, chain, number, learned[chain][-1]) for chain in synthesizing(settings) if chain in unfinished
        }
        if 'replay' in unfinished:
            old['replay'] = _union([training_images(run, step) for step in steps[:-1]])
        new = training_images(run, steps[-1])
        for chain in unfinished:
            current = learned[chain][-1]
            job, images, labels = job_of(run, chains[chain], current, new, old.get(chain))
            train_network(run, _target(run, paths[chain].stem, like, current), job, images, labels)
            if chain in moments:
                network = dataclasses.replace(like, variables=load_network(paths[chain])[0])
                record_after_task(run, network, moments[chain], images, labels)
    for chain, path in paths.items():
        learned[chain].append(dataclasses.replace(like, variables=load_network(path)[0]))


def _target(run: Run, name: str, like: Teacher, before: Teacher) -> TrainTarget:
    """Returns the training target of the network `name`, with the architecture of `like` and the weights of `before`."""
    user_module = run.user_module(like)
    return TrainTarget('continual', name, run.settings.teacher, like, ROLE, start=before.variables, user_module=user_module)


def pool_of(run: Run, chain: str, number: int, current: Teacher) -> tuple[RowArray, np.ndarray]:
    """Returns images and labels, synthesized from the `current` network of a chain, that are used to learn task `number`."""
    # All chains begin with the same network, so they share its images.
    name = f'{number}' if chain == MAIN or number == 1 else f'{chain}_{number}'
    current = with_recorded(run, chain, number, current)
    pool = ImagePool(run.workdir.path / 'pools' / name, current.digest(), quarantine=True)
    method, series = run.settings.synthesis.method, f'images_{name}'
    if method == 'adaptive':
        student = student_of(run, current, f'student_{name}', 'continual')
        fill_in_competition(run, current, pool, student, 'continual', series)
        if is_primary():
            shutil.rmtree(run.workdir.path / 'checkpoints' / student.name, ignore_errors=True)
    else:
        fill_pool(run, current, pool, method, 'continual', series)
    return pool.rows('images'), pool.rows('labels')[:]


def _union(splits: list[Split]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of several splits."""
    return np.concatenate([split.images for split in splits]), np.concatenate([split.labels for split in splits])


def train_jointly(run: Run, steps: list[Step], like: Teacher, first: Teacher) -> Teacher:
    """Trains the control that uses the real images of all tasks at once, with the total number of updates of the others."""
    path = run.workdir.network('joint')
    if not run.workdir.has_network('joint'):
        settings = run.settings.continual
        settings = dataclasses.replace(settings, updates=settings.updates * (len(steps) - 1))
        images, labels = _union([training_images(run, step) for step in steps])
        job = TrainJob(settings, loss_of(run, 'joint', first)[0], Rounds(len(labels)))
        train_network(run, _target(run, 'joint', like, first), job, images, labels)
    return dataclasses.replace(like, variables=load_network(path)[0])


def network_of(run: Run, teacher: Teacher, num_classes: int) -> Teacher:
    """Returns the teacher's network with `num_classes` classes, and with shapes in place of weights."""
    user_module = run.user_module(teacher)
    make: Callable[..., Teacher]
    if user_module is None:
        module, make = create(run.settings.teacher.network, num_classes, run.settings.teacher.width), from_linen
    else:
        module, make = with_classes(user_module, teacher.image_shape, num_classes), teacher_of
    shapes = shapes_of(module, teacher.image_shape)
    return make(module, shapes, image_shape=teacher.image_shape, mean=teacher.mean, std=teacher.std)


def job_of(
    run: Run, loss: str, current: Teacher, new: Split, old: tuple[RowArray, np.ndarray] | None
) -> tuple[TrainJob, RowArray, np.ndarray]:
    """Returns (job, images, labels) of a task, on new images, and on old ones if there are any.

    All losses get the same number of new images per batch: without old images, a batch is half as large.

    Args:
      loss: the name of the loss.
      current: the network before the task.
      new: the images of the new classes.
      old: the images uint8 [N, H, W, C] of the old classes and their labels int [N], or None.
    """
    settings = run.settings.continual
    loss_fn, head = loss_of(run, loss, current)
    rounds = Rounds(len(new.labels))
    if old is None:
        half = dataclasses.replace(settings, batch_size=settings.batch_size // 2)
        return TrainJob(half, loss_fn, rounds, current.variables, head=head), new.images, new.labels
    old_images, old_labels = old
    job = TrainJob(settings, loss_fn, rounds, current.variables, Rounds(len(old_labels)), head)
    return job, Joined(new.images, old_images), np.concatenate([new.labels, old_labels])


def loss_of(run: Run, name: str, old: Teacher) -> tuple[Callable, str]:
    """Returns (loss of a `TrainJob`, path of the layer to capture or ''); the argument `frozen` is the old network."""
    settings = run.settings.continual
    old = in_precision(old, settings.precision)
    head = head_path(run, old) if name == 'always_be_dreaming' else ''

    def loss(logits, features, x, labels, frozen, progress):
        if name in ('finetune', 'joint'):
            return cross_entropy(logits, labels)
        old_logits = old.apply_fn(frozen, x)
        if name == 'lwf_mc':
            return total(lwf_mc_terms(logits, old_logits, labels), {})
        if name == 'deepinversion':
            terms = deepinversion_terms(logits, old_logits, labels, settings.temperature)
        else:
            ((inputs, head_logits),) = features[head]
            old_head = frozen['params']
            for part in head.split('/'):
                old_head = old_head[part]
            terms = always_be_dreaming_terms(logits, head_logits, inputs, old_logits, labels, old_head)
        return total(terms, settings.weights)

    return loss, head


def head_path(run: Run, teacher: Teacher) -> str:
    """Returns the path of the head, the last layer, of the teacher's network."""
    group, user_module = run.settings.teacher, run.user_module(teacher)
    if user_module is not None:
        return with_classes(user_module, teacher.image_shape, teacher.num_classes + 1).head
    return head_of(lambda classes: create(group.network, classes, group.width), teacher.image_shape)


def continual_section(run: Run, found: dict) -> Section:
    """Returns the section: a table, accuracy matrices, and the first images of each task's pool."""
    settings, names = run.settings.continual, class_names_of(run, steps_of(run, run.teacher))
    labels = {MAIN: LOSSES[settings.loss], **CONTROLS}
    chains = [MAIN, *settings.controls]
    columns = ('test_accuracy', 'old_test_accuracy', 'new_test_accuracy', 'average_accuracy', 'forgetting')
    rows = []
    for chain in chains:
        prefix = '' if chain == MAIN else f'{chain}_'
        rows.append([labels[chain], *(percent(found.get(prefix + figure)) for figure in columns)])
    table = Table(
        ('Learned from', 'all classes', 'old classes', 'classes of the last task', 'mean over tasks', 'forgetting'),
        rows,
        highlight=0,
        caption=f'Accuracy of the same network on {found["test_images"]:,} real test images after {found["tasks"]} tasks, '
        f'{found["updates"]:,} updates each but for the first. Forgetting: the best earlier accuracy on a task less the '
        'last one, mean over tasks.',
    )
    accuracy, old = found['test_accuracy'], found['old_test_accuracy']
    return Section(
        'Continual learning',
        text=f'After {found["tasks"]} tasks the network reads {percent(accuracy)} of the real test images '
        f'right, of the classes before the last task {percent(old)}.\n\n'
        'Rows of a matrix: after which task. Columns: on which task, in per cent, among all classes known by then.',
        tables=[table],
        charts=[accuracy_matrix(found['accuracy_matrix'][chain], labels[chain]) for chain in chains],
        pictures=[*(recalled_images(run.workdir, task, names) for task in range(1, found['tasks'])), *_real(run, names)],
        tiles=[
            Tile('All classes', percent(accuracy), 'real test accuracy, old images unseen', accuracy),
            Tile('Old classes', percent(old), f'before the last task {percent(found["old_test_accuracy_before"])}', old),
        ],
        summary=f'In {found["tasks"]} tasks a network learned ever more classes, and saw no real image of an old one '
        f'again: images of old classes were synthesized from the network itself. It reads {percent(accuracy)} of the real '
        f'test images of all classes right; after fine-tuning alone it would be {percent(found["finetune_test_accuracy"])}, '
        f'with real images of the old classes {percent(found["replay_test_accuracy"])}.',
    )


def accuracy_matrix(rows: Sequence[Sequence[float | None] | None], title: str) -> Chart:
    """Draws the accuracy on each task after each task.

    Args:
      rows: the accuracies on the tasks so far, one row after each task; None for a task after which none was measured.
      title: the title above the chart.
    """
    known = {f'after task {task}': row for task, row in enumerate(rows) if row}
    return heat_map([*known.values()], title, [*known], [f'task {task}' for task in range(len(rows))])


def recalled_images(workdir: Workdir, task: int, names: Sequence[str]) -> Picture:
    """Returns the first images of each old class that were synthesized before a task.

    Args:
      workdir: the work directory.
      task: the number of the task, from 1.
      names: the names of classes in the order of labels; () to show numbers.
    """
    pool = ImagePool(workdir.path / 'pools' / f'{task}')
    caption = f'Synthesized before task {task}: the old classes as the network recalled them; rows are classes.'
    return class_picture(pool.rows('images'), pool.rows('labels')[:], caption, names, PER_CLASS)


def _real(run: Run, names: Sequence[str]) -> list[Picture]:
    data = run.data
    caption = 'Real test images of the first classes, for comparison.'
    return [class_picture(data.test.images, data.test.labels, caption, names, PER_CLASS)] if data else []
