"""The networks that the tasks of a run train, each as a training, from its start to its network file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dvinv.config import StudentSettings, TeacherSettings, VerifierSettings
from dvinv.data.rows import RowArray
from dvinv.networks import Classifier, load_classifier, module_of, save_network
from dvinv.pipeline.run import Run
from dvinv.training.step import TrainJob
from dvinv.training.trainer import Records, Training


@dataclasses.dataclass(frozen=True)
class TrainTarget:
    """A network of a run that is to be trained.

    Attributes:
      task: the task during which the network is trained.
      name: the name of its file, metrics and checkpoints.
      network: settings with the fields `network` and `width`.
      like: A classifier with the same image shape, classes, mean and std.
      role: A number from which, with the seed of the run, `seed_of` computes the seed of the training. Students that are
        compared share it, and so share their initial variables and shuffles.
      part: the number of the training, for a network that is trained several times; each training shuffles differently.
      start: variables to start from (see `Training`); None for random variables.
      kept: the kept channels of a pruned network (see `networks.channels.PrunedModule`).
      user_module: the user's network (see `inversion.modules`), trained instead of `network`; None to train `network`.
      snapshots: the numbers of updates after which the network is saved too, see `snapshot_name`.
    """

    task: str
    name: str
    network: TeacherSettings | VerifierSettings | StudentSettings
    like: Classifier
    role: int
    part: int = 0
    start: dict | None = None
    kept: Mapping[str, tuple[int, ...]] | None = None
    user_module: Any = None
    snapshots: tuple[int, ...] = ()

    @property
    def about(self) -> dict:
        """The description of the network, as `networks.save_network` takes it."""
        about = {field: getattr(self.like, field) for field in ('num_classes', 'image_shape', 'mean', 'std')}
        pruned = {'kept': self.kept} if self.kept else {}
        network, width = ('', 1.0) if self.user_module is not None else (self.network.network, self.network.width)
        return {'network': network, 'width': width, **about, **pruned}

    @property
    def module(self):
        """The network: a Linen module that takes x and `train`, or an object with the same `init` and `apply`."""
        return module_of(self.about, self.user_module)


@dataclasses.dataclass(frozen=True)
class PlannedTraining:
    """Trainings of equal cost that a config asks for; `--plan` times one of them.

    Attributes:
      name: their name in the plan.
      module, job, like: see `Training`.
      networks: the number of networks that are trained in this way.
      teacher: A network that every update also runs forward, or None.
    """

    name: str
    module: Any
    job: TrainJob
    like: Classifier
    networks: int = 1
    teacher: Classifier | None = None


def snapshot_name(name: str, update: int) -> str:
    """Returns the name of the file of a network after a number of updates of its training."""
    return f'{name}_after_{update}'


def seed_of(run: Run, role: int, part: int = 0) -> int:
    """Returns the seed of a training from that of the run; for `role` and `part` see `TrainTarget`."""
    seed = 16 * run.settings.seed + role
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0]) if part else seed


def training_of(run: Run, target: TrainTarget, job: TrainJob) -> Training:
    """Returns the `Training` of a network of a run."""

    def save_snapshot(update: int, variables: dict) -> None:
        save_network(run.workdir.network(snapshot_name(target.name, update)), variables, target.about)

    records = Records(run.workdir, target.task, target.name, run.settings.logging, target.snapshots, save_snapshot)
    seed = seed_of(run, target.role, target.part)
    return Training(target.module, job, target.like, seed, run.training_mesh, records, target.start)


def train_network(run: Run, target: TrainTarget, job: TrainJob, images: RowArray, labels: RowArray) -> Classifier:
    """Returns the trained network; reads it from its file if that exists, otherwise trains (or resumes) and saves it.

    Args:
      run: the run.
      target: the network.
      job: the training.
      images: training images, uint8 [N, H, W, C].
      labels: their labels, int [N].
    """
    path = run.workdir.network(target.name)
    if not run.workdir.has_network(target.name):
        with training_of(run, target, job) as training:
            variables = training.finish(images, labels)
        save_network(path, variables, target.about)
    return load_classifier(path, target.user_module)
