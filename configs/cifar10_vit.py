"""A small vision transformer of CIFAR-10 is inverted by recorded moments; a ResNet-20 learns from the images.

    python -m dvinv.main --config configs/cifar10_vit.py --workdir runs/cifar10_vit

Data, verifier and arguments are those of `cifar10_resnet20_gn.py`. The teacher has patches of 4x4 pixels, six blocks and 192
channels, and is trained for 60 epochs. It has no stages that a residual network could be compared with, so the
student learns from its answers alone. With `:free` the images come from the class, the mean and std of pixels and the
entropy of the similarities between patches. For a GPU: the teacher reads .815 of 10,000 JPEG test images (seed 0); its
images are not measured yet. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import shrink
from dvinv.configs import cifar10_resnet20_gn


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'free' or 'smoke'."""
    config = cifar10_resnet20_gn.get_config('' if arg == 'smoke' else arg)
    config.teacher.network = 'cifar_vit'
    config.teacher.training.update(
        updates=11_700, batch_size=256, optimizer='adam', learning_rate=1e-3, weight_decay=5e-2, warmup=500, clip_norm=1.0
    )
    config.teacher.training.update(color_jitter=0.2, label_smoothing=0.1)
    config.synthesis.images = 20 * 256
    config.synthesis.stages[0].iterations = 300
    if arg == 'free':
        config.synthesis.weights.patch_similarity = 0.1
    config.distillation.update(updates=12_000, batch_size=128, hint=0.0)
    if arg == 'smoke':
        shrink(config)
    return config
