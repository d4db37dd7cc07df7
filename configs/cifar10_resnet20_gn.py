"""A ResNet-20 with GroupNorm, without statistics, is inverted by recorded moments; a ResNet-20 learns from the images.

    python -m dvinv.main --config configs/cifar10_resnet20_gn.py --workdir runs/cifar10_resnet20_gn

Trains the teacher on CIFAR-10 for 9 epochs (see docs/real_data.md; or `--config.data.name=npz --config.data.path=TEST.npz
--config.data.train_path=TRAIN.npz` with arrays of your own), and records the mean and variance per channel of the inputs of
its normalisations and of the outputs of its blocks, over 100 training images (`teacher.moments_images`). 1,024 images are
synthesized from the network and these numbers. A ResNet-20 with BatchNorm learns from them, compared with the teacher at the
end of each stage. The verifier is a published ResNet-20, `--config.verifier.weights=resnet20.th` (without weights it is
trained too). `:free` records nothing: the images come from the class and from the mean and std of pixels, here ImageNet's,
which are near enough to CIFAR-10's.

Measured on JPEG images of quality 75 (10,000 test images): teacher .756, the published ResNet-20 .810; of the images the
verifier recognises .782, of those of `:free` .266; the student reads .719. On one CPU core beside other jobs 65 minutes
for the teacher, 17 for the images and 18 for the student. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'free' or 'smoke'."""
    if arg not in ('', 'free', 'smoke'):
        raise ValueError(f'This config knows the arguments free and smoke, not {arg!r}')
    config = default_config('cifar10_crop')
    sgd = {'optimizer': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    config.data.name = 'cifar10'
    config.teacher.update(network='resnet20_gn', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.teacher.moments_images = 0 if arg == 'free' else 100
    for group in (config.teacher.training, config.verifier.training):
        group.update(updates=3_500, batch_size=128, warmup=300, **sgd)
    config.verifier.network = 'resnet20'
    config.student.network = 'resnet20'
    config.synthesis.update(images=4 * 256, contrast=0.5)
    config.synthesis.stages[0].iterations = 150
    # A tenth of the feature weight for BatchNorm: more recognisable images. GroupNorm does not see brightness and contrast,
    # so that without `pixel_moments` backgrounds become black or white.
    config.synthesis.weights.update(feature=0.0 if arg == 'free' else 0.03, pixel_moments=3.0)
    config.distillation.update(updates=8_000, batch_size=16, warmup=100, clip_norm=30.0, hint=100.0, **sgd)
    config.distillation.update(color_jitter=0.2, cutmix=0.5, controls=())
    config.logging.update(every=100, checkpoint_every=500)
    if arg == 'smoke':
        shrink(config)
    return config
