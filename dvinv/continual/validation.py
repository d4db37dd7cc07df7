"""Validation of the task `continual` before anything is written."""

from dvinv.continual.chains import names_of_networks
from dvinv.continual.jobs import head_path, network_of
from dvinv.continual.stream import steps_of, test_images, training_images
from dvinv.distillation import student
from dvinv.errors import DvinvError
from dvinv.inversion.modules import LinenModule, trained_part, with_classes
from dvinv.networks.classifier import MOMENTS, differing_shapes, flatten
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
            f'continual.batch_size is {settings.batch_size}; half of a batch is of new classes, half of old ones, each '
            f'split over the devices ({devices}): choose a multiple of {2 * devices}.'
        )
    if not settings.steps:
        raise DvinvError("continual.steps is empty; name what is to be learned, ({'classes': (5, 6)},) for instance.")
    for value, what in (
        (run.settings.pool, f'pool is {run.settings.pool!r}, but tasks make pools of their own; leave it out.'),
        (
            run.settings.synthesis.classes,
            'synthesis.classes is set, but tasks make images of all classes so far; leave it out.',
        ),
    ):
        if value:
            raise DvinvError(what)
    run.once(synthesizer.validate)
    if run.settings.trains_student:
        run.once(student.validate)
    _validate_network(run)
    steps = steps_of(run, teacher)
    synthesizer.validate_count(run, 'synthesis.images', run.settings.synthesis.images, steps[-1].first)
    old_images = sorted({'replay', 'joint'} & {*settings.controls})
    if old_images and steps[0].source.name and run.read_data(steps[0].source).train is None:
        raise DvinvError(
            f'continual.controls names {old_images[0]}, which wants real images of the old classes, but there are none; '
            'leave it out, or name some by data.train_path.'
        )
    # Test images first, then training images: reading them in turn would open each data set twice for every task.
    for step in steps:
        test_images(run, step)
    for number, step in enumerate(steps):
        if number and all(run.is_finished(name) for name in names_of_networks(settings, number)):
            continue
        if number or old_images:
            training_images(run, step)


def _validate_network(run: Run) -> None:
    """Validates that the head of the teacher matches its data and settings, and that the losses support it."""
    run.validate_changeable()
    settings, group, teacher = run.settings.continual, run.settings.teacher, run.planned_teacher
    if MOMENTS in teacher.variables:
        raise DvinvError(
            'teacher.moments and teacher.moments_images are of the first network alone, and tasks make images of every one '
            'that follows it, too; leave them out (and where these have no BatchNorm, set synthesis.weights.feature=0).'
        )
    blank = network_of(run, teacher, teacher.num_classes)
    if differing_shapes(*(trained_part(network.variables) for network in (blank, teacher))):
        raise DvinvError(
            f'The teacher is not the {group.network} of width {group.width} that the config tells, so it '
            'cannot grow a head; set teacher.network and teacher.width to those of its weights.'
        )
    if group.factory:
        with_classes(teacher.module, teacher.image_shape, teacher.num_classes + 1)  # refuses heads that cannot grow
    data = run.data
    if data is not None and data.num_classes != teacher.num_classes:
        raise DvinvError(
            f"The teacher's head has {teacher.num_classes} classes, but data has {data.num_classes}; name the teacher's "
            'classes by data.classes, what is to be learned by continual.steps, or give teacher.weights of another network.'
        )
    if 'always_be_dreaming' in (settings.loss, *settings.controls):
        if group.factory and not isinstance(teacher.module, LinenModule):
            raise DvinvError(
                "The loss 'always_be_dreaming' listens to the head, which it can in a Linen module, and the network of "
                f"teacher.factory {group.factory!r} is an NNX model; choose 'deepinversion'."
            )
        head = head_path(run, teacher)
        kernel = flatten(blank.variables['params'])[f'{head}/kernel']
        if kernel.ndim != 2:
            raise DvinvError(
                f'The head of {group.factory or group.network} ({head}) is no dense layer, as the '
                "loss 'always_be_dreaming' wants; choose 'deepinversion'."
            )
