"""A published DeiT-Ti, a vision transformer of ImageNet, is inverted by recorded moments. For a GPU.

    python -m dvinv.main --config configs/imagenet_deit_tiny.py --config.teacher.weights=deit_tiny.safetensors \\
      --config.data.name=folders --config.data.path=VAL --config.data.train_path=TRAIN --config.data.image_size=224 \\
      --record_moments moments.safetensors
    python -m dvinv.main --config configs/imagenet_deit_tiny.py --workdir runs/imagenet_deit_tiny \\
      --config.teacher.weights=deit_tiny.safetensors --config.teacher.moments=moments.safetensors \\
      --config.verifier.weights=squeezenet1_1.npz

Weights: timm's `deit_tiny_patch16_224`, and as a verifier a SqueezeNet 1.1 of Gluon's or torchvision's. The first command
takes 100 training images (a folder a class, in the order of ImageNet's), the second none. One batch of 64 classes, as in
`imagenet_mobilenet_v1.py`, 2,000 iterations at 224 px, because the positions are those of 224 px. `:free` needs no moments:
the pictures come from the class, the entropy of the similarities between patches, total variation and the pixels' mean and
std. Neither has been measured. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink
from dvinv.configs import imagenet_mobilenet_v1


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'free' or 'smoke'."""
    if arg not in ('', 'free', 'smoke'):
        raise ValueError(f'This config knows the arguments free and smoke, not {arg!r}')
    config = default_config('imagenet_2k')
    config.tasks = ('teacher', 'synthesis', 'report')
    config.bn_stats = 'global'
    config.data.name = ''
    config.teacher.update(network='deit_tiny', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.verifier.update(network='squeezenet1_1', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.synthesis.update(
        images=64, batch_size=64, classes=imagenet_mobilenet_v1.CLASSES, parameterization='fourier', precision='bfloat16'
    )
    config.synthesis.stages[0].learning_rate = 0.1
    config.synthesis.controls = ('noise',)
    config.distillation.controls = ()
    if arg == 'free':
        config.synthesis.weights.update(feature=0.0, patch_similarity=0.1, pixel_moments=1.0)
    elif arg == 'smoke':
        config.teacher.moments_images = 100
        shrink(config)
    return config
