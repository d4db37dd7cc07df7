"""Settings of a training, for teachers, verifiers, students, and pruned and quantized networks."""

import dataclasses
from typing import Literal

import optax

from dvinv.config.checks import validate_bounds, validate_choices, validate_positive
from dvinv.errors import DvinvError

Precision = Literal['float32', 'bfloat16']


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
