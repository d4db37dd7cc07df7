"""Settings of an inversion, its stages and the weights of its objective, and presets of them by name."""

import dataclasses
import functools
from typing import Any, Literal

import optax

from dvinv.config.tasks import Precision
from dvinv.runtime.errors import DvinvError, validate_bounds, validate_choices

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
    # Entropy of the similarities between patches, for networks with attention: see dvinv.inversion.losses.
    patch_similarity: float = 0.0
    # Mean and variance of the pixels of a batch against the network's mean and std, which are those of its training pixels.
    pixel_moments: float = 0.0


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """The settings of `invert`, which also takes the teacher, the labels and the key. Hashable, static."""

    stages: tuple[Stage, ...]
    weights: Weights = Weights()
    total_variation: Literal['l2', 'l1'] = 'l2'  # norm of the differences: 'l2' (paper) or 'l1'
    # The parameters that Adam optimizes: 'pixels' (paper) or their 'fourier' coefficients, see dvinv.inversion.step.
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


_cifar_stage = functools.partial(Stage, iterations=2000, schedule='constant', jitter=2, clip=False)
_imagenet_stage = functools.partial(Stage, learning_rate=0.2, warmup=100, beta1=0.5, beta2=0.9, flip=True)
_IMAGENET_WEIGHTS = Weights(feature=0.01, first_bn_multiplier=10.0, total_variation=1e-4, l2=1e-5, competition=0.2)

PRESETS = {
    # The 8x8 digits: augmented as in the training of the teacher (shifts and noise), with a high learning rate.
    'digits': InversionConfig(
        stages=(Stage(iterations=100, learning_rate=0.4, beta1=0.5, beta2=0.9, augmentation='crop', jitter=1, noise=0.1),),
        weights=Weights(feature=0.3, total_variation=1e-3),
        prior_on='image',
        pixel_scale='network',
    ),
    # CIFAR-10 as in the paper; batches of 256.
    'cifar10_paper': InversionConfig(
        stages=(_cifar_stage(learning_rate=0.05),),
        weights=Weights(feature=10.0, total_variation=2.5e-5, l2=3e-8, competition=10.0),
        l2='batch',
        pixel_scale='network',
    ),
    # The authors' later settings for better-looking CIFAR images.
    'cifar10_better': InversionConfig(
        stages=(_cifar_stage(learning_rate=0.1),),
        weights=Weights(feature=10.0, total_variation=1e-3),
        l2='batch',
        pixel_scale='network',
    ),
    # CIFAR-10, augmented as in the training of the teacher (padded random crops and mirroring, per image), with the Fourier
    # parameterization: few iterations, and images that another network and people recognise.
    'cifar10_crop': InversionConfig(
        stages=(Stage(iterations=300, learning_rate=0.2, beta1=0.5, beta2=0.9, augmentation='crop', jitter=4, flip=True),),
        weights=Weights(feature=0.3, total_variation=2e-3, competition=1.0),
        parameterization='fourier',
        prior_on='image',
        pixel_scale='network',
    ),
    # ImageNet, multi-resolution: 2,000 iterations at 112 px, then 1,000 at 224 px; batches of 84.
    'imagenet_multires': InversionConfig(
        stages=(
            _imagenet_stage(iterations=2000, resolution=112, jitter=15),
            _imagenet_stage(iterations=1000, resolution=224, jitter=30),
        ),
        weights=_IMAGENET_WEIGHTS,
        pixel_scale='network',
    ),
    # ImageNet, one stage of 2,000 iterations at 224 px; batches of 84.
    'imagenet_2k': InversionConfig(
        stages=(_imagenet_stage(iterations=2000, jitter=30),),
        weights=_IMAGENET_WEIGHTS,
        pixel_scale='network',
    ),
    # ImageNet as in the paper: 20,000 iterations; batches of 152 a GPU.
    'imagenet_20k': InversionConfig(
        stages=(Stage(iterations=20000, learning_rate=0.05, schedule='constant', jitter=30, flip=True, clip=False),),
        weights=Weights(feature=0.01, total_variation=1e-4, l2=0.0, competition=0.2),
        pixel_scale='network',
    ),
}


