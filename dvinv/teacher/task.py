"""The task `teacher`: trains or reads the network to invert and the verifier, scores them, and records moments."""

import contextlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
import optax

from dvinv.config import LabelTrainingSettings, Settings, TrainingSettings, validate_devices
from dvinv.data.dataset import RowArray
from dvinv.evaluation import flops, test_accuracy, validate_fits
from dvinv.inversion.augmentation import Augmentation, augmentation_of
from dvinv.inversion.recording import record_moments
from dvinv.inversion.statistics import Moments
from dvinv.inversion.teacher import Teacher
from dvinv.networks import create, shapes_of
from dvinv.pipeline.run import Role, Run
from dvinv.report.charts import Chart, loss_chart, mean_curves
from dvinv.report.page import Section, Tile, percent, reads_right
from dvinv.runtime.devices import is_primary, meet
from dvinv.runtime.errors import DvinvError, shape_text
from dvinv.runtime.workdir import Metrics
from dvinv.teacher.networks import print_pixels, refuse_chance
from dvinv.training.step import Rounds, TrainJob
from dvinv.training.trainer import PlannedTraining, TrainTarget, train_network

ROLES: dict[Role, int] = {'teacher': 1, 'verifier': 2}  # see `training.trainer.TrainTarget`


def validate(run: Run) -> None:
    """Validates teacher and verifier before anything is written; `pipeline.tasks` validates their training images.

    Raises:
      DvinvError: one of them cannot be trained or read, or does not fit the data.
    """
    run.once(validate_verifier)
    for role in ROLES:
        if run.is_trained_here(role):
            validate_devices(getattr(run.settings, role).training, f'{role}.training', run.training_mesh.size)


def run(run: Run) -> dict:
    """Trains teacher and verifier unless they are given, and scores them on the real test images; returns the figures."""
    scores = {}
    if run.settings.verifier.weights and run.settings.verifier.network:  # first, because it may be refused
        scores['verifier'] = _score('verifier', run)
    if run.is_trained_here('teacher'):
        _train('teacher', run)
    if run.settings.teacher.moments_images and not run.workdir.has_network('moments'):
        moments = record_teacher(run, run.settings.teacher.moments_images)
        if is_primary():
            moments.save(run.workdir.network('moments'))
        meet('moments of the teacher')
    scores['teacher'] = _score('teacher', run)
    if run.is_trained_here('verifier'):
        _train('verifier', run)
        scores['verifier'] = _score('verifier', run)
    return {
        'test_accuracy': scores['teacher'],
        'verifier_test_accuracy': scores.get('verifier'),
        'test_images': len(run.data.test.labels) if run.data else None,
        'parameters': run.teacher.parameters,
        'flops': flops(run.teacher),
    }


