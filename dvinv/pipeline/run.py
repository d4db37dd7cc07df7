"""An open run: its settings, work directory, devices, real data and networks, each opened once. Tasks are given it."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dvinv.config import DataSettings, Settings, SynthesisSettings
from dvinv.data.dataset import RealData
from dvinv.data.real import Datasets
from dvinv.errors import DvinvError, listed
from dvinv.evaluation.scoring import validate_fits
from dvinv.inversion import Teacher
from dvinv.inversion.modules import trained_part, validate_trainable
from dvinv.inversion.recording import with_shapes
from dvinv.inversion.teacher import teacher_of, trusted_linen
from dvinv.networks import Classifier, create, load_classifier, load_network, read_classifier, shapes_of
from dvinv.networks.classifier import check_finite, flatten
from dvinv.networks.files import refuse_other
from dvinv.runtime.devices import make_mesh, training_mesh
from dvinv.runtime.workdir import Workdir
from dvinv.teacher import factories
from dvinv.teacher.verifiers import print_pixels, read_verifier, validate_judge

Role = Literal['teacher', 'verifier']
MEASURED = 10_000  # images, at most, that the mean and std of pixels are measured on


class Run:
    """What the tasks of a run share.

    Attributes:
      settings: of the run.
      noise_seed: that the first noise of images is drawn from.
      path: of the work directory; None: there will be none.
      mesh: the devices of this process that are used.
      training_mesh: the devices of all processes that a batch of a training is split over.
    """

    def __init__(self, settings: Settings, path: str | Path = ''):
        """Finds the devices; everything else is opened when it is first asked for.

        Args:
          path: of the work directory, which `open_workdir` opens; '': there will be none.

        Raises:
          DvinvError: more devices than there are.
        """
        self.settings, self.noise_seed = settings, settings.seed
        self.path = Path(path) if path else None
        self.mesh = make_mesh(settings.devices)
        self.training_mesh = training_mesh(self.mesh)
        self._datasets, self._workdir, self._validated = Datasets(), None, set()

    def with_synthesis(self, synthesis: SynthesisSettings, seed: int) -> 'Run':
        """Returns the same run with another synthesis, from noise by another seed; what is open is shared."""
        other = copy.copy(self)
        other.settings, other.noise_seed = dataclasses.replace(self.settings, synthesis=synthesis), seed
        return other

    def once(self, validate: Callable[['Run'], None]) -> None:
        """Calls a validation that several tasks need, the first time."""
        if validate not in self._validated:
            self._validated.add(validate)
            validate(self)

    @property
    def workdir(self) -> Workdir:
        """The work directory; there is none while settings are validated, and for `--plan`."""
        assert self._workdir is not None, 'the work directory is not open'
        return self._workdir

    def open_workdir(self) -> Workdir:
        """Opens the work directory, which `workdir` is from then on; to be closed by the caller.

        Raises:
          DvinvError: see `Workdir`.
        """
        self._workdir = Workdir(self.path, self.settings)
        return self._workdir

    def is_finished(self, name: str) -> bool:
        """Whether the file of a network is in the work directory, open or not."""
        return (self.path / 'networks' / f'{name}.safetensors').exists() if self.path else False

    # Real data

    @property
    def data(self) -> RealData | None:
        """The real data; None for a run without any."""
        return self.read_data(self.settings.data)

    def read_data(self, settings: DataSettings) -> RealData | None:
        """Returns the real data of other settings than the run's own, of a task of continual learning for instance.

        Raises:
          DvinvError: see `load_real`.
        """
        return self._datasets.load(settings)

    # Networks

    def is_trained_here(self, role: Role) -> bool:
        """Whether the task teacher trains this network."""
        if role == 'verifier':
            return bool(self.settings.verifier.network) and not self.settings.verifier.weights
        group = self.settings.teacher
        if group.factory:
            return not group.weights and not isinstance(self.factory_network, Teacher)
        return bool(group.network) and not group.weights

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is given, or trained already, with the moments that are recorded here."""
        recorded = not self.settings.teacher.moments_images or self.workdir.has_network('moments')
        return recorded and (not self.is_trained_here('teacher') or self.workdir.has_network('teacher'))

    @functools.cached_property
    def factory_network(self) -> Any:
        """What the function of `teacher.factory` returns: a Teacher, or a network to be trained; None without a function.

        Raises:
          DvinvError: see `factories.of_teacher`.
        """
        name = self.settings.teacher.factory
        return factories.of_teacher(name, lambda: self.data.num_classes if self.data else None) if name else None

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher: from the user's function, from a weights file, or as the task `teacher` trained it.

        It has the moments that the settings name, or that the task recorded.

        Raises:
          DvinvError: it is not there, cannot be imported, or cannot be inverted.
        """
        group = self.settings.teacher
        if group.moments:
            return self.bare_teacher.with_moments(group.moments)
        if not group.moments_images:
            return self.bare_teacher
        if not self.workdir.has_network('moments'):
            raise DvinvError(
                f'There are no moments in {self.workdir.path} yet; run the task teacher first, or set teacher.moments.'
            )
        return self.bare_teacher.with_moments(self.workdir.network('moments'))

    @functools.cached_property
    def bare_teacher(self) -> Teacher:
        """The teacher without recorded moments."""
        group = self.settings.teacher
        if isinstance(self.factory_network, Teacher):
            # It may have been changed since it was made.
            check_finite(self.factory_network.variables, f'teacher.factory {group.factory!r}')
            return self.factory_network
        module, variables, about = self.teacher_parts
        if group.factory:
            return teacher_of(module, variables, **{name: about[name] for name in ('image_shape', 'mean', 'std')})
        return self._invertible(module, variables, about)

    @functools.cached_property
    def planned_teacher(self) -> Teacher:
        """The teacher, with shapes for weights where it is yet to be trained; for validation and `--plan`.

        Raises:
          DvinvError: it cannot be inverted, or does not fit the data.
        """
        group, data = self.settings.teacher, self.data
        if not (group.factory or group.network):
            raise DvinvError("teacher.network is empty; name a network, or a function by teacher.factory='module:function'.")
        self._validate_moments()
        if self.is_trained_here('teacher'):
            teacher = self._blank_teacher()
        else:
            teacher = self.bare_teacher.with_moments(group.moments) if group.moments else self.bare_teacher
        if group.moments_images:
            teacher = with_shapes(teacher)
        if not (group.factory or self.is_trained_here('teacher')):
            print_pixels(group, 'teacher', teacher)
        if data is not None:
            validate_fits(teacher, data)
            chosen = self.settings.data.classes
            # The first classes keep their numbers; the task continual has a validation of its own.
            if (
                len(chosen) < teacher.num_classes
                and chosen != (*range(len(chosen)),)
                and 'continual' not in self.settings.tasks
            ):
                raise DvinvError(
                    f'data.classes names {len(chosen)} classes, which are numbered again from 0, but the teacher knows '
                    f'{teacher.num_classes}, so that their labels would be of other classes; leave data.classes out, or '
                    'give a teacher of these classes alone.'
                )
        return teacher

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the teacher, whether it is trained already or not."""
        group = self.settings.teacher
        if not self.is_trained_here('teacher') and (group.factory or group.network):
            return self.bare_teacher.image_shape
        return self.data.image_shape if self.data else self.planned_teacher.image_shape  # which refuses it

    @functools.cached_property
    def teacher_parts(self) -> tuple[Any, Any, dict]:
        """(module, variables, description) of the teacher, as `networks.read_classifier` gives them.

        The description has the network '' for a user's own.

        Raises:
          DvinvError: the file is not there, or of another network.
        """
        group, given = self.settings.teacher, {}
        if group.factory:
            return self._own_parts()
        if group.weights:  # else the file is of this run, and so are the settings that it was made with
            given = {'mean': group.mean, 'std': group.std, 'image_shape': group.image_shape, 'width': group.width}
        return read_classifier(self._file('teacher'), group.network, field='teacher.network', **given)

    def own_module(self, teacher: Teacher | None = None) -> Any:
        """Returns the user's network that is the teacher; None: it is one of dvinv's, known by its name.

        Args:
          teacher: another one made from the run's, with more classes for instance; None: the run's.
        """
        return (teacher or self.planned_teacher).module if self.settings.teacher.factory else None

    @functools.cached_property
    def verifier(self) -> Classifier | None:
        """The network that judges the images, independent of the teacher; None where the settings name none.

        Raises:
          DvinvError: it is not there, or takes other pictures or classes than the teacher.
        """
        group, teacher = self.settings.verifier, self.planned_teacher
        if not group.network:
            return None
        given = bool(group.weights)
        verifier = read_verifier(group, 'verifier', teacher) if given else load_classifier(self._file('verifier'))
        validate_judge(teacher, verifier, 'verifier', 'verifier', "'' for verifier.network to do without")
        return verifier

    def student_module(self, teacher: Teacher) -> Any:
        """Returns the run's student of `teacher`: a Linen module that takes x and `train`, or what has its `init`, `apply`.

        Raises:
          DvinvError: there is no such network, or it cannot be trained here.
        """
        group = self.settings.student
        if not group.factory:
            return create(group.network, teacher.num_classes, group.width)
        key = group.factory, teacher.image_shape, teacher.num_classes
        if key not in self._students:
            module = factories.of_student(group.factory, teacher.num_classes)
            name = f'The network of student.factory {group.factory!r}'
            validate_trainable(module, teacher.image_shape, teacher.num_classes, name)
            self._students[key] = module
        return self._students[key]

    @functools.cached_property
    def _students(self) -> dict:
        return {}

    def validate_changeable(self) -> None:
        """Validates that the teacher can be changed and trained on, as pruning and continual learning do.

        Raises:
          DvinvError: see `validate_trainable`; or its function made the Teacher without telling the module.
        """
        teacher = self.planned_teacher
        if self.settings.teacher.factory:
            name = f'The network of teacher.factory {self.settings.teacher.factory!r}'
            if teacher.module is None:
                raise DvinvError(
                    f'{name} is not known; return what dvinv.from_linen or dvinv.from_nnx makes, which keep it.'
                )
            validate_trainable(teacher.module, teacher.image_shape, teacher.num_classes, name, from_scratch=False)

    def validate_training_data(self) -> None:
        """Validates that there are real images for the networks that the task `teacher` trains.

        Raises:
          DvinvError: there are none, or none of some classes.
        """
        roles = ('teacher', *(('verifier',) if self.settings.needs_verifier else ()))
        needed, data = [role for role in roles if self.is_trained_here(role)], self.data
        for role in needed:
            if data is None or data.train is None:
                field = 'data.name' if data is None else 'data.train_path'
                raise DvinvError(
                    f"The {role} is to be trained, but {field} is ''; name a data set, or give {role}.weights"
                    + (", or '' for verifier.network to do without." if role == 'verifier' else '.')
                )
        if needed and 'teacher' in self.settings.tasks:
            _validate_classes(data)

    def validate_real_control(self, task: str) -> None:
        """Validates that there are real training images where the controls of `task` name 'real'.

        Raises:
          DvinvError: there are none.
        """
        if 'real' in getattr(self.settings, task).controls and not (self.data and self.data.train):
            raise DvinvError(
                f'{task}.controls names real, but there are no real training images; leave it out, or name some by '
                'data.name and data.train_path.'
            )

    def blank_classifier(self) -> Classifier:
        """Returns what a network trained here will be, without weights."""
        data = self.data
        return Classifier(None, None, data.image_shape, data.num_classes, *self._pixels(data))

    def _blank_teacher(self) -> Teacher:
        """Returns the teacher that is trained here, with shapes for weights."""
        self.validate_training_data()
        group, data = self.settings.teacher, self.data
        shape = data.image_shape
        if group.image_shape and group.image_shape != tuple(shape):
            raise DvinvError(
                f'teacher.image_shape is {group.image_shape}, but the teacher is trained here, on images of {tuple(shape)}; '
                'leave it out, or scale these by data.image_size.'
            )
        mean, std = self._pixels(data)
        if group.factory:
            module = self.factory_network
            validate_trainable(module, shape, data.num_classes, f'The network of teacher.factory {group.factory!r}')
            return teacher_of(module, shapes_of(module, shape), image_shape=shape, mean=mean, std=std)
        module = create(group.network, data.num_classes, group.width)
        about = {'image_shape': shape, 'num_classes': data.num_classes, 'mean': mean, 'std': std}
        return self._invertible(module, shapes_of(module, shape), about)

    def _invertible(self, module, variables, about: dict) -> Any:
        """Returns the `Teacher` of a Linen module with its variables and the description of `networks.save_network`.

        Raises:
          DvinvError: it cannot be inverted.
        """
        return trusted_linen(module, variables, image_shape=about['image_shape'], mean=about['mean'], std=about['std'])

    def _validate_moments(self) -> None:
        """Validates that moments are of a network that exists, or that there are images to record them from."""
        group, data = self.settings.teacher, self.data
        if group.moments_images and (data is None or data.train is None):
            raise DvinvError(
                f'teacher.moments_images is {group.moments_images}, but there are no real training images to record moments '
                'from; name some by data.name and data.train_path, or give a file that was made where they are, '
                'teacher.moments=FILE (python -m dvinv.moments).'
            )
        if group.moments and self.is_trained_here('teacher'):
            raise DvinvError(
                f'teacher.moments is {group.moments!r}, but the teacher is yet to be trained, so they are of another '
                'network; record those of this one by teacher.moments_images=100.'
            )

    def _own_parts(self) -> tuple[Any, Any, dict]:
        """Returns what `teacher_parts` is, for `teacher.factory`."""
        own, group = self.factory_network, self.settings.teacher
        if isinstance(own, Teacher):
            about = {name: getattr(own, name) for name in ('num_classes', 'image_shape', 'mean', 'std')}
            return own.module, trained_part(own.variables), {'network': '', 'width': 1.0, **about}
        path = self._file('teacher')
        variables, about = load_network(path)
        if group.weights:
            refuse_other(path, 'teacher.', about, {name: getattr(group, name) for name in ('mean', 'std', 'image_shape')})
        expected, found = (
            {name: tuple(np.shape(leaf)) for name, leaf in flatten(tree).items()}
            for tree in (shapes_of(own, about['image_shape']), variables)
        )
        if expected != found:
            differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            raise DvinvError(
                f'{path} holds other weights than the network of teacher.factory {group.factory!r} has: '
                f'{listed(differing, 3)} differ; give the weights of this network, or another --workdir if it was changed.'
            )
        return own, variables, about

    def _file(self, role: Role) -> Path:
        """Returns the file of teacher or verifier."""
        weights = getattr(self.settings, role).weights
        path = Path(weights or self.workdir.network(role))
        if not weights and not path.exists():
            raise DvinvError(
                f'There is no {role} in {self.workdir.path} yet; run the task teacher first, or set {role}.weights.'
            )
        return path

    def _pixels(self, data: RealData) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the mean and std of a teacher that is trained here."""
        group, half = self.settings.teacher, (0.5,) * data.image_shape[-1]
        usual = half, half
        if group.factory:  # as users do; with the others 0.5 came first, and stays
            rows = np.unique(np.linspace(0, len(data.train.labels) - 1, MEASURED).astype(int))
            pixels = data.train.images[rows].reshape(-1, len(half)) / 255
            usual = tuple(tuple(round(float(v), 4) for v in values) for values in (pixels.mean(0), pixels.std(0)))
        return group.mean or usual[0], group.std or usual[1]


def _validate_classes(data: RealData) -> None:
    """Validates that a data set has a training image of each of its classes."""
    first, count = data.classes_without_images
    if not count:
        return
    numbers = listed([*map(str, first)], 5) if len(first) == count else f'{", ".join(map(str, first[:5]))}, ...'
    present = np.unique(data.train.labels)
    raise DvinvError(
        f'The data set has {data.num_classes} classes by its labels or names, but {count} of them ({numbers}) have no image '
        f'to train on: a network would have outputs that mean nothing, and images would be made of them. Labels count the '
        f'classes from 0, and here the lowest is {present[0]}, the highest {present[-1]}; number them again, or name by '
        'data.classes those that there are.'
    )
