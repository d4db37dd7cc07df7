"""A published CIFAR-10 ResNet-20 teaches a ResNet-20 from scratch, without data. For a laptop: CPU is enough.

    python -m dvinv.main --config configs/cifar10_resnet20.py --workdir runs/cifar10_resnet20 \\
      --config.teacher.weights=resnet20.th --config.verifier.weights=resnet32.th

The weights are those of https://github.com/akamaster/pytorch_resnet_cifar10 (folder pretrained_models; `.th` needs torch,
`.npz` and `.safetensors` do not). Scores on CIFAR-10's test images (see docs/real_data.md; or
`--config.data.name=npz --config.data.path=TEST.npz` with arrays of your own).

10 batches of 256 images, 20 iterations each (the preset `cifar10_fast`), and 1,200 updates of 16. The class term is nearly
off, because a student learns little about real pictures from images that exaggerate their class. Student and teacher being
one architecture, the student is given hints beside the teacher's answers (`distillation.hint`): they are most of what it
learns in so few updates (`clip_norm` keeps it finite on images that are unlike real ones).
Without, as in the paper: `--config.distillation.hint=0 --config.distillation.learning_rate=0.005`. What each of these
choices is worth is in docs/experiments.md.

`:pictures` makes one batch of 256 images to look at, in 5 minutes on 2 cores; `:paper` makes it as the paper does, with
2,000 iterations. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'pictures', 'paper' or 'smoke'."""
    config = default_config({'pictures': 'cifar10_crop', 'paper': 'cifar10_paper'}.get(arg, 'cifar10_fast'))
    sgd = {'optimizer': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    config.data.name = 'cifar10'
    config.teacher.update(network='resnet20', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.verifier.network = 'resnet32'
    for group in (config.teacher.training, config.verifier.training):  # where no weights are given: 200 epochs
        group.update(updates=78_000, warmup=1000, **sgd)
    config.student.network = 'resnet20'
    config.logging.update(every=100, checkpoint_every=500)
    if arg in ('pictures', 'paper'):
        config.update(tasks=('teacher', 'synthesis', 'report'))
        config.synthesis.images = 256
        config.distillation.controls = ()
        return config
    config.synthesis.update(images=10 * 256, batches_per_round=1)
    config.distillation.update(updates=1200, updates_per_round=100, batch_size=16, warmup=40, controls=(), **sgd)
    config.distillation.update(learning_rate=0.01, hint=300.0, clip_norm=30.0)
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the arguments pictures, paper and smoke, not {arg!r}')
    return config
