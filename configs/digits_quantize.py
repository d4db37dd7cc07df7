"""The digits' teacher in 8, 4 and 2 bits, without data.

    python -m dvinv.main --config configs/digits_quantize.py --workdir runs/digits_quantize

Teacher and images as in `digits.py:fast`, then the ablation of quantization: ranges by BatchNorm's statistics, from the
synthesized images, and for 2 bits distillation from the float network on these. Controls are ranges from noise and from
real images.

Expected of 360 real test images (three seeds): .997 in float, 8 and 4 bits, however the ranges are found. With weights and
activations of 2 bits, but 8 in the first and the last layer, calibration alone is not enough: .62 +- .18 by noise, .68 +-
.13 by BatchNorm's statistics, .74 +- .09 by the synthesized images and .74 +- .12 by real ones; having learned on the
synthesized images the network reads .992 +- .003, in .08 of the bytes. 45 seconds on one core, the teacher included.
`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import digits


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    if arg not in ('', 'smoke'):
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    config = digits.get_config(arg or 'fast')
    config.tasks = ('teacher', 'synthesis', 'quantization', 'report')
    if arg != 'smoke':
        config.quantization.update(settings=('w8a8', 'w4a4', 'w2a4', 'w2a2'), distilled=('w2a4', 'w2a2'))
        config.quantization.training.update(updates=400, warmup=40, learning_rate=1e-3, shift=1, noise=0.1)
    return config
