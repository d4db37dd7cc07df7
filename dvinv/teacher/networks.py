"""The networks that a run is given, by a user's function or a file, and those that it wrote, for use outside of it."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dvinv.config import MoreVerifierSettings, VerifierSettings
from dvinv.inversion.linen_modules import trainable, with_classes
from dvinv.inversion.teacher import Teacher
from dvinv.networks import (
    Classifier,
    classifier_of,
    describes_itself,
    load_classifier,
    load_network,
    module_of,
    read_classifier,
    shapes_of,
)
from dvinv.networks.classifier import check_normalisation, differing_shapes
from dvinv.networks.quantized import load_quantized
from dvinv.runtime.errors import DvinvError, listed, say
from dvinv.runtime.workdir import FINAL_NETWORKS, network_files, network_path, quantized_name

FEW_IMAGES = 100  # number of real images below which an accuracy has little significance
# task -> a pattern for the names of its other network files: controls and intermediate steps
OTHER_NETWORKS = {
    'teacher': 'verifier',
    'distillation': r'student_of_\d+|(student|noise|prior_only|real)_after_\d+|noise|prior_only|real',
    'pruning': r'(untuned|magnitude|random|pruned_by_(noise|prior_only|real))(_\d+)?|pruned_\d+',
    'continual': r'(finetune|lwf_mc|replay|joint|deepinversion|always_be_dreaming)(_\d+)?|continual_\d+',
}


def teacher_of_factory(name: str, num_classes: Callable[[], int | None]):
    """Returns the result of the function `name` of `teacher.factory`: a Teacher, or an untrained network.

    Args:
      name: 'module:function'.
      num_classes: returns the number of classes of the real data, or None without real data; called only if the function
        takes `num_classes`.

    Raises:
      DvinvError: the function cannot be imported, takes other arguments, or returns something else.
    """
    source = _imported('teacher.factory', name)
    count = num_classes() if 'num_classes' in _arguments(source) else None
    return network_of(source, count, f'teacher.factory {name!r}')


def student_of_factory(name: str, num_classes: int):
    """Returns the network from the function `name` of `student.factory`, as returned by `trainable`.

    Raises:
      DvinvError: see `teacher_of_factory`.
    """
    network = network_of(_imported('student.factory', name), num_classes, f'student.factory {name!r}')
    if isinstance(network, Teacher):
        raise DvinvError(
            f'student.factory {name!r} returned a dvinv.Teacher; return the Flax module itself, which is trained here.'
        )
    return network


def network_of(source, num_classes: int | None, name: str):
    """Returns a Teacher unchanged, or the `trainable` network of a Flax module; calls a function or class that builds one.

    Args:
      source: a Teacher, a Flax module, or a function or class that returns one of them. It may take `num_classes`, and for
        an NNX model `rngs` (nnx.Rngs).
      num_classes: the value of that argument; None: it is not known.
      name: the name of `source` in error messages.

    Raises:
      DvinvError: `source` is, or returns, something else, or takes `num_classes` when it is not known.
    """
    make = None
    if _makes(source):
        parameters = _arguments(source)
        if 'num_classes' in parameters and num_classes is None:
            raise DvinvError(
                f"{name} takes num_classes, which is that of the data, but data.name is ''; name a data set, or return a "
                'network with a fixed number of classes.'
            )
        build = functools.partial(source, num_classes=num_classes) if 'num_classes' in parameters else source
        if 'rngs' in parameters:
            from flax import nnx  # imported only when needed, as in linen_modules.py

            make, source = build, build(rngs=nnx.Rngs(0))
        else:
            source = build()
    if isinstance(source, Teacher):
        return source
    network = trainable(source, make=make and (lambda rngs: make(rngs=rngs)))
    if network is None:
        raise DvinvError(
            f'{name} returned a {type(source).__name__}; it must return a dvinv.Teacher, made by dvinv.from_linen or '
            'dvinv.from_nnx, or a Flax module, Linen or NNX, that is trained here.'
        )
    return network


def _makes(source) -> bool:
    """Returns whether `source` must be called to build a network."""
    return inspect.isfunction(source) or inspect.isclass(source) or isinstance(source, functools.partial)


def _arguments(source) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function, or of the `__init__` of a class; {} for a network that is built already."""
    if not _makes(source):
        return {}
    # NNX hides the signature of the class itself.
    parameters = dict(inspect.signature(source.__init__ if inspect.isclass(source) else source).parameters)
    if inspect.isclass(source):
        del parameters[next(iter(parameters))]  # self
    return parameters


