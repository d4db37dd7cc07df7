"""How a network is trained: a group of the config, field for field, and the Optax optimiser that follows from it."""

import dataclasses

import optax

from dvinv.errors import DvinvError
from dvinv.inversion.augmentation import Augmentation
from dvinv.inversion.settings import PRECISIONS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; a group of the config, field for field."""

    updates: int  # of the weights, by a batch each
    batch_size: int  # images
    learning_rate: float  # the highest, after the warm-up
    optimiser: str = 'adam'  # 'adam' (with decoupled weight decay) or 'sgd' (Nesterov momentum .9)
    schedule: str = 'cosine'  # 'cosine' (to 0) or 'step' (times .1 after each of `milestones`)
    milestones: tuple[float, ...] = (0.4, 0.8)  # shares of `updates`
    warmup: int = 0  # updates of linear warm-up
    clip_norm: float = 0.0  # a gradient of a larger norm is shortened to it; 0: never
    weight_decay: float = 0.0  # decoupled for 'adam', a part of the gradient for 'sgd'
    shift: int = 0  # pixels; random crops of a picture padded with black
    flip: bool = False  # a coin an image
    noise: float = 0.0  # deviation, up to, of Gaussian noise an image, for pixels in [0, 1]
    resized_crop: float = 0.0  # least share of a picture in a random window that is scaled to its size (ImageNet: .08)
    color_jitter: float = 0.0  # strength of random contrast, brightness and tint of each image; .2 is usual
    cutmix: float = 0.0  # probability of a rectangle of another picture in each. For students, whom a teacher answers
    mixup: float = 0.0  # alpha; two pictures are mixed by a share ~ Beta(alpha, alpha). For students, whom a teacher answers
    reestimate: int = 0  # batches on which BatchNorm statistics are estimated again at the end, weights frozen
    precision: str = 'float32'  # of the forward and backward pass; 'bfloat16' for GPU and TPU. All that is kept: float32
    updates_per_dispatch: int = 0  # at most; 0: 1 on CPU, 50 elsewhere

    def check(self, name: str) -> None:
        """Refuse a recipe that cannot be followed; `name` is that of its config group."""
        for field in ('updates', 'batch_size'):
            if getattr(self, field) < 1:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)}; it must be at least 1.')
        at_least_0 = 'warmup', 'clip_norm', 'weight_decay', 'shift', 'noise', 'color_jitter', 'mixup', 'reestimate'
        for field in (*at_least_0, 'updates_per_dispatch'):
            if getattr(self, field) < 0:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)}; it must be at least 0.')
        if not 0 <= self.resized_crop <= 1:
            raise DvinvError(f'{name}.resized_crop is {self.resized_crop}; it must be a share of a picture, or 0 for none.')
        if not 0 <= self.cutmix <= 1:
            raise DvinvError(f'{name}.cutmix is {self.cutmix}; it must be a probability, or 0 for none.')
        if self.learning_rate <= 0:
            raise DvinvError(f'{name}.learning_rate is {self.learning_rate}; it must be above 0.')
        if self.warmup >= self.updates:
            raise DvinvError(f'{name}.warmup is {self.warmup}, but there are only {self.updates} updates.')
        if not all(isinstance(share, int | float) and 0 < share < 1 for share in self.milestones):
            raise DvinvError(
                f'{name}.milestones is {self.milestones}; they must be shares of the updates, above 0 and below 1.'
            )
        for field, choices in (('optimiser', ('adam', 'sgd')), ('schedule', ('cosine', 'step')), ('precision', PRECISIONS)):
            if getattr(self, field) not in choices:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)!r}; choose one of {", ".join(choices)}.')

    def check_labels(self, name: str) -> None:
        """Raises a DvinvError if images are mixed, which labels cannot follow; `name` is that of the config group."""
        for field in ('cutmix', 'mixup'):
            if getattr(self, field):
                raise DvinvError(
                    f'{name}.{field} is {getattr(self, field)}, but labels are not mixed; it is for distillation.'
                )

    def check_devices(self, name: str, devices: int) -> None:
        """Refuse a batch that cannot be split evenly over so many devices; `name` is that of the config group."""
        if self.batch_size % devices:
            raise DvinvError(
                f'A batch of {self.batch_size} images cannot be split evenly over {devices} devices; choose a '
                f'{name}.batch_size that {devices} divides, or another number of devices.'
            )

    def dispatch_length(self, platform: str) -> int:
        """Returns how many updates a dispatch may have on `platform`, 'cpu', 'gpu' or 'tpu'."""
        return self.updates_per_dispatch or (1 if platform == 'cpu' else 50)

    @property
    def look(self) -> Augmentation:
        """How the network is shown its training images."""
        return Augmentation(
            'crop', self.shift, self.flip, self.noise, self.resized_crop, self.color_jitter, self.cutmix, self.mixup
        )

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser with its schedule."""
        if self.schedule == 'cosine':
            rate = optax.cosine_decay_schedule(self.learning_rate, max(1, self.updates - self.warmup))
        else:
            rate = optax.piecewise_constant_schedule(
                self.learning_rate, {round(share * self.updates) - self.warmup: 0.1 for share in self.milestones}
            )
        if self.warmup:
            rate = optax.join_schedules([optax.linear_schedule(0.0, self.learning_rate, self.warmup), rate], [self.warmup])
        if self.optimiser == 'adam':
            optimizer = optax.adamw(rate, weight_decay=self.weight_decay)
        else:
            optimizer = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.sgd(rate, 0.9, nesterov=True))
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer) if self.clip_norm else optimizer
