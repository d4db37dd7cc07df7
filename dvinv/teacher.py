"""The task `teacher`: the network that is inverted and the verifier that judges the images, trained or read, then scored."""

from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import optax

from dvinv.configuration import is_trained_here, judges, recipe_of, trains_student
from dvinv.data.dataset import RealData
from dvinv.data.real import load_real
from dvinv.errors import DvinvError, listed
from dvinv.evaluation import accuracy, flops
from dvinv.factories import of_teacher
from dvinv.inversion.augmentation import Augmentation
from dvinv.inversion.modules import check_trainable, trained_part
from dvinv.inversion.moments import Moments
from dvinv.inversion.recording import LEAST, record_moments, with_shapes
from dvinv.inversion.teacher import Teacher, teacher_of, trusted_linen
from dvinv.networks import Classifier, create, load_classifier, load_network, read_classifier, shapes_of
from dvinv.networks.classifier import check_finite, flatten
from dvinv.networks.files import refuse_other
from dvinv.rounds import Rounds
from dvinv.runtime.processes import is_primary, meet
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import say_larger
from dvinv.training import Learner, Lesson, PlannedTraining, learn
from dvinv.verifiers import check_alike, load_others, print_pixels, read_verifier, refuse_chance

MEASURED = 10_000  # images, at most, of which the mean and std of pixels are taken
NO_IMAGES = 'There are no real training images to record moments from'
ROLES = {'teacher': 1, 'verifier': 2}


def run(config, workdir) -> dict:
    """Train what is not given, score teacher and verifier on the real test images; returns the figures."""
    workdir = open_workdir(workdir, config)
    data, verifier, scores = load_real(config.data), None, {}
    teacher = _blank(config, data) if is_trained_here('teacher', config) else load_bare(config, workdir)
    if config.verifier.network and config.verifier.weights:  # first: it may be refused
        verifier = load_verifier(config, workdir, teacher)
        scores['verifier'] = _score('verifier', verifier, data, config)
    if is_trained_here('teacher', config):
        _train('teacher', config, workdir, data, teacher)
        teacher = load_bare(config, workdir)
    if config.teacher.moments_images:
        _record(config, workdir, data, teacher)
    scores['teacher'] = _score('teacher', teacher, data, config)
    if is_trained_here('verifier', config):
        _train('verifier', config, workdir, data, teacher)
        verifier = load_verifier(config, workdir, teacher)
        scores['verifier'] = _score('verifier', verifier, data, config)
    return {
        'test_accuracy': scores['teacher'],
        'verifier_test_accuracy': scores.get('verifier'),
        'test_images': len(data.test.labels) if data else None,
        'parameters': teacher.parameters,
        'flops': flops(teacher),
    }


def _score(role: str, network: Classifier, data: RealData | None, config) -> float | None:
    """Returns the test accuracy of 'teacher' or 'verifier'; refuses a verifier that was given and recognises nothing."""
    share = test_accuracy(network, data)
    field = 'verifier' if role == 'verifier' and config.verifier.weights else ''
    name = f'The {role} {config[role].get("factory") or config[role].network}'
    refuse_chance(share, len(data.test.labels) if data else 0, network, name, field, "'' for verifier.network to do without")
    return share


