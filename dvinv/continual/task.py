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
from collections.abc import Sequence

import numpy as np

from dvinv.continual.chains import MAIN, chains_of, name_of, names_of_networks, pools_of, synthesizing
from dvinv.continual.jobs import job_of, loss_of, network_of
from dvinv.continual.moments import names_of_moments, record, with_recorded
from dvinv.continual.scores import figures
from dvinv.continual.stream import Step, steps_of, training_images
from dvinv.continual.validation import validate
from dvinv.data.dataset import Split
from dvinv.data.pool import ImagePool
from dvinv.data.rows import RowArray
from dvinv.distillation.student import hints_of, student_of
from dvinv.distillation.student import job_of as student_job
from dvinv.inversion import Teacher
from dvinv.inversion.modules import trained_part
from dvinv.networks import load_network
from dvinv.pipeline.run import Run
from dvinv.runtime.processes import is_primary
from dvinv.synthesis.adaptive import fill_in_competition
from dvinv.synthesis.synthesizer import fill_pool
from dvinv.training.sampling import Rounds, rounds_of
from dvinv.training.step import TrainJob
from dvinv.training.targets import PlannedTraining, TrainTarget, train_network

__all__ = ['complete', 'planned_trainings', 'run', 'validate']
# See `training.targets.TrainTarget`; the same for all networks, so that compared networks start from the same state.
ROLE = 4


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
                record(run, network, moments[chain], images, labels)
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
