"""Settings of trainings, and of the tasks that use the images: distillation, pruning, continual learning, quantization."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import optax

from dvinv.runtime.errors import DvinvError, validate_bounds, validate_choices, validate_positive

Precision = Literal['float32', 'bfloat16']
DataFreeControl = Literal['noise', 'prior_only']
Cost = Literal['filters', 'flops', 'parameters', 'latency']
ContinualLoss = Literal['deepinversion', 'always_be_dreaming']
CONTINUAL_LOSSES: tuple[ContinualLoss, ...] = get_args(ContinualLoss)
BITS = re.compile(r'w(\d+)a(\d+)')


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained."""

    updates: int = 500  # number of batches, each followed by an update of the weights
    batch_size: int = 128  # images
    learning_rate: float = 0.01  # the highest, after the warm-up
    optimizer: Literal['adam', 'sgd'] = 'adam'  # 'adam' (with decoupled weight decay) or 'sgd' (Nesterov momentum .9)
    schedule: Literal['cosine', 'step'] = 'cosine'  # 'cosine' (to 0) or 'step' (times .1 after each of `milestones`)
    milestones: tuple[float, ...] = (0.4, 0.8)  # fractions of `updates`
    warmup: int = 0  # updates of linear warm-up
    clip_norm: float = 0.0  # norm to which larger gradients are clipped; 0: no clipping
    weight_decay: float = 0.0  # decoupled for 'adam', part of the gradient for 'sgd'
    shift: int = 0  # pixels of black padding for random crops
    flip: bool = False  # mirror each image with probability .5
    noise: float = 0.0  # largest standard deviation of Gaussian noise in an image, for pixels in [0, 1]
    resized_crop: float = 0.0  # smallest fraction of the image area in a random crop that is scaled up (ImageNet: .08)
    color_jitter: float = 0.0  # strength of random contrast, brightness and tint of each image; .2 is usual
    cutmix: float = 0.0  # probability that an image gets a rectangle of another one; only for distillation
    mixup: float = 0.0  # alpha; two images are mixed with a weight ~ Beta(alpha, alpha); only for distillation
    reestimate: int = 0  # batches on which BatchNorm statistics are estimated again at the end, weights frozen
    # Precision of the forward and backward pass; 'bfloat16' for GPU and TPU. Weights and statistics are float32.
    precision: Precision = 'float32'
    updates_per_dispatch: int = 0  # maximum number; 0: 1 on CPU, 50 elsewhere

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        validate_choices(self)
        validate_bounds(self, 1, 'updates', 'batch_size')
        validate_bounds(self, 0, 'warmup', 'clip_norm', 'weight_decay', 'shift', 'noise', 'color_jitter', 'mixup')
        validate_bounds(self, 0, 'reestimate', 'updates_per_dispatch')
        validate_positive(self, 'learning_rate')
        if not 0 <= self.resized_crop <= 1:
            raise DvinvError(f'resized_crop is {self.resized_crop}; it must be a fraction of the image area, or 0 for none.')
        if not 0 <= self.cutmix <= 1:
            raise DvinvError(f'cutmix is {self.cutmix}; it must be a probability, or 0 for none.')
        if self.warmup >= self.updates:
            raise DvinvError(f'warmup is {self.warmup}, but there are only {self.updates} updates.')
        if not all(isinstance(share, int | float) and 0 < share < 1 for share in self.milestones):
            raise DvinvError(f'milestones is {self.milestones}; they must be fractions of the updates, above 0 and below 1.')

    def dispatch_length(self, platform: str) -> int:
        """Returns the maximum number of updates per dispatch on `platform`, 'cpu', 'gpu' or 'tpu'."""
        return self.updates_per_dispatch or (1 if platform == 'cpu' else 50)

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns the Optax optimizer with its schedule."""
        if self.schedule == 'cosine':
            rate = optax.cosine_decay_schedule(self.learning_rate, max(1, self.updates - self.warmup))
        else:
            rate = optax.piecewise_constant_schedule(
                self.learning_rate, {round(share * self.updates) - self.warmup: 0.1 for share in self.milestones}
            )
        if self.warmup:
            rate = optax.join_schedules([optax.linear_schedule(0.0, self.learning_rate, self.warmup), rate], [self.warmup])
        if self.optimizer == 'adam':
            optimizer = optax.adamw(rate, weight_decay=self.weight_decay)
        else:
            optimizer = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.sgd(rate, 0.9, nesterov=True))
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer) if self.clip_norm else optimizer


@dataclasses.dataclass(frozen=True)
class LabelTrainingSettings(TrainingSettings):
    """How a network is trained on labelled images."""

    label_smoothing: float = 0.0  # fraction of the target probability that is spread over all classes

    def __post_init__(self):
        """Validates the fields as `TrainingSettings` does, and that images are not mixed, since labels are not."""
        super().__post_init__()
        validate_unmixed(self)
        if not 0 <= self.label_smoothing < 1:
            raise DvinvError(f'label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1.')


def validate_unmixed(settings: TrainingSettings) -> None:
    """Validates that images are not mixed in a training from labels.

    Raises:
      DvinvError: names the field and its value.
    """
    for field in ('cutmix', 'mixup'):
        if getattr(settings, field):
            raise DvinvError(
                f'{field} is {getattr(settings, field)}, but labels are not mixed; it is for distillation only.'
            )


def validate_devices(settings: TrainingSettings, group: str, devices: int) -> None:
    """Validates that a batch can be split evenly over `devices` devices.

    Args:
      settings: the settings with the batch size.
      group: the name of their config group, for the error message.
      devices: the number of devices.

    Raises:
      DvinvError: names the field, its value and the number of devices.
    """
    if settings.batch_size % devices:
        raise DvinvError(
            f'A batch of {settings.batch_size} images cannot be split evenly over {devices} devices; choose a '
            f'{group}.batch_size that {devices} divides, or another number of devices.'
        )


@dataclasses.dataclass(frozen=True)
class DistillationSettings(TrainingSettings):
    """How a student learns from the teacher."""

    temperature: float = 3.0  # temperature of the softmax of both networks
    # Weight of the loss between the features of student and teacher (hints), besides that of logits; 0: logits only (paper).
    hint: float = 0.0
    # 'layers': the inputs of BatchNorm layers that both have; 'stages': the last activations of each resolution, for any
    # two networks; 'none'; or 'auto': layers if both have the same ones, else stages.
    hints: Literal['auto', 'layers', 'stages', 'none'] = 'auto'
    # Probability that an image enters a stage of the student from the teacher's previous stage; it falls to 0.
    graft: float = 0.5
    hint_decay: float = 0.0  # exponent p of the factor (1 - fraction of the updates done)^p of `hint`; 0: constant
    updates_per_round: int = 0  # updates between two rounds of new images; the other updates follow the last round
    counts: tuple[int, ...] = ()  # additional students of the first n images each: the curve of accuracy against image count
    curve_points: int = 0  # evenly spaced points of the curve of accuracy against images seen; 0: no curve
    # Additional students with the same budget, trained on other images.
    controls: tuple[Literal['noise', 'prior_only', 'real'], ...] = ('noise', 'prior_only', 'real')

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        super().__post_init__()
        validate_positive(self, 'temperature')
        validate_bounds(self, 0, 'hint', 'hint_decay', 'updates_per_round', 'curve_points')
        if self.hints in ('layers', 'stages') and not self.hint:
            raise DvinvError(
                f'hints is {self.hints!r}, but distillation.hint, their weight, is 0; set it to 100 for instance, '
                "or set distillation.hints='auto'."
            )
        if not 0 <= self.graft <= 1:
            raise DvinvError(f'graft is {self.graft}; it is a probability, from 0 to 1.')
        if self.curve_points == 1 or self.curve_points > self.updates:
            raise DvinvError(
                f'curve_points is {self.curve_points}; it must be from 2 to {self.updates}, the number of updates, or 0 for '
                'no curve.'
            )

    @property
    def curve_updates(self) -> tuple[int, ...]:
        """The numbers of updates at the points of the curve before the last one, ascending."""
        return tuple(round(self.updates * point / self.curve_points) for point in range(1, self.curve_points))


@dataclasses.dataclass(frozen=True)
class PruningSettings(TrainingSettings):
    """How a network is pruned; the fields of a training are those of the fine-tuning after the last step."""

    updates_per_step: int = 100  # updates of the fine-tuning after every step
    temperature: float = 3.0  # temperature of the distillation from the unpruned network
    hint: float = 0.0  # weight of the loss between BatchNorm inputs, in the channels that are kept
    measure: Cost = 'flops'  # the cost that `target_ratio` refers to: filters, flops, parameters or latency
    target_ratio: float = 0.5  # fraction of the unpruned network's cost
    steps: int = 5  # pruning steps to reach it, each followed by fine-tuning; each reduces the cost by the same factor
    importance: Literal['taylor', 'magnitude', 'random'] = 'taylor'  # or 'magnitude', 'random'
    importance_batches: int = 10  # batches of images on which the Taylor importance is estimated in every step
    eta: float = 0.0  # weight of the relative cost against the relative importance (the paper's hardware-aware term)
    cost: Cost = 'latency'  # the cost that `eta` weighs; one of the measures
    min_channels: int = 2  # minimum number of channels of every layer
    round_to: int = 1  # number of channels that are removed together; with 8, widths stay efficient on CPUs and GPUs
    ignored_layers: tuple[str, ...] = ()  # layers that keep all their channels
    adaptive_batches: int = 0  # batches made in every step in competition with the pruned network; 0: the pool only
    latency_batch: int = 128  # images in the batch for measurements of the latency
    # Additional networks: not fine-tuned, pruned by other importances, or pruned with other images.
    controls: tuple[Literal['untuned', 'magnitude', 'random', 'noise', 'prior_only', 'real'], ...] = (
        'untuned',
        'random',
        'real',
    )

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        super().__post_init__()
        if not 0 < self.target_ratio < 1:
            raise DvinvError(
                f'target_ratio is {self.target_ratio}; it must be a fraction of the cost of the network, between 0 and 1.'
            )
        validate_bounds(self, 1, 'steps', 'importance_batches', 'min_channels', 'round_to', 'latency_batch')
        validate_bounds(self, 0, 'eta', 'updates_per_step', 'hint', 'adaptive_batches')
        validate_positive(self, 'temperature')
        if 0 < self.updates_per_step <= self.warmup:
            raise DvinvError(f'warmup is {self.warmup}, but a step has only {self.updates_per_step} updates.')

    @property
    def needs_latency(self) -> bool:
        """Whether a table of latencies must be measured."""
        return 'latency' in (self.measure, self.cost if self.eta else '')

    def target_of_step(self, step: int) -> float:
        """Returns the fraction of the cost that remains after a step, 1 to `steps`."""
        return self.target_ratio ** (step / self.steps)


@dataclasses.dataclass(frozen=True)
class ContinualSettings(TrainingSettings):
    """The tasks that follow the teacher's classes, and how they are learned."""

    # One dict per task, with the fields that differ from the group `data`: {'classes': (5, 6)} for more classes of the same
    # data set, {'name': 'digits', 'image_size': 32} for those of another.
    steps: tuple[Mapping[str, Any], ...] = ()
    loss: ContinualLoss = 'deepinversion'  # (paper) or 'always_be_dreaming', which treats old and new classes equally
    temperature: float = 1.0  # temperature of the KL divergences from the old network
    old_images: float = 1.0  # weight of the term on synthesized images, in 'deepinversion'; see dvinv.continual.losses
    old_answers: float = 1.0  # weight of the term on the old classes' logits for new images, in 'deepinversion'
    head: float = 1.0  # weight of the term on the head, in 'always_be_dreaming'
    features: float = 1.0  # weight of the term on the features, in 'always_be_dreaming'
    # Additional networks: without images of old classes, LwF.MC, with real images of old classes, or with the other loss.
    controls: tuple[Literal['finetune', 'lwf_mc', 'replay', 'joint', 'deepinversion', 'always_be_dreaming'], ...] = (
        'finetune',
        'lwf_mc',
        'replay',
        'joint',
    )

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        super().__post_init__()
        validate_unmixed(self)
        if self.loss in self.controls:
            raise DvinvError(f'controls names {self.loss!r}, which is already the loss; leave it out.')
        validate_positive(self, 'temperature')
        validate_bounds(self, 0, *self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the terms of the losses, by their names."""
        return {name: getattr(self, name) for name in ('old_images', 'old_answers', 'head', 'features')}


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """How a network is quantized."""

    settings: tuple[str, ...] = ('w8a8', 'w6a6', 'w4a4')  # bits of weights and of layers' inputs
    distilled: tuple[str, ...] = ('w4a4',)  # those of `settings` that are distilled from the float network, on the pool
    edge_bits: int = 8  # minimum number of bits of the first and the last layer
    float_layers: tuple[str, ...] = ()  # patterns (*, ?) of layers that stay in float32
    # Number of calibration images from the pool (and from each control); 0: ranges follow from BatchNorm's statistics.
    images: int = 512
    ranges: Literal['minmax', 'percentile', 'mse'] = 'mse'  # 'minmax', 'percentile' or 'mse' (least squared error)
    # Whether each token gets a range of its own, computed at run time, in layers that take tokens (as in transformers).
    token_ranges: bool = False
    equalise: bool = False  # equalise the ranges of the channels between two layers; see docs/experiments.md
    correct: bool = True  # bias correction: removes the shift of the means by rounding, with BatchNorm's statistics
    controls: tuple[Literal['noise', 'real'], ...] = ('noise', 'real')  # additional networks, calibrated on other images
    temperature: float = 3.0  # temperature of the distillation
    # Training of the networks that are distilled.
    training: TrainingSettings = TrainingSettings(batch_size=64, learning_rate=2e-4)

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        if not self.settings:
            raise DvinvError("settings is (); give at least one, as in settings=('w8a8', 'w4a4').")
        for setting in self.settings:
            bits_of(setting)
        for name in self.distilled:
            if name not in self.settings:
                raise DvinvError(f'distilled names {name!r}; choose among {", ".join(self.settings)}.')
        validate_choices(self)
        if not 2 <= self.edge_bits <= 8:
            raise DvinvError(f'edge_bits is {self.edge_bits}; it must be from 2 to 8.')
        validate_bounds(self, 0, 'images')
        validate_positive(self, 'temperature')
        if not self.images and self.controls:
            raise DvinvError('images is 0, but quantization.controls is not empty; each control needs images.')


def bits_of(setting: str) -> tuple[int, int]:
    """Returns the bits of weights and of layers' inputs: (4, 8) for 'w4a8'.

    Raises:
      DvinvError: there is no such setting, or its bits are not from 2 to 8.
    """
    match = BITS.fullmatch(setting) if isinstance(setting, str) else None
    if not match or not all(2 <= int(bits) <= 8 for bits in match.groups()):
        raise DvinvError(f'settings names {setting!r}; it must be like w4a8, with weights and activations of 2 to 8 bits.')
    return int(match[1]), int(match[2])
