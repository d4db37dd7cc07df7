"""Settings of an inversion: its stages, its weights, and what is checked about them before the first step."""

import dataclasses
from typing import Any

import optax

from dvinv.errors import DvinvError
from dvinv.inversion.augmentation import Augmentation
from dvinv.inversion.canvas import KINDS as CANVASES
from dvinv.inversion.canvas import SCALES
from dvinv.inversion.losses import L2, TOTAL_VARIATION

PRECISIONS = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of iterations at one resolution; Adam starts anew with each."""

    iterations: int  # each changes all images of a batch
    learning_rate: float  # the highest, after the warm-up
    resolution: int = 0  # height in pixels of what the teacher sees, at most the image's; 0: the image's own
    schedule: str = 'cosine'  # 'cosine' (to 0) or 'constant'
    warmup: int = 0  # iterations of linear warm-up from 0
    beta1: float = 0.9
    beta2: float = 0.999
    augmentation: str = 'roll'  # 'roll' (paper) or 'crop': see augmentation.py
    jitter: int = 0  # pixels, at this stage's resolution
    flip: bool = False
    noise: float = 0.0  # deviation, up to, of Gaussian noise an image, for pixels in [0, 1]
    color_shift: float = 0.0  # strength of random scales and shifts of the channels of each image that is shown
    centre: float = 1.0  # share of height and width, in the middle, that is shown, scaled up; 1: the whole picture
    clip: bool = True  # keep pixels in the valid range [0, 1] (before normalisation); a spectrum keeps them there anyway

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of what the teacher sees of images of this size; their shape, the width rounded."""
        if not self.resolution:
            return height, width
        return self.resolution, max(1, (2 * width * self.resolution + height) // (2 * height))

    @property
    def look(self) -> Augmentation:
        """How the teacher is shown the images."""
        return Augmentation(self.augmentation, self.jitter, self.flip, self.noise, color_shift=self.color_shift)

    def optimiser(self) -> optax.GradientTransformation:
        """Adam on the pixels, with this stage's schedule."""
        start = 0.0 if self.warmup else self.learning_rate  # Optax stays at the start where the warm-up has no steps
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
    first_bn_multiplier: float = 1.0  # of the first BatchNorm layer within the feature term
    total_variation: float = 1e-4
    l2: float = 0.0
    competition: float = 0.0  # Adaptive DeepInversion; needs a student
    patch_similarity: float = 0.0  # entropy of the similarities between patches, of networks with attention: see priors.py


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """Everything that `invert` needs to know beside the teacher, the labels and the key. Hashable, static."""

    stages: tuple[Stage, ...]
    weights: Weights = Weights()
    total_variation: str = 'l2'  # the form: 'l2' (paper) or 'l1'
    canvas: str = 'pixels'  # what Adam moves: 'pixels' (paper) or their 'spectrum', see canvas.py
    contrast: float = 0.6  # of the first images, for 'spectrum': the deviation of what the sigmoid takes
    l2: str = 'image'  # the norm of each image ('image': ImageNet) or of the whole batch ('batch': CIFAR)
    prior_on: str = 'view'  # total variation and L2 of what the teacher sees ('view': paper) or of the 'image' itself
    bn_stats: str = 'device'  # each device inverts batches of its own ('device') or a share of one ('global')
    precision: str = 'float32'  # of the networks' forward and backward pass; 'bfloat16' for GPU and TPU. Losses: float32
    recompute: int = 0  # to save memory, the stretches of a network of which only the ends are kept; 0: keep everything
    iterations_per_dispatch: int = 0  # 0: 1 on CPU, where XLA runs convolutions in a loop body 10 times slower; else 100
    # What steps and first noise of 'pixels', and priors, are measured in: pixels of mean .5 and std .25 for any network
    # ('common'), or, where that network takes normalised pixels, in its own mean and std ('network': paper).
    pixel_scale: str = 'common'

    attention: tuple[str, ...] = ('*Attention*:output',)  # patterns of the layers of `weights.patch_similarity`

    @property
    def iterations(self) -> int:
        """Iterations of one batch over all stages."""
        return sum(stage.iterations for stage in self.stages)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Refuse settings that cannot be run on images of `image_shape` [H, W, C].

        Raises:
          DvinvError: a sentence that names the field, its value and the choices.
        """
        _one_of('total_variation', self.total_variation, TOTAL_VARIATION)
        _one_of('canvas', self.canvas, CANVASES)
        if self.contrast <= 0:
            raise DvinvError(f'contrast is {self.contrast}; it must be above 0, or no step would change a picture.')
        _one_of('l2', self.l2, L2)
        _one_of('prior_on', self.prior_on, ('view', 'image'))
        _one_of('pixel_scale', self.pixel_scale, SCALES)
        _one_of('bn_stats', self.bn_stats, ('device', 'global'))
        _one_of('precision', self.precision, PRECISIONS)
        _at_least('recompute', self.recompute, 0)
        _at_least('iterations_per_dispatch', self.iterations_per_dispatch, 0)
        if not (isinstance(self.stages, tuple | list) and all(isinstance(stage, Stage) for stage in self.stages)):
            raise DvinvError(f'stages is {self.stages!r}; it must be a tuple of stages, (Stage(2000, 0.1),) for instance.')
        if not self.stages:
            raise DvinvError('An inversion needs at least one stage; stages is empty.')
        height, _, _ = image_shape
        for i, stage in enumerate(self.stages):
            _one_of(f'stages[{i}].augmentation', stage.augmentation, ('roll', 'crop'))
            _one_of(f'stages[{i}].schedule', stage.schedule, ('cosine', 'constant'))
            _at_least(f'stages[{i}].iterations', stage.iterations, 1)
            for field in ('resolution', 'warmup', 'jitter', 'noise', 'learning_rate', 'color_shift'):
                _at_least(f'stages[{i}].{field}', getattr(stage, field), 0)
            if not 0 < stage.centre <= 1:
                raise DvinvError(
                    f'stages[{i}].centre is {stage.centre}; it is a share of the picture, above 0 and at most 1.'
                )
            if stage.resolution > height:
                raise DvinvError(
                    f'stages[{i}].resolution is {stage.resolution}, but the images have a height of {height} pixels; choose '
                    f'at most {height}, or 0 for the full image.'
                )
            if stage.warmup >= stage.iterations and stage.schedule == 'cosine':
                raise DvinvError(
                    f'stages[{i}].warmup is {stage.warmup}, but the stage has only {stage.iterations} '
                    'iterations; the cosine needs some after the warm-up.'
                )


def _one_of(name: str, value: Any, choices) -> None:
    if value not in choices:
        raise DvinvError(f'{name} is {value!r}; choose one of {", ".join(map(repr, choices))}.')


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise DvinvError(f'{name} is {value}; it must be at least {least}.')
