"""Validation of the task `continual` before anything is written."""

from dvinv.continual.chains import names_of_networks
from dvinv.continual.jobs import head_path, network_of
from dvinv.continual.moments import names_of_moments
from dvinv.continual.stream import steps_of, test_images, training_images
from dvinv.distillation import student
from dvinv.errors import DvinvError
from dvinv.inversion.modules import LinenModule, trained_part, with_classes
from dvinv.networks.classifier import differing_shapes, flatten
from dvinv.pipeline.run import Run
from dvinv.synthesis import synthesizer


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
    run.once(synthesizer.validate)
    if run.settings.trains_student:
        run.once(student.validate)
    _validate_network(run)
    steps = steps_of(run, teacher)
    synthesizer.validate_count(run, 'synthesis.images', run.settings.synthesis.images, steps[-1].first)
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
