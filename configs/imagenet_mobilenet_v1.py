"""A published ImageNet MobileNetV1 dreams 64 pictures at 224 px, in two resolutions. About an hour on 2 CPU cores.

    python -m dvinv.main --config configs/imagenet_mobilenet_v1.py --workdir runs/imagenet_mobilenet_v1 \\
      --config.teacher.weights=mobilenet_v1.npz --config.verifier.weights=squeezenet1_1.npz

Weights: Keras's MobileNet (`--config.teacher.width=0.75` for alpha 0.75; pixels are scaled to [-1, 1]), and as a verifier,
which never saw the teacher, a SqueezeNet 1.1 of Gluon's or torchvision's. No data is needed; to score both networks on real
pictures, add `--config.data.name=folders --config.data.path=VAL --config.data.image_size=224` (a folder a class, in the
order of ImageNet's). A second opinion, of torchvision's or timm's Inception-v3, whose pixels are scaled as the teacher's:
`--config.verifiers="({'network': 'inception_v3', 'weights': 'inception_v3.pth'},)"`.

The report has noise beside the pictures; `--config.synthesis.controls="('noise', 'prior_only')"` makes as many without the
feature term too (DeepDream), which takes as long again.

One batch of 64 classes drawn once (`synthesis.classes`), split over all devices; 2,000 iterations at 112 px, then 1,000 at
224. On a CPU 4 images a device are quickest: `--config.devices=16`. On one H200, with `synthesis.precision=bfloat16` and
batches of 84, an image takes a tenth of a second. `:short` is the same with 600 and 200 iterations, 20 minutes; `:spectrum`
is `:short` with Adam moving the pictures' spectrum, by half the steps: statistics three times as near, clear outlines, harsh
colours. `:smoke` shrinks the run to seconds.
"""

import ml_collections
import numpy as np

from dvinv.config import default_config, shrink

CLASSES = tuple(sorted(np.random.default_rng(0).permutation(1000)[:64].tolist()))


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'short', 'spectrum' or 'smoke'."""
    config = default_config('imagenet_multires')
    config.tasks = ('teacher', 'synthesis', 'report')
    config.bn_stats = 'global'
    config.data.name = ''
    config.teacher.update(network='mobilenet_v1', mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.verifier.update(network='squeezenet1_1', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.synthesis.update(images=64, batch_size=64, classes=CLASSES)
    config.synthesis.controls = ('noise',)
    config.distillation.controls = ()
    if arg in ('short', 'spectrum'):
        for stage, iterations in zip(config.synthesis.stages, (600, 200), strict=True):
            stage.update(iterations=iterations, warmup=50)
        if arg == 'spectrum':
            config.synthesis.parameterization = 'fourier'
            for stage in config.synthesis.stages:
                stage.learning_rate = 0.1
    elif arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the arguments short, spectrum and smoke, not {arg!r}')
    return config
