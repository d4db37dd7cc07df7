"""All settings of a run, in groups as in a config file. Conditions that concern several groups are validated here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dvinv.config.inversion import InversionConfig, Stage, StatisticsScope, Weights
from dvinv.config.tasks import (
    ContinualSettings,
    DataFreeControl,
    DistillationSettings,
    LabelTrainingSettings,
    Precision,
    PruningSettings,
    QuantizationSettings,
)
from dvinv.runtime.errors import DvinvError, validate_bounds, validate_choices

Task = Literal['teacher', 'synthesis', 'distillation', 'pruning', 'continual', 'quantization', 'report']
Method = Literal['deepinversion', 'adaptive', 'prior_only', 'noise']
TASKS: tuple[Task, ...] = get_args(Task)
DATA_FREE_CONTROLS: tuple[DataFreeControl, ...] = get_args(DataFreeControl)
# None stands for weights that `Settings.with_preset` fills.
OPEN_WEIGHTS = Weights(**dict.fromkeys((field.name for field in dataclasses.fields(Weights)), None))  # type: ignore[arg-type]
# Tasks with `controls` that use other images than the pool.
CONTROLLED: tuple[Task, ...] = ('synthesis', 'distillation', 'pruning', 'quantization')


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The real data set and its files. No synthesized pixel depends on it."""

    name: str = 'digits'  # '': no real data; figures that need them are null
    path: str = ''  # path of the test images (npz, folders), or of prepared data sets (cifar10, cifar100)
    train_path: str = ''  # path of the training images (npz, folders); '': none, and no network is trained on real images
    image_size: int = 0  # height and width that images (not TFDS ones) are scaled and cropped to; 0: all have one size
    classes: tuple[int, ...] = ()  # the classes to use, renumbered from 0 in this order; (): all
    # Names of the class folders, in the order of labels; (): see dvinv.data.files. Without data, for the report only.
    class_names: tuple[str, ...] = ()
    validation: bool = False  # score on a held-out fifth of the training split instead of the test split


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """The network that is inverted."""

    # 'module:function' that returns a dvinv.Teacher, or a Flax module (it may take num_classes, and rngs for an NNX
    # model), which is trained here, or read from `weights` that dvinv wrote; '': use `network` and `weights`.
    factory: str = ''
    network: str = 'small_resnet'  # a name of dvinv.networks
    width: float = 1.0  # factor of the number of channels of all layers
    weights: str = ''  # path of a network file, or of published weights of other projects; '': train the network here
    # Height, width, channels for published weights of other projects; (): the network's usual ones.
    image_shape: tuple[int, ...] = ()
    # One number per channel, for pixels in [0, 1]; (): those in the weights file, else those of this network's published
    # weights, or .5 each for a network that is trained here.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()  # as `mean`
    # Recorded moments for a network without BatchNorm, or to replace running statistics: a file of `--record_moments`.
    moments: str = ''
    moments_images: int = 0  # number of real training images from which the task teacher records moments; 0: none
    training: LabelTrainingSettings = LabelTrainingSettings()  # for a network that is trained here

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field and its value."""
        shape = self.image_shape
        if shape and not (len(shape) == 3 and all(type(length) is int and length > 0 for length in shape)):
            raise DvinvError(f'image_shape is {shape}; it must be (height, width, channels), or () for the usual shape.')
        if self.moments_images and self.moments:
            raise DvinvError(f'moments_images is {self.moments_images}, and moments is {self.moments!r}; give one of them.')
        if self.moments_images and self.moments_images < 2:
            raise DvinvError(
                f'moments_images is {self.moments_images}; moments need at least 2 images, better 100 (0: none).'
            )


@dataclasses.dataclass(frozen=True)
class VerifierSettings:
    """The network that judges the images, independent of the teacher."""

    network: str = 'small_convnet'  # '': no verifier
    width: float = 1.0  # factor of the number of channels of all layers
    weights: str = ''  # path of a network file, or of published weights of other projects; '': train the network here
    # For published weights of other projects; (): as for the teacher, but the teacher's if none are known.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()  # as `mean`
    training: LabelTrainingSettings = LabelTrainingSettings()  # for a network that is trained here


@dataclasses.dataclass(frozen=True)
class MoreVerifierSettings:
    """An additional pretrained verifier, used in the report only."""

    network: str  # a name of dvinv.networks, which also names its figures
    weights: str  # path of a network file, or of published weights of other projects
    width: float = 1.0  # factor of the number of channels of all layers
    mean: tuple[float, ...] = ()  # one number per channel, for pixels in [0, 1]; (): as for the verifier
    std: tuple[float, ...] = ()  # as `mean`

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field and its value."""
        for name in ('network', 'weights'):
            if not getattr(self, name):
                raise DvinvError(
                    f"{name} is ''; name a network and its weights file, because only the first verifier is trained here."
                )
        if min(self.std, default=1) <= 0:
            raise DvinvError(f'std is {self.std}; every standard deviation must be above 0.')


