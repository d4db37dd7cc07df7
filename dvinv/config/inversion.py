"""Settings of an inversion: its stages and the weights of its objective."""

import dataclasses
from typing import Literal

import optax

from dvinv.config.checks import validate_bounds, validate_choices
from dvinv.config.training import Precision
from dvinv.errors import DvinvError

StatisticsScope = Literal['device', 'global']


@dataclasses.dataclass(frozen=True)
class Stage:
    """A number of iterations at one resolution; each stage starts with a new Adam state."""

    iterations: int  # each changes all images of a batch
    learning_rate: float  # the highest, after the warm-up
    resolution: int = 0  # height in pixels of the teacher's input, at most the image's; 0: the image's own
    schedule: Literal['cosine', 'constant'] = 'cosine'  # 'cosine' (to 0) or 'constant'
    warmup: int = 0  # iterations of linear warm-up from 0
    beta1: float = 0.9  # Adam's decay rate of the mean of the gradient
    beta2: float = 0.999  # and of the mean of its square
    augmentation: Literal['roll', 'crop'] = 'roll'  # 'roll' (paper) or 'crop': see dvinv.inversion.augmentation
    jitter: int = 0  # pixels, at this stage's resolution
    flip: bool = False  # mirror with probability .5: the whole batch together ('roll') or each image ('crop')
    noise: float = 0.0  # largest standard deviation of Gaussian noise in an image, for pixels in [0, 1]
    color_shift: float = 0.0  # strength of random scales and shifts of the channels of each image, before the teacher
    centre: float = 1.0  # fraction of height and width that is cropped from the middle and scaled up; 1: no crop
    clip: bool = True  # keep pixels in the valid range [0, 1] (before normalisation); 'fourier' always does

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        validate_choices(self)
        validate_bounds(self, 1, 'iterations')
        validate_bounds(self, 0, 'resolution', 'warmup', 'jitter', 'noise', 'learning_rate', 'color_shift')
        if not 0 < self.centre <= 1:
            raise DvinvError(f'centre is {self.centre}; it is a fraction of the picture, above 0 and at most 1.')
        if self.warmup >= self.iterations and self.schedule == 'cosine':
            raise DvinvError(
                f'warmup is {self.warmup}, but the stage has only {self.iterations} iterations; the cosine schedule needs '
                'iterations after the warm-up.'
            )

    def view_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (height, width) in pixels of the teacher's input for images of this size, the width rounded."""
        if not self.resolution:
            return height, width
        return self.resolution, max(1, (2 * width * self.resolution + height) // (2 * height))

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns Adam on the pixels, with this stage's schedule."""
        start = 0.0 if self.warmup else self.learning_rate  # without warm-up, Optax would keep the start value
        if self.schedule == 'constant':
            rate = optax.warmup_constant_schedule(start, self.learning_rate, self.warmup)
        else:
            rate = optax.warmup_cosine_decay_schedule(start, self.learning_rate, self.warmup, self.iterations)
        return optax.adam(rate, self.beta1, self.beta2)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the terms of the objective; a term of weight 0 is still logged, but has no gradient."""

    main: float = 1.0  # cross-entropy to the target labels
    feature: float = 0.01  # BatchNorm moments against running statistics
    first_bn_multiplier: float = 1.0  # factor of the first BatchNorm layer within the feature term
    total_variation: float = 1e-4  # differences of neighbouring pixels
    l2: float = 0.0  # norm of all pixels
    competition: float = 0.0  # Adaptive DeepInversion; needs a student
    # Entropy of the similarities between patches, for networks with attention: see dvinv.inversion.priors.
    patch_similarity: float = 0.0
    # Mean and variance of the pixels of a batch against the network's mean and std, which are those of its training pixels.
    pixel_moments: float = 0.0


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """The settings of `invert`, which also takes the teacher, the labels and the key. Hashable, static."""

    stages: tuple[Stage, ...]
    weights: Weights = Weights()
    total_variation: Literal['l2', 'l1'] = 'l2'  # norm of the differences: 'l2' (paper) or 'l1'
    # The parameters that Adam optimizes: 'pixels' (paper) or their 'fourier' coefficients, see
    # dvinv.inversion.parameterization.
    parameterization: Literal['pixels', 'fourier'] = 'pixels'
    contrast: float = 0.6  # standard deviation of the initial images before the sigmoid, for 'fourier'
    # The norm of each image ('image': ImageNet) or of the whole batch ('batch': CIFAR).
    l2: Literal['image', 'batch'] = 'image'
    # Total variation and L2 of the teacher's input ('view': paper) or of the 'image' itself.
    prior_on: Literal['view', 'image'] = 'view'
    # Each device inverts its own batches ('device') or a part of one batch ('global').
    bn_stats: StatisticsScope = 'device'
    # Precision of the networks' forward and backward pass; 'bfloat16' for GPU and TPU. Losses are float32.
    precision: Precision = 'float32'
    recompute: int = 0  # to save memory, recompute activations in the backward pass, in this number of segments; 0: keep all
    iterations_per_dispatch: int = 0  # 0: 1 on CPU, where XLA runs convolutions in a loop body 10 times slower; else 100
    # Unit of the steps and the initial noise of 'pixels', and of the priors: pixels of mean .5 and std .25 for any network
    # ('common'), or pixels normalised by the network's own mean and std, if it takes normalised pixels ('network': paper).
    pixel_scale: Literal['common', 'network'] = 'common'
    attention: tuple[str, ...] = ('*Attention*:output',)  # patterns of the layers for `weights.patch_similarity`

    def __post_init__(self):
        """Validates the fields; a `DvinvError` names the field, its value and the way out."""
        if not (isinstance(self.stages, tuple | list) and all(isinstance(stage, Stage) for stage in self.stages)):
            raise DvinvError(f'stages is {self.stages!r}; it must be a tuple of stages, (Stage(2000, 0.1),) for instance.')
        if not self.stages:
            raise DvinvError('An inversion needs at least one stage; stages is empty.')
        validate_choices(self)
        validate_bounds(self, 0, 'recompute', 'iterations_per_dispatch')
        if self.contrast <= 0:
            raise DvinvError(f'contrast is {self.contrast}; it must be above 0, otherwise no step would change an image.')

    @property
    def iterations(self) -> int:
        """Iterations of one batch over all stages."""
        return sum(stage.iterations for stage in self.stages)

    def validate_for(self, image_shape: tuple[int, int, int]) -> None:
        """Validates that the resolutions of the stages fit images of the shape [H, W, C].

        Raises:
          DvinvError: names the stage, its resolution and the height of the images.
        """
        height, _, _ = image_shape
        for i, stage in enumerate(self.stages):
            if stage.resolution > height:
                raise DvinvError(
                    f'stages[{i}].resolution is {stage.resolution}, but the images have a height of {height} pixels; choose '
                    f'at most {height}, or 0 for the full image.'
                )
