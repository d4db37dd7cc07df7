"""The base config, whose fields every config file shares, and what is checked before anything is written."""

import dataclasses
import math
from collections.abc import Callable

import ml_collections
from ml_collections import config_dict

from dvinv.continual.settings import Continual
from dvinv.errors import DvinvError
from dvinv.factories import of_teacher
from dvinv.hints import KINDS
from dvinv.inversion import PRESETS, InversionConfig, Stage, Teacher, Weights, preset_for
from dvinv.pruning.removal import Removal
from dvinv.quantization.settings import QuantizationSettings
from dvinv.recipe import Recipe
from dvinv.rounds import Rounds

TASKS = ('teacher', 'synthesis', 'distillation', 'pruning', 'continual', 'quantization', 'report')
METHODS = ('deepinversion', 'adaptive', 'prior_only', 'noise')
DATA_FREE_CONTROLS = ('noise', 'prior_only')
CONTROLLED = ('synthesis', 'distillation', 'pruning', 'quantization')  # tasks with `controls` that learn from other images


def base_config(preset: str = '') -> ml_collections.ConfigDict:
    """All fields with their defaults; synthesis as in the preset of this name (see `dvinv.inversion.presets`).

    '': as in that for images of the teacher's size. Its fields are None until `settle` fills them; what is set stays.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0  # of all that is drawn by chance
    # Run in the order of TASKS; one alone by --config.tasks="('teacher',)".
    config.tasks = ('teacher', 'synthesis', 'distillation', 'report')
    config.devices = 0  # how many; 0: all. On CPU, this many virtual ones (0: one a core)
    config.bn_stats = 'device'  # 'device': each inverts batches of its own; 'global': one batch is split over all
    config.pool = ''  # path of an existing pool, used instead of synthesizing one
    # Share of the pool that nothing learns from where there are no real data (data.name=''): networks are compared with the
    # teacher on it; 0: none, and no scores.
    config.held_out = 0.0625

    config.data = ml_collections.ConfigDict(
        {
            'name': 'digits',  # '': no real data; figures that need them are null
            'path': '',  # of the test images (npz, folders), or of prepared data sets (cifar10, cifar100)
            'train_path': '',  # of the training images (npz, folders); '': none, then nothing may be trained on real ones
            'image_size': 0,  # pixels that images (not TFDS ones) are scaled and cut to; 0: they have one size
            'classes': (),  # numbers of these alone, the others as if they were not there; (): all
            # Of the class folders, in the order of labels; (): see dvinv.data.folders. Without data, for the report alone.
            'class_names': (),
            'validation': False,  # score on a held-out fifth of the training split instead of the test split
        }
    )
    recipe = {
        'updates': 500,
        'batch_size': 128,
        'learning_rate': 0.01,
        'optimiser': 'adam',
        'schedule': 'cosine',
        'milestones': (0.4, 0.8),
        'warmup': 0,
        'clip_norm': 0.0,
        'weight_decay': 0.0,
        'shift': 0,
        'flip': False,
        'noise': 0.0,
        'resized_crop': 0.0,
        'color_jitter': 0.0,
        'cutmix': 0.0,
        'mixup': 0.0,
        'reestimate': 0,
        'precision': 'float32',
        'updates_per_dispatch': 0,
    }
    config.teacher = ml_collections.ConfigDict(
        {
            # 'module:function' that returns a dvinv.Teacher, or a Flax module (it may take num_classes, and rngs for an NNX
            # model), which is trained here, or read from `weights` that dvinv wrote; else network and weights:
            'factory': '',
            'network': 'small_resnet',
            'width': 1.0,
            'weights': '',  # path of a network file, or of weights that others published; trained when empty
            'image_shape': (),  # height, width, channels, where the weights come from others; (): the network's usual ones
            # For pixels in [0, 1]; (): of the weights file where it tells them, else of this network's published weights, or
            # .5 each where the network is trained here.
            'mean': (),
            'std': (),
            # Of a network without BatchNorm, or in the place of its running statistics: a file of `python -m dvinv.moments`.
            'moments': '',
            'moments_images': 0,  # or so many real training images, from which the task teacher records them; 0: none
            'training': {**recipe, 'label_smoothing': 0.0},
        }
    )
    config.verifier = ml_collections.ConfigDict(
        {
            'network': 'small_convnet',  # '': no verifier
            'width': 1.0,
            'weights': '',
            'mean': (),  # where the weights come from others; (): as for the teacher, but the teacher's where none are known
            'std': (),
            'training': {**recipe, 'label_smoothing': 0.0},
        }
    )
    # Others, never trained here, whose share of recognised images the report tells beside its: a dict each, with width, mean
    # and std too where they are not the defaults: --config.verifiers="({'network': 'resnet32', 'weights': 'resnet32.npz'},)"
    config.verifiers = ()
    config.student = ml_collections.ConfigDict(
        {
            'factory': '',  # 'module:function' that returns a Flax module, as of the teacher; '': by network and width
            'network': 'small_resnet',
            'width': 1.0,
            'inherit': False,  # start from the teacher's weights in the layers that both have, by name, depth and shape
        }
    )
    config.synthesis = ml_collections.ConfigDict(
        {
            'method': 'deepinversion',
            'images': 1024,
            'batch_size': 256,
            'classes': (),  # numbers of the classes that images are made of, in turn; (): all
            'batches_per_round': 0,  # so many join the pool every distillation.updates_per_round; 0: all before the first
            'controls': (),  # lesser methods that `images` are made by too, for the report: 'noise', 'prior_only'
            **(_fields(PRESETS[preset]) if preset else _open_fields()),
        }
    )
    config.distillation = ml_collections.ConfigDict(
        {
            **recipe,
            'temperature': 3.0,
            'hint': 0.0,  # weight of what the student is compared with besides the answers; 0: the paper, answers alone
            # 'layers': the inputs of BatchNorm layers that both have; 'stages': the last values of each resolution, for any
            # two networks; 'none'; or 'auto': layers where both have the same ones, else stages.
            'hints': 'auto',
            'graft': 0.5,  # probability, falling to 0, with which an image enters a stage from the teacher's stage before it
            'hint_decay': 0.0,  # power p of (1 - share of the updates done)^p, by which that weight falls to 0; 0: it stays
            'updates_per_round': 0,  # between two rounds of new images; what is left follows the last round
            'counts': (),  # students of the first so many images beside it: the curve of accuracy against image count
            'controls': ('noise', 'prior_only', 'real'),  # students with the same budget, from other images
        }
    )
    config.pruning = ml_collections.ConfigDict(
        {
            **recipe,  # of the fine-tuning after the last step
            'updates_per_step': 100,  # of that after every step
            'temperature': 3.0,
            'hint': 0.0,  # weight of the BatchNorm inputs of channels that are left
            **dataclasses.asdict(Removal()),
            'adaptive_batches': 0,  # made in every step in competition with the network just pruned; 0: the pool alone
            'latency_batch': 128,  # images at a time of which the latency is told
            'controls': ('untuned', 'random', 'real'),  # beside it: see CONTROLS in dvinv.pruning.driver
        }
    )
    config.continual = ml_collections.ConfigDict({**recipe, **dataclasses.asdict(Continual())})
    config.quantization = ml_collections.ConfigDict(
        {
            **dataclasses.asdict(QuantizationSettings()),
            'training': {**recipe, 'batch_size': 64, 'learning_rate': 2e-4},  # of the settings that are distilled
        }
    )
    config.logging = ml_collections.ConfigDict(
        {
            'every': 50,  # updates of a training a line in metrics.jsonl
            'checkpoint_every': 500,  # updates
            'checkpoint_minutes': 10.0,  # between two saves of batches that are under way; 0: only on SIGTERM
            'iterations': 10,  # of a synthesis a line
        }
    )
    return config


def shrink(config, width: float = 0.25) -> None:
    """What the argument `smoke` of every config does: seconds instead of minutes, no download, no figure means anything.

    Every part runs, with the same networks `width` times as wide; digits, enlarged, stand in for pictures that are not here.
    """
    if config.data.name != 'digits':
        config.data.update(name='digits', image_size=32)
        config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)
    config.teacher.width, config.verifier.width = width, width
    config.teacher.moments_images = min(config.teacher.moments_images, 20)
    config.verifiers = ()
    config.student.width = width if config.distillation.hint else width / 2  # hints of layers need one shape
    trainings = (config.teacher.training, config.verifier.training, config.quantization.training)
    for group in (*trainings, config.distillation, config.pruning, config.continual):
        group.update(updates=20, batch_size=32, warmup=2, precision='float32')
    config.pruning.update(steps=2, updates_per_step=10, importance_batches=2, latency_batch=2)
    if config.continual.steps:
        config.data.classes = (0, 1, 2, 3)
        config.continual.steps = ({'classes': (4, 5, 6)}, {'classes': (7, 8, 9)})[: len(config.continual.steps)]
    config.bn_stats = 'device'  # 20 images are not divided by any number of devices
    config.synthesis.update(images=40, batch_size=20, classes=(), precision='float32')
    if config.synthesis.stages is None:
        config.synthesis.stages = _fields(PRESETS[preset_for((8, 8, 1))])['stages']
    largest = max(stage.resolution for stage in config.synthesis.stages)
    for stage in config.synthesis.stages:
        resolution = stage.resolution and stage.resolution * config.data.image_size // largest
        stage.update(iterations=5, warmup=0, resolution=resolution, jitter=min(stage.jitter, 2))
    if config.synthesis.batches_per_round:
        config.synthesis.batches_per_round, config.distillation.updates_per_round = 1, 10
    if config.distillation.counts:
        config.distillation.counts = (20, 40)
    config.logging.update(every=5, checkpoint_every=10, iterations=2)


def _fields(preset: InversionConfig) -> dict:
    """A preset as config fields."""
    fields = dataclasses.asdict(preset)
    del fields['bn_stats']
    fields['stages'] = tuple(ml_collections.ConfigDict(stage) for stage in fields['stages'])
    return fields


def _open_fields() -> dict:
    """The fields of a preset that is yet to be chosen: None, of their types, but for those that say how to compute it."""
    fields, first = _fields(PRESETS['32px']), next(iter(PRESETS.values()))
    fields['weights'] = {name: config_dict.placeholder(float) for name in fields['weights']}
    for name in fields.keys() - {'weights', 'precision', 'recompute', 'iterations_per_dispatch'}:
        fields[name] = config_dict.placeholder(type(getattr(first, name)))
    return fields


def settle(config, image_shape: Callable[[], tuple[int, int, int]]) -> bool:
    """Fills those fields of `config.synthesis` that are None from the preset for images of the teacher's size.

    Args:
      image_shape: returns (H, W, C); called where it matters.

    Returns:
      Whether the stages were chosen here.
    """
    group = config.synthesis
    if None not in (*group.values(), *group.weights.values()):
        return False
    chosen, preset = group.stages is None, _fields(PRESETS[preset_for(image_shape())])
    for given, defaults in ((group.weights, preset.pop('weights')), (group, preset)):
        given.update({name: value for name, value in defaults.items() if given[name] is None})
    return chosen


def _stage(index: int, entry) -> Stage:
    """Returns the `Stage` that an item of `synthesis.stages` gives.

    Raises:
      DvinvError: it is no dict of the fields of a stage.
    """
    field, types = f'synthesis.stages[{index}]', {known.name: known.type for known in dataclasses.fields(Stage)}
    if not isinstance(entry, dict | ml_collections.ConfigDict):
        raise DvinvError(
            f'{field} is {entry!r}; it must be a dict, as in '
            "synthesis.stages=({'iterations': 100, 'learning_rate': 0.1},)."
        )
    entry = dict(entry)
    if unknown := sorted(map(str, entry.keys() - types.keys())):
        raise DvinvError(f'{field} has the field {unknown[0]!r}; choose among {", ".join(types)}.')
    for name in ('iterations', 'learning_rate'):
        if name not in entry:
            raise DvinvError(f'{field} has no {name}; a stage needs iterations and learning_rate.')
    for name, value in entry.items():
        wanted = types[name]
        if not isinstance(value, int | float if wanted is float else wanted):
            raise DvinvError(f'{field}.{name} is {value!r}; it must be of the type {wanted.__name__}.')
    return Stage(**entry)


def inversion_config(config, method: str = '') -> InversionConfig:
    """`config.synthesis` as the inversion core takes it; `prior_only` has no term of the network but the class."""
    group = config.synthesis
    weights = Weights(**group.weights)
    if (method or group.method) == 'prior_only':
        weights = dataclasses.replace(weights, feature=0.0, patch_similarity=0.0)
    return InversionConfig(
        tuple(_stage(index, stage) for index, stage in enumerate(group.stages)),
        weights,
        group.total_variation,
        group.canvas,
        group.contrast,
        group.l2,
        group.prior_on,
        config.bn_stats,
        group.precision,
        group.recompute,
        group.iterations_per_dispatch,
        group.pixel_scale,
        tuple(group.attention),
    )


def rounds_of(config) -> Rounds:
    """When the images of the run's pool come to the student."""
    group = config.synthesis
    batches = group.images // group.batch_size
    per_round = group.batches_per_round or batches
    size, held_out = held_out_of_round(config)
    return Rounds(size - held_out, batches // per_round, max(1, config.distillation.updates_per_round))


def held_out_of_round(config, images: int = 0) -> tuple[int, int]:
    """Returns how many images come to the student in a round, and how many of them are held out; see `dvinv.held_out`.

    Args:
      images: of an existing pool, which comes in one round; 0: as the config makes them.
    """
    group = config.synthesis
    size = images or (group.batches_per_round or group.images // group.batch_size) * group.batch_size
    return size, 0 if config.data.name else int(config.held_out * size)


def recipe_of(group) -> Recipe:
    """The `Recipe` among the fields of a config group."""
    return Recipe(**{field.name: group[field.name] for field in dataclasses.fields(Recipe)})


def quantization_of(config) -> QuantizationSettings:
    """The `QuantizationSettings` among the fields of their config group."""
    fields = dataclasses.fields(QuantizationSettings)
    return QuantizationSettings(**{field.name: config.quantization[field.name] for field in fields})


def is_trained_here(name: str, config) -> bool:
    """Whether the task teacher trains this network, 'teacher' or 'verifier'."""
    group = config[name]
    if group.get('factory', ''):
        return not group.weights and not isinstance(of_teacher(config), Teacher)
    return bool(group.network) and not group.weights


def makes_images(config) -> bool:
    """Whether a task of the config makes images, by the group `synthesis`."""
    controls = [control for task in CONTROLLED if task in config.tasks for control in config[task].controls]
    return (
        ('synthesis' in config.tasks and not config.pool)
        or 'continual' in config.tasks
        or ('pruning' in config.tasks and config.pruning.adaptive_batches > 0)
        or any(control in DATA_FREE_CONTROLS for control in controls)
    )


def trains_student(config) -> bool:
    """Whether a task of the config trains `student`: distillation, or one that makes images in competition with it."""
    competing = ('synthesis' in config.tasks and not config.pool) or 'continual' in config.tasks
    return 'distillation' in config.tasks or (competing and config.synthesis.method == 'adaptive')


def judges(config) -> bool:
    """Whether a task of the config needs the verifier."""
    return 'teacher' in config.tasks or 'synthesis' in config.tasks


def trainings_of(config) -> dict:
    """Returns {name of a config group with the fields of a `Recipe`: the group}, of the trainings of the tasks.

    Those of continual and quantization are left out, which check their own.
    """
    roles = [name for name in ('teacher', 'verifier') if 'teacher' in config.tasks and is_trained_here(name, config)]
    return {
        **{f'{name}.training': config[name].training for name in roles},
        **({'distillation': config.distillation} if trains_student(config) else {}),
        **({'pruning': config.pruning} if 'pruning' in config.tasks else {}),
    }


def check(config) -> None:
    """Refuse, before anything is written, what the config's tasks could not be run with.

    Raises:
      DvinvError: names the field, its value and the choices.
    """
    for task in config.tasks:
        if task not in TASKS:
            raise DvinvError(f'tasks names {task!r}; choose among {", ".join(TASKS)}.')
    if not 0 <= config.seed < 2**27:  # seeds of trainings are 16 times as large, and 32 bits wide
        raise DvinvError(f'seed is {config.seed}; it must be between 0 and {2**27 - 1}.')
    if not 0 <= config.held_out <= 0.5:
        raise DvinvError(f'held_out is {config.held_out}; it is a share of the pool, from 0 to 0.5.')
    if config.synthesis.method not in METHODS:
        raise DvinvError(f'synthesis.method is {config.synthesis.method!r}; choose one of {", ".join(METHODS)}.')
    for name, least in (('images', 1), ('batch_size', 2)):
        if config.synthesis[name] < least:
            raise DvinvError(f'synthesis.{name} is {config.synthesis[name]}; it must be at least {least}.')
    if makes_images(config) or (trains_student(config) and not config.pool):
        _check_rounds(config)
    if 'synthesis' in config.tasks or makes_images(config):
        _check_synthesis(config)
    shape = config.teacher.image_shape
    if shape and not (len(shape) == 3 and all(type(length) is int and length > 0 for length in shape)):
        raise DvinvError(f'teacher.image_shape is {shape}; it must be (height, width, channels), or () for the usual.')
    trainings = trainings_of(config)
    for name in ('teacher', 'verifier'):
        if not (group := trainings.get(f'{name}.training')):
            continue
        if not 0 <= group.label_smoothing < 1:
            raise DvinvError(
                f'{name}.training.label_smoothing is {group.label_smoothing}; it must be at least 0 and below 1.'
            )
        recipe_of(group).check_labels(f'{name}.training')
    if trains_student(config):
        _check_distillation(config)
    _check_logging(config.logging)


def check_count(config, field: str, images: int, num_classes: int) -> None:
    """Refuse fewer images than classes: the last classes would get none.

    Args:
      field: what tells the number of images.
      num_classes: of the network that they are made from.

    Raises:
      DvinvError: says how to choose the classes.
    """
    named = len(config.synthesis.classes)
    if images < (named or num_classes):
        classes = f'{named} classes that synthesis.classes names' if named else f'{num_classes} classes of the network'
        raise DvinvError(
            f'{field} makes {images} images, fewer than the {classes}, so that the last of these would get none; make at '
            'least one of each, or name by synthesis.classes those that images are made of.'
        )


def _check_synthesis(config) -> None:
    """Refuse what no image could be made with."""
    for label in config.synthesis.classes:
        if type(label) is not int or label < 0:
            raise DvinvError(f'synthesis.classes names {label!r}; give the numbers of classes, from 0.')
    for control in config.synthesis.controls:
        if control not in DATA_FREE_CONTROLS:
            raise DvinvError(f'synthesis.controls names {control!r}; choose among {", ".join(DATA_FREE_CONTROLS)}.')
    if config.synthesis.method == 'adaptive' and not config.synthesis.weights.competition:
        raise DvinvError("synthesis.method is 'adaptive', but synthesis.weights.competition is 0; give it a weight.")


def _check_distillation(config) -> None:
    """Refuse what no student could be trained with."""
    group = config.distillation
    for control in group.controls:
        if control not in (*DATA_FREE_CONTROLS, 'real'):
            raise DvinvError(f'distillation.controls names {control!r}; choose among noise, prior_only, real.')
    if group.temperature <= 0:
        raise DvinvError(f'distillation.temperature is {group.temperature}; it must be above 0.')
    if not 0 <= group.hint < math.inf:
        raise DvinvError(f'distillation.hint is {group.hint}; it must be at least 0 and finite.')
    if group.hints not in KINDS:
        raise DvinvError(f'distillation.hints is {group.hints!r}; choose one of {", ".join(KINDS)}.')
    if group.hints in ('layers', 'stages') and not group.hint:
        raise DvinvError(
            f'distillation.hints is {group.hints!r}, but distillation.hint, their weight, is 0; give it a '
            "weight, 100 for instance, or set distillation.hints='auto'."
        )
    if not 0 <= group.hint_decay < math.inf:
        raise DvinvError(f'distillation.hint_decay is {group.hint_decay}; it must be at least 0 and finite.')
    if not 0 <= group.graft <= 1:
        raise DvinvError(f'distillation.graft is {group.graft}; it is a probability, from 0 to 1.')
    for count in group.counts:
        if type(count) is not int or not 1 <= count <= (count if config.pool else _learned(config)):
            raise DvinvError(
                f'distillation.counts names {count!r}; give whole numbers from 1 to the {_learned(config)} images that are '
                'learned from.'
            )


def _learned(config) -> int:
    """Returns how many images of the run's own pool are learned from."""
    images, (size, held_out) = config.synthesis.images, held_out_of_round(config)
    return images - held_out * (images // max(1, size))


def _check_logging(group) -> None:
    """Refuse measurements and checkpoints that do not go together."""
    for name in ('every', 'checkpoint_every', 'iterations'):
        if group[name] < 1:
            raise DvinvError(f'logging.{name} is {group[name]}; it must be at least 1.')
    if not 0 <= group.checkpoint_minutes < math.inf:
        raise DvinvError(f'logging.checkpoint_minutes is {group.checkpoint_minutes}; it must be at least 0.')
    if group.checkpoint_every % group.every:
        raise DvinvError(
            f'logging.every is {group.every} and logging.checkpoint_every '
            f'{group.checkpoint_every}; the second must be a multiple of the first.'
        )


def _check_rounds(config) -> None:
    """Refuse rounds that do not divide the batches, or that outlast the updates of a student that is trained."""
    group, updates = config.synthesis, config.distillation.updates
    batches, per_round, every = (
        group.images // group.batch_size,
        group.batches_per_round,
        config.distillation.updates_per_round,
    )
    if group.method == 'adaptive' and not per_round:
        raise DvinvError(
            "synthesis.method is 'adaptive', but synthesis.batches_per_round is 0: say how many batches are made against "
            'the student of the moment, and by distillation.updates_per_round how long it learns from them.'
        )
    if per_round < 0 or (per_round and batches % per_round):
        raise DvinvError(
            f'synthesis.batches_per_round is {per_round}, which does not divide the {batches} batches; choose a divisor.'
        )
    if not (per_round and trains_student(config)):
        return
    if every < 1:
        raise DvinvError(
            f'distillation.updates_per_round is {every}; with synthesis.batches_per_round it must be at least 1.'
        )
    if (batches // per_round - 1) * every >= updates:
        raise DvinvError(
            f'{batches // per_round} rounds of {every} updates begin after the {updates} updates of distillation; raise '
            'distillation.updates, or lower distillation.updates_per_round.'
        )
