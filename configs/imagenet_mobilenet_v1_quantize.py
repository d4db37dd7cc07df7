"""A published ImageNet MobileNetV1 in 8 and 6 bits, without data.

    python -m dvinv.main --config configs/imagenet_mobilenet_v1_quantize.py --workdir runs/imagenet_mobilenet_v1_quantize \\
      --config.teacher.weights=mobilenet_v1.npz --config.verifier.weights=squeezenet1_1.npz

Weights and data as in `imagenet_mobilenet_v1.py`, whose 64 images in their `:short` form (20 minutes on 2 CPU cores; or
`--config.pool=POOL`) give the ranges. In 8 bits 82.0% of 1,000 photos, 81.5% before, by images of fewer iterations. With
`--config.quantization.images=0 --config.quantization.controls="()" --config.tasks="('teacher','quantization')"` no image
is needed: ranges follow from BatchNorm's statistics (figures in docs/results.md). `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import imagenet_mobilenet_v1


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    if arg not in ('', 'smoke'):
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    config = imagenet_mobilenet_v1.get_config(arg or 'short')
    config.tasks = ('teacher', 'synthesis', 'quantization', 'report')
    config.quantization.update(settings=('w8a8', 'w6a6'), distilled=(), controls=('noise',))
    return config
