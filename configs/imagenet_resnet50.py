"""A published ImageNet ResNet-50 teaches a ResNet-50 from scratch, without data: 215,040 pictures at 224 px. For a pod.

    python -m dvinv.main --config configs/imagenet_resnet50.py --workdir runs/imagenet_resnet50 \\
      --config.teacher.weights=model.safetensors

The weights are torchvision's or timm's (docs/published_networks.md says how to get them). No data is needed; to score on
real pictures, add `--config.data.name=folders --config.data.path=VAL --config.data.image_size=224`.

2,560 batches of 84 images, 2,000 iterations at 112 px and 1,000 at 224 each, in bfloat16; `--plan` tells what that costs on
the devices at hand. Distillation as published: 90 epochs of batches of 1,024, SGD 1.024, KL at T = 3 alone, on random
resized crops that teacher and student see alike (weight decay and warm-up are ours). The published figure is 68.0%
(140,000 images, 90 epochs).
Larger images: `--config.teacher.image_shape="(288, 288, 3)"`, and stages of any resolution up to that, for instance
`--config.synthesis.stages[0].resolution=160 --config.synthesis.stages[1].resolution=288`.
`:mixup` is the long recipe, 250 epochs with mixup (73.8%). `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink

EPOCHS = {'': 90, 'mixup': 250}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'mixup' or 'smoke'."""
    config = default_config('imagenet_multires')
    config.data.name = ''
    config.teacher.update(network='resnet50', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.verifier.network = ''
    config.student.network = 'resnet50'
    config.synthesis.update(images=2560 * 84, batch_size=84, precision='bfloat16')
    epoch = config.synthesis.images // 1024
    config.distillation.update(
        updates=EPOCHS.get(arg, 90) * epoch,
        batch_size=1024,
        optimizer='sgd',
        learning_rate=1.024,
        warmup=5 * epoch,
        weight_decay=5e-5,
        resized_crop=0.08,
        flip=True,
        mixup=0.2 if arg == 'mixup' else 0.0,
        controls=(),
    )
    config.logging.update(every=100, checkpoint_every=1000, iterations=100)
    if arg == 'smoke':
        shrink(config)
    elif arg not in EPOCHS:
        raise ValueError(f'This config knows the arguments mixup and smoke, not {arg!r}')
    return config
