"""The base config, whose fields every config file shares, and what is checked before anything is written."""

import dataclasses
import math

import ml_collections

from dvinv.continual.settings import Continual
from dvinv.errors import DvinvError
from dvinv.hints import KINDS
from dvinv.inversion import PRESETS, InversionConfig, Stage, Weights
from dvinv.pruning.removal import Removal
from dvinv.quantization.settings import QuantizationSettings
from dvinv.recipe import Recipe
from dvinv.rounds import Rounds

TASKS = ('teacher', 'synthesis', 'distillation', 'pruning', 'continual', 'quantization', 'report')
METHODS = ('deepinversion', 'adaptive', 'prior_only', 'noise')
DATA_FREE_CONTROLS = ('noise', 'prior_only')


def base_config(preset: str) -> ml_collections.ConfigDict:
    """All fields with their defaults; synthesis as in the preset of this name (see `dvinv.inversion.presets`)."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Run in the order of TASKS; one alone by --config.tasks="('teacher',)".
    config.tasks = ('teacher', 'synthesis', 'distillation', 'report')
    config.devices = 0  # how many; 0: all. On CPU, this many virtual ones (0: one a core)
    config.bn_stats = 'device'  # 'device': each inverts batches of its own; 'global': one batch is split over all
    config.pool = ''  # path of an existing pool, used instead of synthesizing one

    config.data = ml_collections.ConfigDict(
        {
            'name': 'digits',  # '': no real data; figures that need them are null
            'path': '',  # of the test images (npz, folders), or of prepared data sets (cifar10, cifar100)
            'train_path': '',  # of the training images (npz, folders); '': none, then nothing may be trained on real ones
            'image_size': 0,  # pixels that images (not TFDS ones) are scaled and cut to; 0: they have one size
            'classes': (),  # numbers of these alone, the others as if they were not there; (): all
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
            'factory': '',  # 'module:function' that returns a dvinv.Teacher; or network and weights:
            'network': 'small_resnet',
            'width': 1.0,
            'weights': '',  # path of a network file, or of weights that others published; trained when empty
            'image_shape': (),  # height, width, channels, where the weights come from others; (): the network's usual ones
            'mean': (0.5,),
            'std': (0.5,),
            'training': {**recipe, 'label_smoothing': 0.0},
        }
    )
    config.verifier = ml_collections.ConfigDict(
        {
            'network': 'small_convnet',  # '': no verifier
            'width': 1.0,
            'weights': '',
            'mean': (),  # where the weights come from others; (): the teacher's
            'std': (),
            'training': {**recipe, 'label_smoothing': 0.0},
        }
    )
    # Others, never trained here, whose share of recognised images the report tells beside its: a dict each, with width, mean
    # and std too where they are not the defaults: --config.verifiers="({'network': 'resnet32', 'weights': 'resnet32.npz'},)"
    config.verifiers = ()
    config.student = ml_collections.ConfigDict(
        {
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
            **_fields(PRESETS[preset]),
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


def inversion_config(config, method: str = '') -> InversionConfig:
    """`config.synthesis` as the inversion core takes it; `prior_only` has no feature term."""
    group = config.synthesis
    weights = Weights(**group.weights)
    if (method or group.method) == 'prior_only':
        weights = dataclasses.replace(weights, feature=0.0)
    return InversionConfig(
        tuple(Stage(**stage) for stage in group.stages),
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
    )


def rounds_of(config) -> Rounds:
    """When the images of the run's pool come to the student."""
    group = config.synthesis
    batches = group.images // group.batch_size
    per_round = group.batches_per_round or batches
    return Rounds(per_round * group.batch_size, batches // per_round, max(1, config.distillation.updates_per_round))


def recipe_of(group) -> Recipe:
    """The `Recipe` among the fields of a config group."""
    return Recipe(**{field.name: group[field.name] for field in dataclasses.fields(Recipe)})


def quantization_of(config) -> QuantizationSettings:
    """The `QuantizationSettings` among the fields of their config group."""
    fields = dataclasses.fields(QuantizationSettings)
    return QuantizationSettings(**{field.name: config.quantization[field.name] for field in fields})


def check(config) -> None:
    """Refuse, before anything is written, what no task could run.

    Raises:
      DvinvError: names the field, its value and the choices.
    """
    for task in config.tasks:
        if task not in TASKS:
            raise DvinvError(f'tasks names {task!r}; choose among {", ".join(TASKS)}.')
    if config.synthesis.method not in METHODS:
        raise DvinvError(f'synthesis.method is {config.synthesis.method!r}; choose one of {", ".join(METHODS)}.')
    for name, least in (('images', 1), ('batch_size', 2)):
        if config.synthesis[name] < least:
            raise DvinvError(f'synthesis.{name} is {config.synthesis[name]}; it must be at least {least}.')
    for label in config.synthesis.classes:
        if type(label) is not int or label < 0:
            raise DvinvError(f'synthesis.classes names {label!r}; give the numbers of classes, from 0.')
    for control in config.synthesis.controls:
        if control not in DATA_FREE_CONTROLS:
            raise DvinvError(f'synthesis.controls names {control!r}; choose among {", ".join(DATA_FREE_CONTROLS)}.')
    if not 0 <= config.seed < 2**27:  # seeds of trainings are 16 times as large, and 32 bits wide
        raise DvinvError(f'seed is {config.seed}; it must be between 0 and {2**27 - 1}.')
    _check_rounds(config)
    shape = config.teacher.image_shape
    if shape and not (len(shape) == 3 and all(type(length) is int and length > 0 for length in shape)):
        raise DvinvError(f'teacher.image_shape is {shape}; it must be (height, width, channels), or () for the usual.')
    for name in ('teacher', 'verifier'):
        smoothing = config[name].training.label_smoothing
        if not 0 <= smoothing < 1:
            raise DvinvError(f'{name}.training.label_smoothing is {smoothing}; it must be at least 0 and below 1.')
        recipe_of(config[name].training).check_labels(f'{name}.training')
    for control in config.distillation.controls:
        if control not in (*DATA_FREE_CONTROLS, 'real'):
            raise DvinvError(f'distillation.controls names {control!r}; choose among noise, prior_only, real.')
    if config.distillation.temperature <= 0:
        raise DvinvError(f'distillation.temperature is {config.distillation.temperature}; it must be above 0.')
    if not 0 <= config.distillation.hint < math.inf:
        raise DvinvError(f'distillation.hint is {config.distillation.hint}; it must be at least 0 and finite.')
    if config.distillation.hints not in KINDS:
        raise DvinvError(f'distillation.hints is {config.distillation.hints!r}; choose one of {", ".join(KINDS)}.')
    if config.distillation.hints in ('layers', 'stages') and not config.distillation.hint:
        raise DvinvError(
            f'distillation.hints is {config.distillation.hints!r}, but distillation.hint, their weight, is 0; give it a '
            "weight, 100 for instance, or set distillation.hints='auto'."
        )
    if not 0 <= config.distillation.hint_decay < math.inf:
        raise DvinvError(f'distillation.hint_decay is {config.distillation.hint_decay}; it must be at least 0 and finite.')
    if not 0 <= config.distillation.graft <= 1:
        raise DvinvError(f'distillation.graft is {config.distillation.graft}; it is a probability, from 0 to 1.')
    for name in ('every', 'checkpoint_every', 'iterations'):
        if config.logging[name] < 1:
            raise DvinvError(f'logging.{name} is {config.logging[name]}; it must be at least 1.')
    if not 0 <= config.logging.checkpoint_minutes < math.inf:
        raise DvinvError(f'logging.checkpoint_minutes is {config.logging.checkpoint_minutes}; it must be at least 0.')
    if config.logging.checkpoint_every % config.logging.every:
        raise DvinvError(
            f'logging.every is {config.logging.every} and logging.checkpoint_every '
            f'{config.logging.checkpoint_every}; the second must be a multiple of the first.'
        )


def _check_rounds(config) -> None:
    """Refuse rounds that do not divide the batches or outlast the student's updates."""
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
    if group.method == 'adaptive' and not group.weights.competition:
        raise DvinvError("synthesis.method is 'adaptive', but synthesis.weights.competition is 0; give it a weight.")
    if per_round < 0 or (per_round and batches % per_round):
        raise DvinvError(
            f'synthesis.batches_per_round is {per_round}, which does not divide the {batches} batches; choose a divisor.'
        )
    if per_round and every < 1:
        raise DvinvError(
            f'distillation.updates_per_round is {every}; with synthesis.batches_per_round it must be at least 1.'
        )
    if per_round and (batches // per_round - 1) * every >= updates:
        raise DvinvError(
            f'{batches // per_round} rounds of {every} updates begin after the {updates} updates of distillation; raise '
            'distillation.updates, or lower distillation.updates_per_round.'
        )
    for count in config.distillation.counts:
        if type(count) is not int or not 1 <= count <= (count if config.pool else group.images):
            raise DvinvError(f'distillation.counts names {count!r}; give whole numbers from 1 to the {group.images} images.')
