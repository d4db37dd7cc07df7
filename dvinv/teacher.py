"""The task `teacher`: the network that is inverted and the verifier that judges the images, trained or read, then scored."""

import functools
import importlib
from pathlib import Path

import jax
import optax

from dvinv.configuration import recipe_of
from dvinv.data.dataset import RealData
from dvinv.data.real import load_real
from dvinv.errors import DvinvError
from dvinv.evaluation import accuracy, flops
from dvinv.inversion.teacher import Teacher, trusted_linen
from dvinv.networks import Classifier, classifier_of, create, read_classifier, shapes_of
from dvinv.networks.classifier import check_finite
from dvinv.rounds import Rounds
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.training import Learner, Lesson, PlannedTraining, learn
from dvinv.verifiers import check_alike, load_others

ROLES = {'teacher': 1, 'verifier': 2}


def run(config, workdir) -> dict:
    """Train what is not given, score teacher and verifier on the real test images; returns the figures."""
    workdir = open_workdir(workdir, config)
    data = load_real(config.data)
    if _is_trained_here('teacher', config):
        _train('teacher', config, workdir, data, _blank(config, data))
    teacher = load(config, workdir)
    if _is_trained_here('verifier', config):
        _train('verifier', config, workdir, data, teacher)
    verifier = load_verifier(config, workdir, teacher)
    return {
        'test_accuracy': test_accuracy(teacher, data),
        'verifier_test_accuracy': test_accuracy(verifier, data) if verifier else None,
        'test_images': len(data.test.labels) if data else None,
        'parameters': teacher.parameters,
        'flops': flops(teacher),
    }


