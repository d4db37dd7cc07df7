"""A vision transformer inverted by recorded moments, real 8x8 digits. CPU is enough.

python -m dvinv.main --config configs/digits_vit.py --workdir runs/digits_vit
"""

import ml_collections

from dvinv.configuration import base_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = base_config('digits')
    config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)  # of the training pixels
    augmentation = {'shift': 1, 'noise': 0.1}
    config.teacher.update(network='small_vit', moments_images=100)
    config.teacher.training.update(
        updates=1500, learning_rate=2e-3, warmup=100, batch_size=64, weight_decay=5e-2, clip_norm=1.0, **augmentation
    )
    config.verifier.training.update(
        updates=600, learning_rate=2e-3, warmup=60, batch_size=64, weight_decay=5e-4, **augmentation
    )
    config.student.network = 'small_resnet'
    config.student.width = 0.5
    config.synthesis.update(images=1024, batch_size=256)
    config.synthesis.weights.feature = 0.03
    config.distillation.update(updates=600, learning_rate=3e-2, warmup=40, batch_size=64, weight_decay=5e-4, **augmentation)
    config.logging.checkpoint_every = 200
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    return config