def _imported(field: str, name: str):
    """Returns what `name`, 'module:function', denotes.

    Raises:
      DvinvError: it cannot be imported, or has required parameters other than `num_classes` and `rngs`.
    """
    module, _, function = name.partition(':')
    try:
        source = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DvinvError(
            f"{field} is {name!r}, which cannot be imported ({error}); it must be 'module:function' on the Python path."
        ) from error
    for parameter in _arguments(source).values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        required = parameter.default is parameter.empty and not variadic
        if required and parameter.name not in ('num_classes', 'rngs'):
            raise DvinvError(
                f'{field} {name!r} takes the argument {parameter.name!r}; the only arguments that it is given are '
                'num_classes, and rngs for an NNX model.'
            )
    return source


def load_more_verifiers(
    verifiers: Sequence[MoreVerifierSettings], teacher: Teacher, report: bool = False
) -> dict[str, Classifier]:
    """Loads the additional verifiers; returns {name of the network: Classifier} in the order of the settings.

    Args:
      verifiers: the settings of the verifiers.
      teacher: the teacher.
      report: whether to call `print_pixels` for each.

    Raises:
      DvinvError: a file is missing, or a verifier takes other images or classes than the teacher.
    """
    networks = {}
    for index, verifier in enumerate(verifiers):
        field, name = f'verifiers[{index}]', verifier.network
        networks[name] = read_verifier(verifier, field, teacher)
        if report:
            print_pixels(verifier, field, networks[name])
        validate_judge(teacher, networks[name], f'verifier {name}', field, 'leave it out')
    return networks


def read_verifier(group: VerifierSettings | MoreVerifierSettings, field: str, teacher: Classifier) -> Classifier:
    """Reads a network that judges images from its weights file.

    If `group` has no mean and std, they are those of the file, else those of the published weights of this network, else
    those of the teacher. `print_pixels` reports them.

    Args:
      group: the settings with the file and the network.
      field: the config field of these settings.
      teacher: the teacher.

    Raises:
      DvinvError: see `read_classifier`.
    """
    path = Path(group.weights)
    module, variables, about = read_classifier(
        path,
        group.network,
        mean=group.mean,
        std=group.std,
        width=group.width,
        image_shape=None if describes_itself(path) else teacher.image_shape,
        field=f'{field}.network',
        default_pixels=(teacher.mean, teacher.std),
    )
    return classifier_of(module, variables, about)


def print_pixels(group, field: str, network: Classifier) -> None:
    """Prints the mean and std that are used for published weights if the settings do not give both."""
    if (group.mean and group.std) or describes_itself(Path(group.weights)):
        return
    say(
        f'{field}: the weights {group.weights} come without mean and std; the pixels of this {group.network} are '
        f'normalised by mean {network.mean} and std {network.std} ({field}.mean and {field}.std set others).'
    )


def refuse_chance(share: float | None, count: int, network: Classifier, name: str, field: str, way_out: str) -> None:
    """Refuses a network from a weights file if it is no better than chance on real images.

    Args:
      share: the accuracy on real images; None: there are none.
      count: the number of those images.
      network: the network.
      name: the name of the network in messages.
      field: the config field with its weights, mean and std; '': it was trained in this run. In that case, perhaps after a
        short training, a message is printed instead of the refusal. The same holds for fewer than `FEW_IMAGES` images, on
        which a weak network may score badly by chance.
      way_out: what the user can do besides setting another mean and std, for the error message.

    Raises:
      DvinvError: the network is no better than chance, has a `field`, and was scored on at least `FEW_IMAGES` images.
    """
    if share is None or network.num_classes < 2 or share * network.num_classes > 1:
        return
    finding = (
        f'{name} recognises {share:.3f} of {count:,} real images, and chance would {1 / network.num_classes:.3f} '
        f'({network.num_classes} classes)'
    )
    if field and count >= FEW_IMAGES:
        raise DvinvError(
            f'{finding}, so its judgements of images are meaningless. It takes pixels with mean {network.mean} and std '
            f'{network.std}; set {field}.mean and {field}.std to those of its training, order the classes of the data as it '
            f'does, or {way_out}.'
        )
    say(f'{finding}.')


def validate_judge(teacher: Teacher, verifier: Classifier, name: str, field: str, without: str) -> None:
    """Validates that a verifier takes the images and classes of the teacher.

    Args:
      name: the name of the verifier in error messages.
      field: the config field with its weights, mean and std.
      without: how to run without this verifier, for the error message.

    Raises:
      DvinvError: it does not; the message names the field and both values.
    """
    channels, numbers = teacher.image_shape[-1], (*verifier.mean, *verifier.std)
    fits = len(verifier.mean) == len(verifier.std) == channels and all(isinstance(value, int | float) for value in numbers)
    if not (fits and min(verifier.std) > 0):
        raise DvinvError(
            f'{field}.mean is {verifier.mean} and {field}.std is {verifier.std}; each must be {channels} numbers, one per '
            'channel, with std above 0, or () for those of the weights.'
        )
    check_normalisation(verifier.mean, verifier.std, f'{field}.')
    for attribute, phrase in (('image_shape', 'takes images of {}'), ('num_classes', 'knows {} classes')):
        verifier_phrase, teacher_phrase = (phrase.format(getattr(network, attribute)) for network in (verifier, teacher))
        if verifier_phrase != teacher_phrase:
            raise DvinvError(
                f'The {name} {verifier_phrase}, but the teacher {teacher_phrase}; give {field}.weights of a network with '
                f'the image shape and classes of the teacher, or {without}.'
            )