def planned_trainings(config, teacher: Teacher) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`."""
    trainings = []
    for name in ROLES:
        if _is_trained_here(name, config):
            group, count = config[name], len(load_real(config.data).train.labels)
            module = create(group.network, teacher.num_classes, group.width)
            trainings.append(PlannedTraining(name, module, _lesson_of(group, count), teacher))
    return trainings


def complete(config, workdir: Workdir) -> bool:
    """Whether the networks of the finished task are still there: a damaged file is deleted by its owner."""
    return all(workdir.network(name).exists() for name in ROLES if _is_trained_here(name, config))


def is_there(config, workdir: Workdir) -> bool:
    """Whether `load` finds the teacher: it is given, or trained already."""
    return not _is_trained_here('teacher', config) or workdir.network('teacher').exists()


def load(config, workdir: Workdir | None) -> Teacher:
    """The teacher of a run: from the user's factory, from a weights file, or as the task `teacher` trained it.

    Raises:
      DvinvError: it is not there, cannot be imported, or cannot be inverted.
    """
    group = config.teacher
    if group.factory:
        return _from_factory(group.factory)
    module, variables, about = read(config, workdir)
    return trusted_linen(module, variables, image_shape=about['image_shape'], mean=about['mean'], std=about['std'])


def module_of_teacher(config, data: RealData | None):
    """The Linen module of the run's teacher, whether it is trained already or not.

    Raises:
      DvinvError: it comes from a factory, whose module is not known.
    """
    group = config.teacher
    if group.factory:
        raise DvinvError(
            f'teacher.factory is {group.factory!r}, and of what a factory returns the module is not known, which this task '
            'changes; name a network of dvinv.networks by teacher.network and its weights by teacher.weights.'
        )
    if _is_trained_here('teacher', config):
        return create(group.network, data.num_classes, group.width)
    return read(config, None)[0]


def read(config, workdir: Workdir | None):
    """(module, variables, description) of the run's teacher, as `networks.read_classifier` gives them."""
    group = config.teacher
    return _read(config, workdir, 'teacher', group.image_shape, group.mean, group.std)


def description(config, workdir: Workdir) -> dict:
    """What the teacher's network file would tell of it, see `networks.save_network`; 'network' is '' for a user's own."""
    group = config.teacher
    if group.factory:
        teacher = load(config, workdir)
        about = {name: getattr(teacher, name) for name in ('num_classes', 'image_shape', 'mean', 'std')}
        return {'network': '', 'width': 1.0, **about}
    return read(config, workdir)[2]


def load_verifier(config, workdir: Workdir | None, teacher: Teacher) -> Classifier | None:
    """The network that judges the images, independent of the teacher; None where the config names none.

    Raises:
      DvinvError: it is not there, or takes other pictures or classes than the teacher.
    """
    group = config.verifier
    if not group.network:
        return None
    pictures = teacher.image_shape, group.mean or teacher.mean, group.std or teacher.std
    verifier = classifier_of(*_read(config, workdir, 'verifier', *pictures))
    check_alike(teacher, verifier, 'verifier', 'verifier', "'' for verifier.network to do without")
    return verifier


def test_accuracy(network: Classifier, data: RealData | None) -> float | None:
    """The share of the real test images that `network` puts into their class; None without real data."""
    if data is None:
        return None
    check_fits(network, data)
    return accuracy(network, data.test.images, data.test.labels)


def check_fits(teacher: Classifier, data: RealData) -> None:
    """Refuse a data set whose pictures or classes the teacher cannot take."""
    if tuple(teacher.image_shape) != tuple(data.image_shape):
        theirs, ours = ('x'.join(map(str, shape)) for shape in (teacher.image_shape, data.image_shape))
        raise DvinvError(f'The teacher takes images of {theirs} (height x width x channels), but the data set has {ours}.')
    highest = max(int(split.labels.max()) for split in (data.train, data.test) if split)
    if highest >= teacher.num_classes:
        raise DvinvError(
            f'The data set has the label {highest}, but the teacher knows {teacher.num_classes} classes, 0 to '
            f'{teacher.num_classes - 1}.'
        )


def check(config) -> Teacher:
    """Refuse, before anything is written, a teacher that could not be inverted or does not fit the data.

    Returns:
      The teacher, with shapes for weights where it is yet to be trained.
    """
    data = load_real(config.data)
    if not (config.teacher.factory or config.teacher.network):
        raise DvinvError("teacher.network is empty; name a network, or a function by teacher.factory='module:function'.")
    for name in ROLES:
        if _is_trained_here(name, config) and (data is None or data.train is None):
            lacking = 'data.name' if data is None else 'data.train_path'
            raise DvinvError(
                f"The {name} is to be trained, but {lacking} is ''; name a data set, or give {name}.weights"
                + (", or '' for verifier.network to do without." if name == 'verifier' else '.')
            )
    if _is_trained_here('teacher', config):
        group, shape = config.teacher, data.image_shape
        module = create(group.network, data.num_classes, group.width)
        teacher = trusted_linen(module, shapes_of(module, shape), image_shape=shape, mean=group.mean, std=group.std)
    else:
        teacher = load(config, None)
    if data is not None:
        check_fits(teacher, data)
    if _is_trained_here('verifier', config):
        _check_takes('verifier', config.verifier, teacher)
    else:
        load_verifier(config, None, teacher)
    load_others(config, teacher)
    _check_takes('student', config.student, teacher)
    return teacher


def _check_takes(name: str, group, teacher: Teacher) -> None:
    """Refuse, by shapes alone, a network to be trained that cannot take the teacher's images."""
    module = create(group.network, teacher.num_classes, group.width)
    try:
        shapes_of(module, teacher.image_shape)
    except Exception as error:  # Flax and JAX raise many kinds here
        shape, reason = 'x'.join(map(str, teacher.image_shape)), str(error).splitlines()[0]
        raise DvinvError(f'{name}.network is {group.network}, which cannot take images of {shape}: {reason}') from error


def supervised(label_smoothing: float):
    """Cross-entropy to the labels, as the loss of a `Lesson`."""

    def loss(logits, features, x, labels, frozen, progress):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    return loss


def _is_trained_here(name: str, config) -> bool:
    group = config[name]
    return bool(group.network) and not group.weights and not group.get('factory', '')


def _train(name: str, config, workdir: Workdir, data: RealData, like: Classifier) -> None:
    """Teach teacher or verifier the labels of the real training images."""
    group, train = config[name], data.train
    learner = Learner('teacher', name, group, like, ROLES[name])
    learn(config, workdir, learner, _lesson_of(group, len(train.labels)), train.images, train.labels)


def _lesson_of(group, count: int) -> Lesson:
    """Returns how teacher or verifier, by their config group, learn from `count` images."""
    return Lesson(recipe_of(group.training), supervised(group.training.label_smoothing), Rounds(count))


def _read(config, workdir: Workdir | None, name: str, image_shape, mean, std):
    """What `networks.read_classifier` gives of teacher or verifier; `workdir` matters where the config names no file."""
    group = config[name]
    path = Path(group.weights or workdir.network(name))
    if not path.exists() and not group.weights:
        raise DvinvError(f'There is no {name} in {workdir.path} yet; run the task teacher first, or set {name}.weights.')
    pictures = {'image_shape': image_shape, 'mean': mean, 'std': std}
    return read_classifier(path, group.network, width=group.width, **pictures, field=f'{name}.network')


@functools.cache
def _from_factory(name: str) -> Teacher:
    """What the user's 'module:function' returns."""
    module, _, function = name.partition(':')
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DvinvError(
            f"teacher.factory is {name!r}, which cannot be imported ({error}); it must be 'module:function' on "
            'the Python path.'
        ) from error
    teacher = factory()
    if not isinstance(teacher, Teacher):
        raise DvinvError(
            f'teacher.factory {name!r} returned a {type(teacher).__name__}; it must return a dvinv.Teacher, as '
            'dvinv.from_linen and dvinv.from_nnx make.'
        )
    check_finite(teacher.variables, f'teacher.factory {name!r}')  # it may have been changed since it was made
    return teacher


def _blank(config, data: RealData) -> Classifier:
    """What a network trained here will be, without weights."""
    return Classifier(None, None, data.image_shape, data.num_classes, tuple(config.teacher.mean), tuple(config.teacher.std))