def planned_trainings(config, teacher: Teacher) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`."""
    trainings = []
    for name in ROLES:
        if is_trained_here(name, config):
            group, count = config[name], len(load_real(config.data).train.labels)
            own = own_module(config, teacher) if name == 'teacher' else None
            module = create(group.network, teacher.num_classes, group.width) if own is None else own
            trainings.append(PlannedTraining(name, module, _lesson_of(group, count), teacher))
    return trainings


def complete(config, workdir: Workdir) -> bool:
    """Whether the networks of the finished task are still there: a damaged file is deleted by its owner."""
    recorded = ('moments',) if config.teacher.moments_images else ()
    return all(workdir.has_network(name) for name in (*(n for n in ROLES if is_trained_here(n, config)), *recorded))


def is_there(config, workdir: Workdir) -> bool:
    """Whether `load` finds the teacher: it is given, or trained already."""
    recorded = not config.teacher.moments_images or workdir.has_network('moments')
    return recorded and (not is_trained_here('teacher', config) or workdir.has_network('teacher'))


def load(config, workdir: Workdir | None) -> Teacher:
    """The teacher of a run: from the user's factory, from a weights file, or as the task `teacher` trained it.

    It has the moments that the config names, or the task recorded; without `workdir`, the shapes of these.

    Raises:
      DvinvError: it is not there, cannot be imported, or cannot be inverted.
    """
    teacher, group = load_bare(config, workdir), config.teacher
    if group.moments:
        return teacher.with_moments(group.moments)
    if not group.moments_images:
        return teacher
    if workdir is None:
        return with_shapes(teacher)
    if not workdir.has_network('moments'):
        raise DvinvError(f'There are no moments in {workdir.path} yet; run the task teacher first, or set teacher.moments.')
    return teacher.with_moments(workdir.network('moments'))


def statistics_of(config, workdir: Workdir, teacher: Teacher) -> str:
    """Returns what the images of a teacher are drawn to, in words."""
    layers, group = len(teacher.statistics(teacher.variables)), config.teacher
    if group.moments or group.moments_images:
        moments = Moments.load(group.moments or workdir.network('moments'))
        return f'recorded moments of {moments.images:,} images, {layers} layers'
    return f'running statistics, {layers} layers' if layers else 'none'


def _record(config, workdir: Workdir, data: RealData, teacher: Teacher) -> None:
    """Records the moments that the config asks for into the work directory."""
    if not workdir.has_network('moments'):
        moments = record(config, data, teacher, config.teacher.moments_images)
        if is_primary():
            moments.save(workdir.network('moments'))
        meet('moments of the teacher')


def record(config, data: RealData | None, teacher: Teacher, images: int, layers: Iterable[str] = ()) -> Moments:
    """Records the moments of so many real training images, as `teacher.training` shows them, as many of each class.

    Raises:
      DvinvError: there are no training images, or see `record_moments`.
    """
    if data is None or data.train is None:
        raise DvinvError(f'{NO_IMAGES}; name some by data.name and data.train_path.')
    check_fits(teacher, data)
    labels = data.train.labels
    order = np.random.default_rng(config.seed).permutation(len(labels))
    turns = np.zeros(len(labels), int)  # of an image among those of its class
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        turns[rows] = np.arange(len(rows))
    chosen = np.sort(np.argsort(turns, kind='stable')[: max(0, images)])
    look = recipe_of(config.teacher.training).look
    look = None if look == Augmentation() else look
    return record_moments(teacher, data.train.images[chosen], layers, augmentation=look, key=config.seed)


def load_bare(config, workdir: Workdir | None) -> Teacher:
    """`load` without recorded moments."""
    group = config.teacher
    if group.factory:
        teacher = of_teacher(config)
        if not isinstance(teacher, Teacher):
            module, variables, about = read(config, workdir)
            return teacher_of(module, variables, **{name: about[name] for name in ('image_shape', 'mean', 'std')})
        check_finite(teacher.variables, f'teacher.factory {group.factory!r}')  # it may have been changed since it was made
        return teacher
    return _to_invert(*read(config, workdir))


def _to_invert(module, variables, about: dict) -> Teacher:
    """Returns the `Teacher` of a Linen module with its variables and the description of `networks.save_network`.

    Raises:
      DvinvError: it cannot be inverted.
    """
    return trusted_linen(module, variables, image_shape=about['image_shape'], mean=about['mean'], std=about['std'])


def image_shape(config) -> tuple[int, int, int]:
    """(H, W, C) of the run's teacher, whether it is trained already or not."""
    if not is_trained_here('teacher', config) and (config.teacher.factory or config.teacher.network):
        return load_bare(config, None).image_shape
    data = load_real(config.data)
    return data.image_shape if data else check(config).image_shape  # which refuses it


def own_module(config, teacher: Teacher):
    """Returns the user's network of `teacher`; None: it is one of dvinv's, known by its name."""
    return teacher.module if config.teacher.factory else None


def check_changeable(config, teacher: Teacher) -> None:
    """Refuses a user's network that is to be changed and trained on, as pruning and continual learning do, and cannot be.

    Raises:
      DvinvError: see `check_trainable`; or its function made the Teacher without telling the module.
    """
    if config.teacher.factory:
        name = f'The network of teacher.factory {config.teacher.factory!r}'
        if teacher.module is None:
            raise DvinvError(f'{name} is not known; return what dvinv.from_linen or dvinv.from_nnx makes, which keep it.')
        check_trainable(teacher.module, teacher.image_shape, teacher.num_classes, name, from_scratch=False)


def read(config, workdir: Workdir | None):
    """(module, variables, description) of the run's teacher, as `networks.read_classifier` gives them."""
    group, given = config.teacher, {}
    if group.factory:
        return _read_own(config, workdir)
    if group.weights:  # else the file is of this run, and so are the settings that it was made with
        given = {'mean': tuple(group.mean), 'std': tuple(group.std), 'image_shape': group.image_shape, 'width': group.width}
    return read_classifier(_file(config, workdir, 'teacher'), group.network, field='teacher.network', **given)


def description(config, workdir: Workdir) -> dict:
    """What the teacher's network file would tell of it, see `networks.save_network`; 'network' is '' for a user's own."""
    return read(config, workdir)[2]


def _read_own(config, workdir: Workdir | None):
    """Returns what `read` does, for `teacher.factory`."""
    own, group = of_teacher(config), config.teacher
    if isinstance(own, Teacher):
        about = {name: getattr(own, name) for name in ('num_classes', 'image_shape', 'mean', 'std')}
        return own.module, trained_part(own.variables), {'network': '', 'width': 1.0, **about}
    path = _file(config, workdir, 'teacher')
    variables, about = load_network(path)
    if group.weights:
        given = {'mean': tuple(group.mean), 'std': tuple(group.std), 'image_shape': group.image_shape}
        refuse_other(path, 'teacher.', about, given)
    ours, theirs = (
        {name: tuple(np.shape(leaf)) for name, leaf in flatten(tree).items()}
        for tree in (shapes_of(own, about['image_shape']), variables)
    )
    if ours != theirs:
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise DvinvError(
            f'{path} holds other weights than the network of teacher.factory {group.factory!r} has: {listed(differing, 3)} '
            'differ; give the weights of this network, or another --workdir if it was changed.'
        )
    return own, variables, about


def load_verifier(config, workdir: Workdir | None, teacher: Teacher) -> Classifier | None:
    """The network that judges the images, independent of the teacher; None where the config names none.

    Raises:
      DvinvError: it is not there, or takes other pictures or classes than the teacher.
    """
    group = config.verifier
    if not group.network:
        return None
    if group.weights:
        verifier = read_verifier(group, 'verifier', teacher)
    else:
        verifier = load_classifier(_file(config, workdir, 'verifier'))
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
    if data.by_position and data.num_classes != teacher.num_classes:
        raise DvinvError(
            f'The data set has folders of {data.num_classes} classes, but the teacher knows {teacher.num_classes}, and the '
            'names of the folders do not tell which these are; give data.class_names, the names of all classes in the order '
            "of the teacher's, or name the folders by the numbers of their classes, from 0."
        )
    highest = max(int(split.labels.max()) for split in (data.train, data.test) if split)
    if highest >= teacher.num_classes:
        raise DvinvError(
            f'The data set has the label {highest}, but the teacher knows {teacher.num_classes} classes, 0 to '
            f'{teacher.num_classes - 1}.'
        )


def check(config) -> Teacher | Classifier:
    """Refuse, before anything is written, a teacher that could not be inverted or does not fit the data.

    Returns:
      The teacher, with shapes for weights where it is yet to be trained.
    """
    data = load_real(config.data)
    if not (config.teacher.factory or config.teacher.network):
        raise DvinvError("teacher.network is empty; name a network, or a function by teacher.factory='module:function'.")
    needed = [name for name in ROLES if is_trained_here(name, config) and (name == 'teacher' or judges(config))]
    for name in needed:
        if data is None or data.train is None:
            lacking = 'data.name' if data is None else 'data.train_path'
            raise DvinvError(
                f"The {name} is to be trained, but {lacking} is ''; name a data set, or give {name}.weights"
                + (", or '' for verifier.network to do without." if name == 'verifier' else '.')
            )
    if needed and 'teacher' in config.tasks:
        _check_classes(data)
    _check_moments(config, data)
    if is_trained_here('teacher', config):
        group, shape = config.teacher, data.image_shape
        if group.image_shape and tuple(group.image_shape) != tuple(shape):
            raise DvinvError(
                f'teacher.image_shape is {tuple(group.image_shape)}, but the teacher is trained here, on images of '
                f'{tuple(shape)}; leave it out, or scale these by data.image_size.'
            )
        mean, std = _pixels(config, data)
        if group.factory:
            module = of_teacher(config)
            check_trainable(module, shape, data.num_classes, f'The network of teacher.factory {group.factory!r}')
            teacher = teacher_of(module, shapes_of(module, shape), image_shape=shape, mean=mean, std=std)
        else:
            module = create(group.network, data.num_classes, group.width)
            about = {'image_shape': shape, 'num_classes': data.num_classes, 'mean': mean, 'std': std}
            teacher = _to_invert(module, shapes_of(module, shape), about)
        if config.teacher.moments_images:
            teacher = with_shapes(teacher)
    else:
        teacher = load(config, None)
        if not config.teacher.factory:
            print_pixels(config.teacher, 'teacher', teacher)
    if data is not None:
        check_fits(teacher, data)
        chosen = tuple(config.data.classes)
        # The first classes keep their numbers; the task continual has a check of its own.
        if len(chosen) < teacher.num_classes and chosen != (*range(len(chosen)),) and 'continual' not in config.tasks:
            raise DvinvError(
                f'data.classes names {len(chosen)} classes, which are numbered again from 0, but the teacher knows '
                f'{teacher.num_classes}, so that their labels would be of other classes; leave data.classes out, or give a '
                'teacher of these classes alone.'
            )
    if judges(config):
        if is_trained_here('verifier', config):
            _check_takes('verifier', config.verifier, teacher)
        elif verifier := load_verifier(config, None, teacher):
            print_pixels(config.verifier, 'verifier', verifier)
    if judges(config) or 'report' in config.tasks:
        load_others(config, teacher, say=True)
    if trains_student(config):
        if not config.student.factory:
            _check_takes('student', config.student, teacher)
        say_larger(config, teacher)
    return teacher


def _check_moments(config, data: RealData | None) -> None:
    """Refuse moments that are of no network yet, or that there are no images for."""
    group, count = config.teacher, config.teacher.moments_images
    if count and (count < LEAST or group.moments):
        raise DvinvError(
            f'teacher.moments_images is {count}'
            + (f', and teacher.moments is {group.moments!r}; give one of them.' if group.moments else '')
            + ('' if group.moments else f'; moments are of at least {LEAST} images, better of 100 (0: none are recorded).')
        )
    if count and (data is None or data.train is None):
        raise DvinvError(
            f'teacher.moments_images is {count}, but {NO_IMAGES[0].lower()}{NO_IMAGES[1:]}; name some by data.name and '
            'data.train_path, or give a file that was made where they are, teacher.moments=FILE '
            '(python -m dvinv.moments).'
        )
    if group.moments and is_trained_here('teacher', config):
        raise DvinvError(
            f'teacher.moments is {group.moments!r}, but the teacher is yet to be trained, so they are of another network; '
            'record those of this one by teacher.moments_images=100.'
        )


def _check_classes(data: RealData) -> None:
    """Refuse to train on a data set that has no training image of some of its classes."""
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


def _train(name: str, config, workdir: Workdir, data: RealData, like: Classifier) -> None:
    """Teach teacher or verifier the labels of the real training images."""
    group, train = config[name], data.train
    own = of_teacher(config) if name == 'teacher' and group.factory else None
    learner = Learner('teacher', name, group, like, ROLES[name], own=own)
    learn(config, workdir, learner, _lesson_of(group, len(train.labels)), train.images, train.labels)


def _lesson_of(group, count: int) -> Lesson:
    """Returns how teacher or verifier, by their config group, learn from `count` images."""
    return Lesson(recipe_of(group.training), supervised(group.training.label_smoothing), Rounds(count))


def _file(config, workdir: Workdir | None, name: str) -> Path:
    """Returns the file of teacher or verifier; `workdir` matters where the config names none."""
    weights = config[name].weights
    path = Path(weights or workdir.network(name))
    if not weights and not path.exists():
        raise DvinvError(f'There is no {name} in {workdir.path} yet; run the task teacher first, or set {name}.weights.')
    return path


def _blank(config, data: RealData) -> Classifier:
    """What a network trained here will be, without weights."""
    return Classifier(None, None, data.image_shape, data.num_classes, *_pixels(config, data))


def _pixels(config, data: RealData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and std of a teacher that is trained here."""
    half = (0.5,) * data.image_shape[-1]
    usual = half, half
    if config.teacher.factory:  # as users do; with the others 0.5 came first, and stays
        rows = np.unique(np.linspace(0, len(data.train.labels) - 1, MEASURED).astype(int))
        pixels = data.train.images[rows].reshape(-1, len(half)) / 255
        usual = tuple(tuple(round(float(v), 4) for v in values) for values in (pixels.mean(0), pixels.std(0)))
    return tuple(config.teacher.mean) or usual[0], tuple(config.teacher.std) or usual[1]