def load(workdir, task: str, setting: str = '', *, teacher: Classifier | None = None, module=None) -> tuple[Callable, dict]:
    """Loads a network that `task` wrote to `workdir`.

    The file itself, `workdir`/networks/NAME.safetensors, can be read with any safetensors library.

    Args:
      workdir: the work directory of the run.
      task: the name of the task.
      setting: the network to load. '': the result of the task; else a control, by its name in the config ('noise', 'real'),
        or a file in `workdir`/networks, by its stem ('verifier', 'student_after_6250', 'pruned_2'). For quantization, the
        bits, for instance 'w8a8'; '': those of the smallest file.
      teacher: the teacher that was quantized, needed only if it is a user's own network (teacher.factory) rather than one of
        dvinv.networks: the file has its weights in a few bits, but not its code.
      module: the network of a task other than quantization, if it is a user's own (teacher.factory, student.factory): a Flax
        module, Linen or NNX, or the function or class that returns it. For a pruned network this is the unpruned one. Its
        number of classes does not matter.

    Returns:
      (apply_fn, variables); `apply_fn(variables, x)` returns logits [B, K] of normalised images x [B, H, W, C] in eval mode.

    Raises:
      DvinvError: there is no such task or network (the message lists the existing ones), the task has not finished, or the
        file is damaged.
    """
    if task not in FINAL_NETWORKS:
        raise DvinvError(
            f'The task {task!r} makes no network; choose one of {", ".join(FINAL_NETWORKS)}, optionally with one of its '
            "controls, as in dvinv.load(workdir, 'distillation', 'noise')."
        )
    folder = Path(workdir)
    if task == 'quantization':
        network = load_quantized(_quantized(folder, setting), teacher)
        return network.apply_fn, network.variables
    path = network_path(folder, _other(folder, task, setting) or FINAL_NETWORKS[task])
    if task == 'teacher' and not setting and not path.exists():
        raise DvinvError(
            f'{workdir} has no teacher of its own: either the task teacher has not finished there, or the teacher came from '
            'elsewhere (teacher.weights, teacher.factory in config.json); dvinv.networks.read_classifier reads weights.'
        )
    network = load_classifier(path, module if module is None else _user_module(module, path))
    return network.apply_fn, network.variables


def _other(workdir: Path, task: str, setting: str) -> str:
    """Returns the file stem of one of the task's other networks; '' if `setting` selects the result of the task.

    Raises:
      DvinvError: there is no such file.
    """
    if setting in ('', FINAL_NETWORKS[task]):
        return ''
    others = {
        stem.removeprefix('pruned_by_'): stem for stem in network_files(workdir) if re.fullmatch(OTHER_NETWORKS[task], stem)
    }
    if not (stem := others.get(setting.removeprefix('pruned_by_'))):
        raise DvinvError(
            f'The task {task} has no network {setting!r} in {workdir}; besides its result, which is loaded without a name, '
            f'there are {", ".join(others) or "none"}.'
        )
    return stem


def _user_module(source, path: Path):
    """Returns the user's network with the number of classes of the file `path`.

    Raises:
      DvinvError: the names or shapes of the file's weights differ from those of the network.
    """
    variables, about = load_network(path)
    network = network_of(source, about['num_classes'], 'module')
    network = network.module if isinstance(network, Teacher) else network
    network = with_classes(network, about['image_shape'], about['num_classes'])
    expected = shapes_of(module_of(about, network), about['image_shape'])
    if differing := differing_shapes(expected, variables):
        raise DvinvError(
            f'{path} holds other weights than this module has: {listed(differing, 3)} differ; give the module that was '
            'trained.'
        )
    return network


def _quantized(workdir: Path, setting: str) -> Path:
    """Returns the file of a setting, or the smallest file if `setting` is ''.

    Raises:
      DvinvError: there is no such file.
    """
    prefix = quantized_name('')
    files = {stem.removeprefix(prefix): path for stem, path in network_files(workdir).items() if stem.startswith(prefix)}
    chosen = [path for bits, path in files.items() if setting in ('', bits)]
    if not chosen:
        raise DvinvError(
            f'{workdir} has no network quantized to {setting or "any setting"}; there are {", ".join(files) or "none"}, and '
            'the task quantization makes more.'
        )
    return min(chosen, key=lambda path: (path.stat().st_size, path.name))