def _fast(preset: str, main: float, **fields: Any) -> InversionConfig:
    """Returns a preset of one stage, with another weight of the class term and other fields of the stage."""
    config = PRESETS[preset]
    (stage,) = config.stages
    weights = dataclasses.replace(config.weights, main=main)
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, **fields),), weights=weights)


# Images to train students on, not to look at: in a quarter of the iterations, and in a hundredth of the paper's.
PRESETS['digits_fast'] = _fast('digits', main=1.0, iterations=25)
PRESETS['cifar10_fast'] = _fast('cifar10_crop', main=0.02, iterations=20, learning_rate=0.3)

# For a vision transformer of the digits: with recorded moments, and without any statistics but the mean and std by which it
# normalises pixels (the weight is from the ablation in docs/networks_without_batchnorm.md).
_DIGITS = PRESETS['digits']
PRESETS['digits_vit'] = dataclasses.replace(_DIGITS, weights=dataclasses.replace(_DIGITS.weights, feature=0.03))
PRESETS['digits_vit_free'] = dataclasses.replace(
    _DIGITS, weights=dataclasses.replace(_DIGITS.weights, feature=0.0, pixel_moments=1.0)
)

# For networks of users, see `preset_for`. They may not have been trained on mirrored images, so images are not mirrored;
# noise and shifts favour shapes that are robust to them.
_own_stage = functools.partial(Stage, beta1=0.5, beta2=0.9, augmentation='crop')
PRESETS['8px'] = InversionConfig(
    stages=(_own_stage(iterations=100, learning_rate=0.4, jitter=1, noise=0.2),),
    weights=Weights(feature=0.5, total_variation=2e-3, competition=1.0),
    prior_on='image',
)
PRESETS['32px'] = InversionConfig(
    stages=(_own_stage(iterations=200, learning_rate=0.8, jitter=3, noise=0.05),),
    weights=Weights(feature=0.3, total_variation=2e-3, competition=1.0),
    parameterization='fourier',
    contrast=1.0,
    prior_on='image',
)
# For pictures in colour, which `32px` saturates in networks of more than a few layers.
PRESETS['32px_color'] = InversionConfig(
    stages=(_own_stage(iterations=200, learning_rate=0.2, jitter=4),),
    weights=Weights(feature=0.1, total_variation=2e-3, competition=1.0),
    parameterization='fourier',
    prior_on='image',
)
PRESETS['128px'] = InversionConfig(
    stages=(
        _own_stage(iterations=300, learning_rate=0.1, resolution=64, jitter=8, warmup=50),
        _own_stage(iterations=200, learning_rate=0.1, jitter=16, warmup=50),
    ),
    weights=Weights(feature=0.1, total_variation=1e-3, competition=1.0),
    parameterization='fourier',
    prior_on='image',
)
# As measured on MobileNetV1 (configs/imagenet_mobilenet_v1.py:spectrum).
PRESETS['224px'] = InversionConfig(
    stages=(
        Stage(iterations=600, learning_rate=0.1, resolution=112, jitter=15, warmup=50, beta1=0.5, beta2=0.9),
        Stage(iterations=200, learning_rate=0.1, jitter=30, warmup=50, beta1=0.5, beta2=0.9),
    ),
    weights=Weights(feature=0.01, first_bn_multiplier=10.0, total_variation=5e-5, l2=5e-6, competition=0.2),
    parameterization='fourier',
)


def preset_for(image_shape: tuple[int, int, int]) -> str:
    """Returns the name of the preset for images of this shape, by the number of pixels of the shorter side, and colours."""
    height, width, channels = image_shape
    at_32 = '32px_color' if channels >= 3 else '32px'
    smallest_sizes = (('224px', 192), ('128px', 80), (at_32, 24), ('8px', 0))
    return next(name for name, smallest in smallest_sizes if min(height, width) >= smallest)
