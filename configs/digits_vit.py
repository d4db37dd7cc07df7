"""A vision transformer without any BatchNorm is inverted, and a student learns from the images; real 8x8 digits.

    python -m dvinv.main --config configs/digits_vit.py --workdir runs/digits_vit

The teacher (four blocks, 202 thousand parameters) is trained on 1,437 scanned digits; the task `teacher` then records the
mean and variance a channel of what its LayerNorms take and its blocks return, over 100 of these images
(`teacher.moments_images`). 1,024 images are synthesized from the network and these numbers alone; a residual network of half
its parameters learns from them. `:free` records nothing: the images are made by the network alone, and by the mean and std
with which it normalises pixels (`synthesis.weights.pixel_moments`, docs/networks_without_batchnorm.md). `:quantize` puts the
teacher into 8, 6 and 4 bits by such images in place of the student.

Every setting was chosen on a validation part of the training split (`--config.data.validation=True`). Expected on 360 real
test images (five seeds): teacher .988, the student .974 +- .005, by `:free` .951 +- .022 (.997 from the real training
images, .789 from noise, .797 by class and total variation alone); the verifier recognises .917 of the synthesized images,
.877 of those of `:free`. In 8 bits the teacher reads what it reads in float (.989, three seeds). 4 minutes a seed on one
core. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'free', 'quantize' or 'smoke'."""
    config = default_config('digits_vit_free' if arg == 'free' else 'digits_vit')
    config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)  # of the training pixels
    augmentation = {'shift': 1, 'noise': 0.1}
    optimizer = {'batch_size': 64, 'weight_decay': 5e-4}
    config.teacher.update(network='small_vit', moments_images=0 if arg == 'free' else 100)
    config.teacher.training.update(
        updates=1500, learning_rate=2e-3, warmup=100, clip_norm=1.0, batch_size=64, weight_decay=5e-2, **augmentation
    )
    config.verifier.training.update(updates=600, learning_rate=2e-3, warmup=60, **optimizer, **augmentation)
    config.synthesis.update(images=1024, batch_size=256)
    config.distillation.update(updates=700, learning_rate=3e-2, warmup=40, cutmix=0.5, **optimizer, **augmentation)
    config.logging.checkpoint_every = 200
    if arg == 'quantize':
        config.tasks = ('teacher', 'synthesis', 'quantization', 'report')
        config.quantization.update(settings=('w8a8', 'w6a6', 'w4a4'), distilled=())
    elif arg == 'smoke':
        shrink(config)
    elif arg not in ('', 'free'):
        raise ValueError(f'This config knows the arguments free, quantize and smoke, not {arg!r}')
    return config
