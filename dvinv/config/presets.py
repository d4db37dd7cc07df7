"""Settings of an inversion by name: published ones (arXiv 1912.08795, section 4 and the authors' notes), and our own."""

import dataclasses
import functools
from typing import Any

from dvinv.config.inversion import InversionConfig, Stage, Weights

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
