"""The open run that all tasks are passed: settings, work directory, devices, real data and networks, each opened once."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dvinv.config import DataSettings, Settings, SynthesisSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.real import Datasets
from dvinv.evaluation import validate_fits
from dvinv.inversion import Teacher
from dvinv.inversion.linen_modules import trained_part, validate_trainable
from dvinv.inversion.recording import with_shapes
from dvinv.inversion.teacher import teacher_of, trusted_linen
from dvinv.networks import Classifier, create, load_classifier, load_network, read_classifier, shapes_of
from dvinv.networks.classifier import check_finite, differing_shapes
from dvinv.networks.files import refuse_other
from dvinv.runtime.devices import make_mesh, training_mesh
from dvinv.runtime.errors import DvinvError, listed
from dvinv.runtime.workdir import Workdir, network_path
from dvinv.teacher import networks
from dvinv.teacher.networks import print_pixels, read_verifier, validate_judge

Role = Literal['teacher', 'verifier']
MEASURED = 10_000  # maximum number of images that the mean and std of pixels are measured on


class Run:
    """The state that the tasks of a run share.

    Attributes:
      settings: the settings of the run.
      noise_seed: the seed of the initial noise of images.
      path: the path of the work directory; None for a run without one.
      mesh: the devices of this process that are used.
      training_mesh: the devices of all processes that a training batch is split over.
    """

    def __init__(self, settings: Settings, path: str | Path = '') -> None:
        """Finds the devices; everything else is opened at its first use.

        Args:
          settings: the settings of the run.
          path: the path of the work directory, which `open_workdir` opens; '' for a run without one.

        Raises:
          DvinvError: the settings ask for more devices than there are.
        """
        self.settings, self.noise_seed = settings, settings.seed
        self.path = Path(path) if path else None
        self.mesh = make_mesh(settings.devices)
        self.training_mesh = training_mesh(self.mesh)
        self._datasets = Datasets()
        self._workdir: Workdir | None = None
        self._validated: set[Callable[[Run], None]] = set()
        self._students: dict[tuple, Any] = {}

    def with_synthesis(self, synthesis: SynthesisSettings, seed: int) -> 'Run':
        """Returns the run with other synthesis settings and another noise seed; everything already open is shared."""
        run = copy.copy(self)
        run.settings, run.noise_seed = dataclasses.replace(self.settings, synthesis=synthesis), seed
        return run

    def once(self, validate: Callable[['Run'], None]) -> None:
        """Calls a validation that several tasks share, unless it was called before."""
        if validate not in self._validated:
            self._validated.add(validate)
            validate(self)

    @property
    def workdir(self) -> Workdir:
        """The open work directory; it is not open during validation and for `--plan`."""
        assert self._workdir is not None, 'the work directory is not open'
        return self._workdir

    def open_workdir(self) -> Workdir:
        """Opens the work directory, returns it and sets `workdir` to it; the caller must close it.

        Raises:
          DvinvError: see `Workdir`.
        """
        assert self.path is not None, 'the run has no work directory'
        self._workdir = Workdir(self.path, self.settings)
        return self._workdir

    def is_finished(self, name: str) -> bool:
        """Returns whether the work directory has the file of a network; the work directory need not be open."""
        return network_path(self.path, name).exists() if self.path else False

    # Real data

    @property
    def data(self) -> RealData | None:
        """The real data; None for a run without real data."""
        return self.read_data(self.settings.data)

    def read_data(self, settings: DataSettings) -> RealData | None:
        """Returns the real data of settings other than the run's own, for instance those of a task of continual learning.

        Raises:
          DvinvError: see `load_real`.
        """
        return self._datasets.load(settings)

    @property
    def training_split(self) -> Split:
        """The real training images, for a task after its validation has found that they exist."""
        train = self.data.train if self.data else None
        assert train is not None, 'there are no real training images'
        return train

    # Networks

    def is_trained_here(self, role: Role) -> bool:
        """Returns whether the task `teacher` trains this network."""
        if role == 'verifier':
            return bool(self.settings.verifier.network) and not self.settings.verifier.weights
        group = self.settings.teacher
        if group.factory:
            return not group.weights and not isinstance(self.factory_network, Teacher)
        return bool(group.network) and not group.weights

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is given or already trained, and its moments are recorded if this run records them."""
        recorded = not self.settings.teacher.moments_images or self.workdir.has_network('moments')
        return recorded and (not self.is_trained_here('teacher') or self.workdir.has_network('teacher'))

    @functools.cached_property
    def factory_network(self) -> Any:
        """The result of the function `teacher.factory`: a Teacher, or a network to be trained; None if there is no function.

        Raises:
          DvinvError: see `networks.teacher_of_factory`.
        """
        name = self.settings.teacher.factory
        return networks.teacher_of_factory(name, lambda: self.data.num_classes if self.data else None) if name else None

    @functools.cached_property
    def teacher(self) -> Teacher:
        """The teacher, from the user's function, from a weights file, or from the task `teacher`.

        It has the moments that the settings name, or that the task recorded.

        Raises:
          DvinvError: the teacher is missing, cannot be imported, or cannot be inverted.
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
            # The variables may have changed since the Teacher was made.
            check_finite(self.factory_network.variables, f'teacher.factory {group.factory!r}')
            return self.factory_network
        module, variables, about = self.teacher_parts
        return self._teacher_of(module, variables, about['image_shape'], about['mean'], about['std'])

    @functools.cached_property
    def planned_teacher(self) -> Teacher:
        """The teacher, with shapes for weights if it is yet to be trained; for validation and `--plan`.

        Raises:
          DvinvError: the teacher cannot be inverted, or does not fit the data.
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
            self._validate_chosen_classes(teacher)
        return teacher

    @functools.cached_property
    def teacher_parts(self) -> tuple[Any, Any, dict]:
        """(module, variables, description) of the teacher, as `networks.read_classifier` returns them.

        In the description of a user's own network, the entry `network` is ''.

        Raises:
          DvinvError: the file is missing, or belongs to another network.
        """
        group = self.settings.teacher
        if group.factory:
            return self._own_parts()
        given: dict[str, Any] = {}
        if group.weights:  # otherwise this run wrote the file, with these settings
            given = {'mean': group.mean, 'std': group.std, 'image_shape': group.image_shape, 'width': group.width}
        return read_classifier(self._file('teacher'), group.network, field='teacher.network', **given)

    def user_module(self, teacher: Teacher | None = None) -> Any:
        """Returns the user's network that is the teacher; None if the teacher is one of dvinv's named networks.

        Args:
          teacher: a teacher made from that of the run, for instance with more classes; None for that of the run.
        """
        return (teacher or self.planned_teacher).module if self.settings.teacher.factory else None

    @functools.cached_property
    def verifier(self) -> Classifier | None:
        """The network that judges the images independently of the teacher; None if the settings name no verifier.

        Raises:
          DvinvError: the verifier is missing, or its images or classes differ from those of the teacher.
        """
        group, teacher = self.settings.verifier, self.planned_teacher
        if not group.network:
            return None
        given = bool(group.weights)
        verifier = read_verifier(group, 'verifier', teacher) if given else load_classifier(self._file('verifier'))
        validate_judge(teacher, verifier, 'verifier', 'verifier', "'' for verifier.network to do without")
        return verifier

    def student_module(self, teacher: Teacher) -> Any:
        """Returns the network of the run's student of `teacher`.

        It is a Linen module that takes x and `train`, or an object with the same `init` and `apply`.

        Raises:
          DvinvError: there is no such network, or it cannot be trained.
        """
        group = self.settings.student
        if not group.factory:
            return create(group.network, teacher.num_classes, group.width)
        key = group.factory, teacher.image_shape, teacher.num_classes
        if key not in self._students:
            module = networks.student_of_factory(group.factory, teacher.num_classes)
            name = f'The network of student.factory {group.factory!r}'
            validate_trainable(module, teacher.image_shape, teacher.num_classes, name)
            self._students[key] = module
        return self._students[key]

    def validate_changeable(self) -> None:
        """Validates that the teacher can be modified and trained further, as pruning and continual learning require.

        Raises:
          DvinvError: see `validate_trainable`, or the user's function returned a Teacher without its module.
        """
        teacher = self.planned_teacher
        if self.settings.teacher.factory:
            name = f'The network of teacher.factory {self.settings.teacher.factory!r}'
            if teacher.module is None:
                raise DvinvError(
                    f'{name} is unknown; return a Teacher of dvinv.from_linen or dvinv.from_nnx, which contains it.'
                )
            validate_trainable(teacher.module, teacher.image_shape, teacher.num_classes, name, from_scratch=False)

    def validate_training_data(self) -> None:
        """Validates that there are real images for the networks that the task `teacher` trains.

        Raises:
          DvinvError: there are no training images, or none of some classes.
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
        if needed and data and data.train and 'teacher' in self.settings.tasks:
            _validate_classes(data.train, data.num_classes)

    def validate_real_control(self, task: str) -> None:
        """Validates that there are real training images if the controls of `task` include 'real'.

        Raises:
          DvinvError: there are no real training images.
        """
        if 'real' in getattr(self.settings, task).controls and not (self.data and self.data.train):
            raise DvinvError(
                f'{task}.controls names real, but there are no real training images; leave it out, or name some by '
                'data.name and data.train_path.'
            )

    def blank_classifier(self) -> Classifier:
        """Returns a classifier without network and weights, with the image shape and classes of networks trained here."""
        data = self._training_data
        return Classifier(_no_network, None, data.image_shape, data.num_classes, *self._pixels)

    def _blank_teacher(self) -> Teacher:
        """Returns the teacher that this run trains, with shapes for weights."""
        self.validate_training_data()
        group, data = self.settings.teacher, self._training_data
        shape = data.image_shape
        if group.image_shape and group.image_shape != tuple(shape):
            raise DvinvError(
                f'teacher.image_shape is {group.image_shape}, but the teacher is trained here, on images of {tuple(shape)}; '
                'leave it out, or scale the images by data.image_size.'
            )
        if group.factory:
            module = self.factory_network
            validate_trainable(module, shape, data.num_classes, f'The network of teacher.factory {group.factory!r}')
        else:
            module = create(group.network, data.num_classes, group.width)
        return self._teacher_of(module, shapes_of(module, shape), shape, *self._pixels)

    def _teacher_of(self, module, variables, image_shape, mean, std) -> Teacher:
        """Returns the `Teacher` of the user's network or of one of dvinv's named networks.

        Raises:
          DvinvError: the network cannot be inverted.
        """
        make = teacher_of if self.settings.teacher.factory else trusted_linen
        return make(module, variables, image_shape=image_shape, mean=mean, std=std)

    def _validate_chosen_classes(self, teacher: Teacher) -> None:
        """Validates that `data.classes` does not give other numbers to classes of a teacher that knows more classes."""
        classes = self.settings.data.classes
        keep_numbers = classes == (*range(len(classes)),)
        # The task `continual` validates its classes itself.
        if len(classes) < teacher.num_classes and not keep_numbers and 'continual' not in self.settings.tasks:
            raise DvinvError(
                f'data.classes names {len(classes)} classes, which are numbered again from 0, but the teacher knows '
                f'{teacher.num_classes}, so that their labels would be those of other classes; leave data.classes out, or '
                'give a teacher with these classes only.'
            )

    def _validate_moments(self) -> None:
        """Validates that given moments belong to an existing network, and that there are images to record moments from."""
        group, data = self.settings.teacher, self.data
        if group.moments_images and (data is None or data.train is None):
            raise DvinvError(
                f'teacher.moments_images is {group.moments_images}, but there are no real training images to record moments '
                'from; name some by data.name and data.train_path, or give a file that was made where they are, '
                'teacher.moments=FILE (from the flag --record_moments).'
            )
        if group.moments and self.is_trained_here('teacher'):
            raise DvinvError(
                f'teacher.moments is {group.moments!r}, but the teacher is yet to be trained, so these moments are those of '
                'another network; record those of this one by teacher.moments_images=100.'
            )

    def _own_parts(self) -> tuple[Any, Any, dict]:
        """Returns `teacher_parts` for a teacher from `teacher.factory`."""
        network, group = self.factory_network, self.settings.teacher
        if isinstance(network, Teacher):
            about = {name: getattr(network, name) for name in ('num_classes', 'image_shape', 'mean', 'std')}
            return network.module, trained_part(network.variables), {'network': '', 'width': 1.0, **about}
        path = self._file('teacher')
        variables, about = load_network(path)
        if group.weights:
            refuse_other(path, 'teacher.', about, {name: getattr(group, name) for name in ('mean', 'std', 'image_shape')})
        if differing := differing_shapes(shapes_of(network, about['image_shape']), variables):
            raise DvinvError(
                f'{path} holds other weights than the network of teacher.factory {group.factory!r} has: '
                f'{listed(differing, 3)} differ; give the weights of this network, or another --workdir if it was changed.'
            )
        return network, variables, about

    def _file(self, role: Role) -> Path:
        """Returns the path of the weights of the teacher or verifier."""
        weights = getattr(self.settings, role).weights
        path = Path(weights or self.workdir.network(role))
        if not weights and not path.exists():
            raise DvinvError(
                f'There is no {role} in {self.workdir.path} yet; run the task teacher first, or set {role}.weights.'
            )
        return path

    @property
    def _training_data(self) -> RealData:
        """The real data of a run that trains its teacher, see `validate_training_data`."""
        assert self.data is not None
        return self.data

    @functools.cached_property
    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and std of pixels for a teacher that this run trains."""
        group, data = self.settings.teacher, self._training_data
        channels = data.image_shape[-1]
        default_mean = default_std = (0.5,) * channels
        if group.factory and not (group.mean and group.std):  # measured; dvinv's own networks keep their older default, 0.5
            assert data.train is not None
            rows = np.unique(np.linspace(0, len(data.train.labels) - 1, MEASURED).astype(int))
            pixels = data.train.images[rows].reshape(-1, channels) / 255
            default_mean, default_std = (
                tuple(round(float(value), 4) for value in values) for values in (pixels.mean(0), pixels.std(0))
            )
        return group.mean or default_mean, group.std or default_std


def _validate_classes(train: Split, num_classes: int) -> None:
    """Validates that there is at least one training image of each class."""
    present = np.unique(train.labels)
    count = num_classes - len(present)
    if not count:
        return
    # A wrong label may make billions of classes. At least five of these candidates have no image, if so many have none.
    candidates = np.arange(min(num_classes, len(present) + 5))
    missing = ', '.join(map(str, np.setdiff1d(candidates, present)[:5])) + (', ...' if count > 5 else '')
    raise DvinvError(
        f'The data set has {num_classes} classes by its labels or names, but {count} of them ({missing}) have no training '
        'image: the outputs of a network for them would be untrained, and images of them would be made. Labels count the '
        f'classes from 0; here the lowest is {present[0]}, and the highest is {present[-1]}. Number them again, or list the '
        'existing classes in data.classes.'
    )


def _no_network(variables, x):
    """Takes the place of a network that is yet to be trained; nothing calls it."""
    raise NotImplementedError
