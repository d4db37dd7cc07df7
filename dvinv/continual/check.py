"""What is refused of the task `continual` before anything is written."""

from pathlib import Path

import numpy as np

from dvinv.configuration import check_count, recipe_of
from dvinv.continual.chains import names_of_networks
from dvinv.continual.lesson import head_path, network_of
from dvinv.continual.settings import settings_of
from dvinv.continual.stream import steps_of, test_images, training_images
from dvinv.data.real import load_real
from dvinv.errors import DvinvError
from dvinv.inversion import Teacher
from dvinv.inversion.modules import LinenModule, trained_part, with_classes
from dvinv.networks.classifier import MOMENTS, flatten
from dvinv.runtime.devices import make_mesh, training_mesh
from dvinv.teacher import check_changeable


def check(config, teacher: Teacher, workdir=None) -> None:
    """Refuse, before anything is written, tasks that could not be learned.

    Args:
      teacher: with shapes for weights where it is yet to be trained.
      workdir: a path. The images of tasks that have been learned there are not asked for.

    Raises:
      DvinvError: names the field, its value and the way out.
    """
    settings, recipe = settings_of(config), recipe_of(config.continual)
    settings.check()
    recipe.check('continual')
    devices = training_mesh(make_mesh(config.devices)).size
    if recipe.batch_size % (2 * devices):
        raise DvinvError(
            f'continual.batch_size is {recipe.batch_size}; half of a batch is of new classes, half of old ones, each split '
            f'over the devices ({devices}): choose a multiple of {2 * devices}.'
        )
    recipe.check_labels('continual')
    if not settings.steps:
        raise DvinvError("continual.steps is empty; name what is to be learned, ({'classes': (5, 6)},) for instance.")
    for value, what in (
        (config.pool, f'pool is {config.pool!r}, but tasks make pools of their own; leave it out.'),
        (config.synthesis.classes, 'synthesis.classes is set, but tasks make images of all classes so far; leave it out.'),
    ):
        if value:
            raise DvinvError(what)
    _check_network(config, teacher, settings)
    steps = steps_of(config, teacher)
    check_count(config, 'synthesis.images', config.synthesis.images, steps[-1].first)
    old_images = sorted({'replay', 'joint'} & {*settings.controls})
    if old_images and steps[0].source.name and load_real(steps[0].source).train is None:
        raise DvinvError(
            f'continual.controls names {old_images[0]}, which wants real images of the old classes, but there are none; '
            'leave it out, or name some by data.train_path.'
        )
    for number, step in enumerate(steps):
        test_images(step)
        if workdir and number and all(_is_there(workdir, name) for name in names_of_networks(config, number)):
            continue
        if number or old_images:
            training_images(step)


def _is_there(workdir, name: str) -> bool:
    return (Path(workdir) / 'networks' / f'{name}.safetensors').exists()


def _check_network(config, teacher: Teacher, settings) -> None:
    """Refuse a teacher whose head does not match its data or config, and a head that a loss cannot take."""
    check_changeable(config, teacher)
    if MOMENTS in teacher.variables:
        raise DvinvError(
            'teacher.moments and teacher.moments_images are of the first network alone, and tasks make images of every one '
            'that follows it, too; leave them out (and where these have no BatchNorm, set synthesis.weights.feature=0).'
        )
    blank = network_of(config, teacher, teacher.num_classes)
    ours, theirs = (
        {path: tuple(np.shape(leaf)) for path, leaf in flatten(trained_part(network.variables)).items()}
        for network in (blank, teacher)
    )
    if ours != theirs:
        raise DvinvError(
            f'The teacher is not the {config.teacher.network} of width {config.teacher.width} that the config tells, so it '
            'cannot grow a head; set teacher.network and teacher.width to those of its weights.'
        )
    if config.teacher.factory:
        with_classes(teacher.module, teacher.image_shape, teacher.num_classes + 1)  # refuses a head that cannot grow
    data = load_real(config.data)
    if data is not None and data.num_classes != teacher.num_classes:
        raise DvinvError(
            f"The teacher's head has {teacher.num_classes} classes, but data has {data.num_classes}; name the teacher's "
            'classes by data.classes, what is to be learned by continual.steps, or give teacher.weights of another network.'
        )
    if 'always_be_dreaming' in (settings.loss, *settings.controls):
        if config.teacher.factory and not isinstance(teacher.module, LinenModule):
            raise DvinvError(
                "The loss 'always_be_dreaming' listens to the head, which it can in a Linen module, and the network of "
                f"teacher.factory {config.teacher.factory!r} is an NNX model; choose 'deepinversion'."
            )
        head = head_path(config, teacher)
        kernel = flatten(blank.variables['params'])[f'{head}/kernel']
        if kernel.ndim != 2:
            raise DvinvError(
                f'The head of {config.teacher.factory or config.teacher.network} ({head}) is no dense layer, as the '
                "loss 'always_be_dreaming' wants; choose 'deepinversion'."
            )
