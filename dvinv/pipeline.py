"""The tasks of a config, one after the other, in one work directory."""

import contextlib
from pathlib import Path

import numpy as np

from dvinv import configuration, distillation, report, synthesis, teacher
from dvinv.configuration import TASKS
from dvinv.continual import check as continual_check
from dvinv.continual import driver as continual
from dvinv.data.real import load_real
from dvinv.errors import DvinvError, say
from dvinv.inversion import Teacher, attention_of, check_labels, check_resolutions, check_statistics, takes_resolutions
from dvinv.pruning import driver as pruning
from dvinv.quantization import driver as quantization
from dvinv.runtime import preemption
from dvinv.runtime.devices import make_mesh, platform_of, training_mesh
from dvinv.runtime.processes import is_primary
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import hints_of, student_of

DRIVERS = {
    'teacher': teacher,
    'synthesis': synthesis,
    'distillation': distillation,
    'pruning': pruning,
    'continual': continual,
    'quantization': quantization,
    'report': report,
}


def check(config, workdir=None) -> Teacher:
    """Refuse what cannot be run, in a sentence, before a work directory is made or touched.

    Args:
      workdir: the path of one where some of it may be done already.

    Returns:
      The teacher, with shapes for weights where it is yet to be trained. `config` has all its fields then.
    """
    chosen = configuration.settle(config, lambda: teacher.image_shape(config))
    configuration.check(config)
    mesh = make_mesh(config.devices)
    if config.pool and not Path(config.pool).is_dir():
        raise DvinvError(f'pool is {config.pool!r}, but there is no such folder.')
    images, batch_size = config.synthesis.images, config.synthesis.batch_size
    makes_images = configuration.makes_images(config)
    if makes_images and images % batch_size:
        raise DvinvError(
            f'synthesis.images is {images}, which batches of {batch_size} do not fill; choose a multiple, for '
            f'instance {max(1, images // batch_size) * batch_size}.'
        )
    split = make_mesh(config.devices, of_all=True).size
    if makes_images and config.bn_stats == 'global' and batch_size % split:
        raise DvinvError(
            f"synthesis.batch_size is {batch_size}, which {split} devices do not divide; with bn_stats='global' "
            'one batch is split over all devices: choose a multiple of their number.'
        )
    idle = split - images // batch_size if makes_images and config.bn_stats == 'device' else 0
    if idle > 0 and is_primary() and (split > mesh.size or platform_of(mesh) != 'cpu'):  # virtual devices share their cores
        say(f'There are {images // batch_size} batches, one a device, so {idle} of {split} devices are idle in synthesis.')
    for name, group in configuration.trainings_of(config).items():
        recipe = configuration.recipe_of(group)
        recipe.check(name)
        recipe.check_devices(name, training_mesh(mesh).size)
    data = load_real(config.data)
    for task in ('distillation', 'pruning', 'quantization'):
        if task in config.tasks and 'real' in config[task].controls and not (data and data.train):
            raise DvinvError(
                f'{task}.controls names real, but there are no real training images; leave it out, or name some by '
                'data.name and data.train_path.'
            )
    to_invert = teacher.check(config)
    if makes_images or 'synthesis' in config.tasks:
        settings = configuration.inversion_config(config)
        if chosen and not takes_resolutions(to_invert, settings):
            for stage in config.synthesis.stages:
                stage.resolution = 0
            settings = configuration.inversion_config(config)
        settings.check(to_invert.image_shape)
        check_resolutions(to_invert, settings)
        if makes_images and config.synthesis.method != 'noise':
            check_statistics(to_invert, settings)
        if makes_images and settings.weights.patch_similarity:
            attention_of(to_invert, settings)
    if makes_images:
        check_labels(np.array(config.synthesis.classes, int), to_invert.num_classes)
        configuration.check_count(config, 'synthesis.images', images, to_invert.num_classes)
    if configuration.trains_student(config):
        hints_of(config, to_invert)
        student_of(config, to_invert)
    if 'pruning' in config.tasks:
        pruning.check(config, to_invert)
    if 'continual' in config.tasks:
        continual_check.check(config, to_invert, workdir)
    if 'quantization' in config.tasks:
        quantization.check(config, to_invert)
    return to_invert


def run(config, workdir) -> dict:
    """Run the config's tasks that `workdir` has no results of yet, or lost files of; returns all results, by task.

    Of several processes all call it, see `runtime.processes`.

    Raises:
      DvinvError: a user's mistake or a full disk, in a sentence. What was finished stays.
      SystemExit: SIGTERM came (where `preemption.install` was called). What was under way is saved.
    """
    check(config, workdir)
    with contextlib.closing(open_workdir(workdir, config)) as workdir:
        for task in TASKS:
            preemption.leave_if_asked()
            if task in config.tasks and not _finished(task, config, workdir):
                run_task(task, config, workdir)
        return workdir.results


def _finished(task: str, config, workdir: Workdir) -> bool:
    if task == 'report' or task not in workdir.results:
        return False
    if not (complete := DRIVERS[task].complete(config, workdir)):
        say(f'{task} has results, but not all of its files are there: it runs again.')
    return complete


def run_task(task: str, config, workdir: Workdir) -> None:
    """One task: its driver's figures, its time and its seed go into results.json."""
    workdir.start_clock(task)
    figures = DRIVERS[task].run(config, workdir)
    if figures is not None:
        workdir.add_results(task, {**figures, 'seed': config.seed, 'wall_seconds': round(workdir.wall_seconds(task), 2)})