@dataclasses.dataclass(frozen=True)
class StudentSettings:
    """The network that learns from the teacher."""

    factory: str = ''  # 'module:function' that returns a Flax module, as for the teacher; '': use `network` and `width`
    network: str = 'small_resnet'  # a name of dvinv.networks
    width: float = 1.0  # factor of the number of channels of all layers
    inherit: bool = False  # start from the teacher's weights in layers of the same name, depth and shape


@dataclasses.dataclass(frozen=True)
class SynthesisSettings:
    """How images are synthesized. Fields that are None are those of `InversionConfig` that a preset fills."""

    method: Method = 'deepinversion'  # or 'adaptive', 'prior_only' (no feature term), 'noise' (not optimized)
    images: int = 1024  # number of images in the pool; a multiple of batch_size
    batch_size: int = 256  # images that are inverted together and share their moments
    classes: tuple[int, ...] = ()  # target classes of the images, in turn; (): all
    batches_per_round: int = 0  # batches added to the pool every distillation.updates_per_round; 0: all before the first
    controls: tuple[DataFreeControl, ...] = ()  # baseline methods that also make `images` images, for the report
    stages: tuple[Stage, ...] | None = None  # run one after the other
    weights: Weights = OPEN_WEIGHTS  # weights of the terms of the objective
    total_variation: str | None = None
    parameterization: str | None = None
    contrast: float | None = None
    l2: str | None = None
    prior_on: str | None = None
    precision: Precision = 'float32'
    recompute: int = 0
    iterations_per_dispatch: int = 0
    pixel_scale: str | None = None
    attention: tuple[str, ...] | None = None

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field and its value."""
        validate_choices(self)
        validate_bounds(self, 1, 'images')
        validate_bounds(self, 2, 'batch_size')
        for label in self.classes:
            if type(label) is not int or label < 0:
                raise DvinvError(f'classes contains {label!r}; give the numbers of classes, from 0.')
        if self.stages is not None:
            self.inversion_config('device')

    @property
    def batches(self) -> int:
        """The number of batches of the pool."""
        return self.images // self.batch_size

    @property
    def is_open(self) -> bool:
        """Whether some fields are None, which a preset must fill."""
        return None in (*vars(self).values(), *vars(self.weights).values())

    def inversion_config(self, bn_stats: StatisticsScope, method: str = '') -> InversionConfig:
        """Returns the settings as `invert` takes them.

        Args:
          bn_stats: the setting of the run.
          method: the method; '': `self.method`. For 'prior_only', the class term is the only term of the network.
        """
        names = {field.name for field in dataclasses.fields(InversionConfig)} - {'bn_stats', 'weights'}
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        weights = self.weights
        if (method or self.method) == 'prior_only':
            weights = dataclasses.replace(weights, feature=0.0, patch_similarity=0.0, pixel_moments=0.0)
        return InversionConfig(weights=weights, bn_stats=bn_stats, **values)


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """How often measurements and checkpoints are written; no result depends on it."""

    every: int = 50  # updates of a training per line in metrics.jsonl
    checkpoint_every: int = 500  # updates of a training per checkpoint
    checkpoint_minutes: float = 10.0  # minutes between two checkpoints of unfinished batches; 0: only on SIGTERM
    iterations: int = 10  # iterations of a synthesis per point of its curve

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field and its value."""
        validate_bounds(self, 1, 'every', 'checkpoint_every', 'iterations')
        validate_bounds(self, 0, 'checkpoint_minutes')
        if self.checkpoint_every % self.every:
            raise DvinvError(
                f'every is {self.every} and logging.checkpoint_every is {self.checkpoint_every}; the second must be a '
                'multiple of the first.'
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    seed: int = 0  # seed of all random numbers
    # Tasks are run in the order of dvinv.config.TASKS; to run a single one: --config.tasks="('teacher',)".
    tasks: tuple[Task, ...] = ('teacher', 'synthesis', 'distillation', 'report')
    devices: int = 0  # number of devices; 0: all. On CPU, that of virtual devices (0: one per core)
    # 'device': each device inverts its own batches; 'global': one batch is split over all devices.
    bn_stats: StatisticsScope = 'device'
    pool: str = ''  # path of an existing pool, used instead of synthesizing one
    # Fraction of the pool on which no network is trained, if there are no real data (data.name=''): networks are compared
    # with the teacher on it; 0: none, and no scores.
    held_out: float = 0.0625
    data: DataSettings = DataSettings()
    teacher: TeacherSettings = TeacherSettings()
    verifier: VerifierSettings = VerifierSettings()
    # Additional pretrained verifiers, used in the report only; one dict each, which may also have width, mean and std:
    # --config.verifiers="({'network': 'resnet32', 'weights': 'resnet32.npz'},)"
    verifiers: tuple[MoreVerifierSettings, ...] = ()
    student: StudentSettings = StudentSettings()
    synthesis: SynthesisSettings = SynthesisSettings()
    distillation: DistillationSettings = DistillationSettings()
    pruning: PruningSettings = PruningSettings()
    continual: ContinualSettings = ContinualSettings()
    quantization: QuantizationSettings = QuantizationSettings()
    logging: LoggingSettings = LoggingSettings()

    def __post_init__(self):
        """Validates conditions on several groups; a `DvinvError` names the field, its value and the way out."""
        validate_choices(self)
        if not 0 <= self.seed < 2**27:  # seeds of trainings are 16 times as large, and 32 bits wide
            raise DvinvError(f'seed is {self.seed}; it must be between 0 and {2**27 - 1}.')
        if not 0 <= self.held_out <= 0.5:
            raise DvinvError(f'held_out is {self.held_out}; it is a fraction of the pool, from 0 to 0.5.')
        self._validate_verifiers()
        if self.makes_images or (self.trains_student and not self.pool):
            self._validate_rounds()
        if self.makes_images:
            self._validate_batches()
        if self.trains_student:
            for count in self.distillation.counts:
                if type(count) is not int or not 1 <= count <= (count if self.pool else self.training_images):
                    raise DvinvError(
                        f'distillation.counts names {count!r}; give whole numbers from 1 to {self.training_images}, the '
                        'number of training images.'
                    )

    @property
    def ordered_tasks(self) -> list[Task]:
        """The tasks of the run, in the order in which they are run."""
        return [task for task in TASKS if task in self.tasks]

    def has_data_free_controls(self, task: Task) -> bool:
        """Returns whether controls of `task`, one of `CONTROLLED`, use images made with the settings `synthesis`."""
        return any(control in DATA_FREE_CONTROLS for control in getattr(self, task).controls)

    @property
    def makes_images(self) -> bool:
        """Whether a task makes images with the settings `synthesis`."""
        return (
            self._makes_pools
            or ('pruning' in self.tasks and self.pruning.adaptive_batches > 0)
            or any(task in self.tasks and self.has_data_free_controls(task) for task in CONTROLLED)
        )

    @property
    def trains_student(self) -> bool:
        """Whether a task trains `student`: distillation, or a task that makes images in competition with it."""
        return 'distillation' in self.tasks or (self._makes_pools and self.synthesis.method == 'adaptive')

    @property
    def _makes_pools(self) -> bool:
        """Whether a task makes a pool by the method of `synthesis`."""
        return ('synthesis' in self.tasks and not self.pool) or 'continual' in self.tasks

    @property
    def needs_verifier(self) -> bool:
        """Whether a task needs the verifier."""
        return 'teacher' in self.tasks or 'synthesis' in self.tasks

    @property
    def round_images(self) -> int:
        """The number of images of the run's own pool per round."""
        return (self.synthesis.batches_per_round or self.synthesis.batches) * self.synthesis.batch_size

    @property
    def training_images(self) -> int:
        """The number of images of the run's own pool on which networks are trained."""
        rounds = self.synthesis.images // max(1, self.round_images)
        return self.synthesis.images - rounds * self.held_out_of(self.round_images)

    def held_out_of(self, images: int) -> int:
        """Returns the number of held-out images in a round of `images` images, see `dvinv.evaluation`."""
        return 0 if self.data.name else int(self.held_out * images)

    def inversion_config(self, method: str = '') -> InversionConfig:
        """Returns the settings of the synthesis as `invert` takes them; for `method` see `SynthesisSettings`."""
        return self.synthesis.inversion_config(self.bn_stats, method)

    def with_preset(self, preset: InversionConfig) -> 'Settings':
        """Returns the settings with the synthesis fields that are None taken from `preset`."""
        group = self.synthesis
        weights = {name: value for name, value in vars(preset.weights).items() if getattr(group.weights, name) is None}
        values = {name: getattr(preset, name) for name, value in vars(group).items() if value is None}
        values['weights'] = dataclasses.replace(group.weights, **weights)
        return dataclasses.replace(self, synthesis=dataclasses.replace(group, **values))

    def _validate_verifiers(self) -> None:
        if self.verifiers and not self.verifier.network:
            raise DvinvError("verifiers has entries, but verifier.network is ''; move the first entry there.")
        names = [self.verifier.network]
        for index, verifier in enumerate(self.verifiers):
            if verifier.network in names:
                raise DvinvError(
                    f'verifiers[{index}].network is {verifier.network}, as for another verifier; figures are named by the '
                    'network, so leave one out.'
                )
            names.append(verifier.network)

    def _validate_batches(self) -> None:
        images, batch_size = self.synthesis.images, self.synthesis.batch_size
        if images % batch_size:
            raise DvinvError(
                f'synthesis.images is {images}, which is not a multiple of synthesis.batch_size, {batch_size}; choose for '
                f'instance {max(1, images // batch_size) * batch_size}.'
            )
        competition = self.synthesis.weights.competition
        if self.synthesis.method == 'adaptive' and competition == 0:
            raise DvinvError("synthesis.method is 'adaptive', but synthesis.weights.competition is 0; give it a weight.")
        if 'pruning' in self.tasks and self.pruning.adaptive_batches and competition is not None and not competition > 0:
            raise DvinvError(
                f'pruning.adaptive_batches is {self.pruning.adaptive_batches}, but synthesis.weights.competition is '
                f'{competition}; give it a weight above 0, or no batches.'
            )

    def _validate_rounds(self) -> None:
        """Validates that rounds divide the batches, and end before the updates of a student that is trained."""
        group, updates = self.synthesis, self.distillation.updates
        batches, per_round, every = group.batches, group.batches_per_round, self.distillation.updates_per_round
        if group.method == 'adaptive' and not per_round:
            raise DvinvError(
                "synthesis.method is 'adaptive', but synthesis.batches_per_round is 0; set it to the number of batches "
                'that are made in competition with each state of the student, and distillation.updates_per_round to the '
                'number of its updates between them.'
            )
        if per_round < 0 or (per_round and batches % per_round):
            raise DvinvError(
                f'synthesis.batches_per_round is {per_round}, which does not divide the {batches} batches; choose a divisor.'
            )
        if not (per_round and self.trains_student):
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


def nested(settings: Any) -> Any:
    """Returns settings, or a part of them, as nested dicts, lists and scalars for JSON."""
    if dataclasses.is_dataclass(settings):
        return {name: nested(value) for name, value in sorted(vars(settings).items())}
    if isinstance(settings, Mapping):
        return {name: nested(value) for name, value in sorted(settings.items())}
    return [nested(item) for item in settings] if isinstance(settings, tuple | list) else settings