def planned_trainings(run: Run) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`."""
    trainings, teacher = [], run.planned_teacher
    for role in ROLES:
        if run.is_trained_here(role):
            group, count = getattr(run.settings, role), len(run.training_split.labels)
            user_module = run.user_module() if role == 'teacher' else None
            module = create(group.network, teacher.num_classes, group.width) if user_module is None else user_module
            trainings.append(PlannedTraining(role, module, _job_of(group.training, count), teacher))
    return trainings


def complete(run: Run) -> bool:
    """Returns whether the network files of the finished task still exist; users delete damaged files to recompute them."""
    names = [role for role in ROLES if run.is_trained_here(role)] + ['moments'] * bool(run.settings.teacher.moments_images)
    return all(map(run.workdir.has_network, names))


def record_teacher(run: Run, images: int, layers: Iterable[str] = ()) -> Moments:
    """Records the moments of the teacher on real training images, augmented as for its training.

    Args:
      images: the number of images, divided among the classes as equally as possible.
      layers: see `record_moments`.

    Raises:
      DvinvError: there are no training images, they do not fit the teacher, or see `record_moments`.
    """
    data = run.data
    if data is None or data.train is None:
        raise DvinvError('There are no real training images to record moments from; set data.name and data.train_path.')
    validate_fits(run.bare_teacher, data)
    training, seed = run.settings.teacher.training, run.settings.seed
    return record_balanced(run.bare_teacher, data.train.images, data.train.labels, images, training, seed, layers)


def record_to_file(settings: Settings, workdir: str | None, out: str, images: int = 100, layers: Iterable[str] = ()) -> str:
    """Records moments of the teacher that the settings name to the file `out`; returns a sentence that summarises them.

    Args:
      settings: the settings.
      workdir: the path of the run that has trained the teacher, if the settings name no weights.
      out: the path of the file to write.
      images, layers: as for `record_teacher`.

    Raises:
      DvinvError: there is no teacher, or there are no training images, or see `record_moments`.
    """
    run = Run(settings, workdir or '')
    with contextlib.ExitStack() as stack:
        if run.is_trained_here('teacher'):
            if not run.is_finished('teacher'):
                raise DvinvError(
                    'The config names no weights of a teacher, and --workdir has no trained teacher; give teacher.weights, '
                    'or as --workdir the folder of a run that has trained it.'
                )
            stack.enter_context(contextlib.closing(run.open_workdir()))
        moments = record_teacher(run, images, layers)
    moments.save(out)
    views = f', each augmented {moments.views} times as in its training' if moments.views else ''
    return f'{out}: the moments of {len(moments.layers)} layers, over {moments.images} training images{views}.'


def record_balanced(
    network: Teacher,
    images: RowArray,
    labels: np.ndarray,
    count: int,
    training: TrainingSettings,
    seed: int,
    layers: Iterable[str] = (),
) -> Moments:
    """Records moments on `count` of the images, with classes as balanced as possible, augmented as for `training`.

    Args:
      network: the network.
      images: uint8 [N, H, W, C].
      labels: their labels, int [N].
      count: the number of images to record from.
      training: settings with the augmentation to apply.
      seed: the seed of the choice of images and of the augmentation.
      layers: see `record_moments`.

    Raises:
      DvinvError: see `record_moments`.
    """
    chosen, augmentation = images[balanced_rows(labels, count, seed)], augmentation_of(training)
    return record_moments(
        network, chosen, layers, augmentation=None if augmentation == Augmentation() else augmentation, key=seed
    )


def balanced_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the rows of `count` random images, or of all, with classes as balanced as possible; ascending, int [n].

    Args:
      labels: the labels of the images, int [N].
      count: the number of rows.
      seed: the seed of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    ranks = np.zeros(len(labels), int)  # the rank of each image within its class, in random order
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        ranks[rows] = np.arange(len(rows))
    return np.sort(np.argsort(ranks, kind='stable')[: max(0, count)])


def statistics_of(run: Run) -> str:
    """Returns a description of the statistics that the moments of the images are matched with."""
    layers, group = len(run.teacher.statistics(run.teacher.variables)), run.settings.teacher
    if group.moments or group.moments_images:
        moments = Moments.load(group.moments or run.workdir.network('moments'))
        return f'recorded moments of {moments.images:,} images, {layers} layers'
    return f'running statistics, {layers} layers' if layers else 'none'


def validate_verifier(run: Run) -> None:
    """Validates that the verifier of a run takes the teacher's images.

    Raises:
      DvinvError: it does not; the message names the field and the reason.
    """
    if run.is_trained_here('verifier'):
        validate_takes('verifier', run.settings.verifier, run.planned_teacher)
    elif run.verifier:
        print_pixels(run.settings.verifier, 'verifier', run.verifier)


def validate_takes(role: str, group, teacher: Teacher) -> None:
    """Validates, by shapes only, that a network to be trained takes the teacher's images.

    Args:
      role: 'verifier' or 'student'.
      group: the settings of the network, with `network` and `width`.

    Raises:
      DvinvError: it does not; the message names the network and the error that it raised.
    """
    module = create(group.network, teacher.num_classes, group.width)
    try:
        shapes_of(module, teacher.image_shape)
    except Exception as error:  # Flax and JAX raise many types of errors here
        shape, reason = shape_text(teacher.image_shape), str(error).splitlines()[0]
        raise DvinvError(f'{role}.network is {group.network}, which cannot take images of {shape}: {reason}') from error


def supervised(label_smoothing: float) -> Callable:
    """Returns the cross-entropy to the labels, with label smoothing, as the loss of a `TrainJob`."""

    def loss(logits, features, x, labels, frozen, progress):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    return loss


def _score(role: Role, run: Run) -> float | None:
    """Returns the test accuracy of 'teacher' or 'verifier'; refuses a given verifier that is no better than chance."""
    network = run.teacher if role == 'teacher' else run.verifier
    assert network is not None, 'the settings name no verifier'
    share, group = test_accuracy(network, run.data), getattr(run.settings, role)
    field = 'verifier' if role == 'verifier' and group.weights else ''
    name = f'The {role} {getattr(group, "factory", "") or group.network}'
    count = len(run.data.test.labels) if run.data else 0
    refuse_chance(share, count, network, name, field, "'' for verifier.network to do without")
    return share


def _train(role: Role, run: Run) -> None:
    """Trains teacher or verifier on the labels of the real training images."""
    group, train = getattr(run.settings, role), run.training_split
    user_module = run.factory_network if role == 'teacher' else None
    like = run.blank_classifier() if role == 'teacher' else run.teacher
    target = TrainTarget('teacher', role, group, like, ROLES[role], user_module=user_module)
    train_network(run, target, _job_of(group.training, len(train.labels)), train.images, train.labels)


def _job_of(settings: LabelTrainingSettings, count: int) -> TrainJob:
    """Returns the training job of teacher or verifier on `count` images."""
    return TrainJob(settings, supervised(settings.label_smoothing), Rounds(count))


def teacher_section(run: Run, found: dict) -> Section:
    """Returns the section; `found` are the figures of the task in results.json."""
    group = run.settings.teacher
    name = group.factory or group.network
    source = f'was read from {group.weights}' if group.weights else f'came from the function {group.factory}'
    if trained := run.is_trained_here('teacher'):
        source = f'was trained here in {group.training.updates:,} updates'
    accuracy = found['test_accuracy']
    return Section(
        'Teacher',
        f'{name}, of {found["parameters"]:,} parameters, {source}'
        + reads_right(accuracy, found['verifier_test_accuracy'], 'the verifier'),
        charts=[training_losses(run.workdir.metrics)] if trained else (),
        tiles=[Tile('Teacher', percent(accuracy), 'real test accuracy', accuracy)],
    )


def training_losses(metrics: Metrics) -> Chart | None:
    """Draws the losses of the teacher and the verifier by update; None if the run trained neither."""
    curves = {
        role.capitalize(): mean_curves(metrics.lines('teacher', role), ['loss'])['loss'] for role in ('teacher', 'verifier')
    }
    return loss_chart(curves, 'Loss of the trainings on real images', 'cross-entropy')
