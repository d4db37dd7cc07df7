"""New classes for a CIFAR-10 network that never sees a picture of the old ones again: 5 and 5, or digits beside CIFAR-10.

    python -m dvinv.main --config configs/cifar10_continual.py --workdir runs/cifar10_continual

trains a ResNet-32 on the first five classes of CIFAR-10 (see docs/real_data.md) and teaches it the other five. For a
GPU, on which it has not been measured yet.

`:digits` is for a laptop: to a published ResNet-20 that knows the ten classes of CIFAR-10 the ten digits of scikit-learn are
added as classes 10 to 19, grey pictures enlarged to 32 px (the paper's ImageNet + CUB in small):

    python -m dvinv.main --config configs/cifar10_continual.py:digits --workdir runs/cifar10_digits \\
      --config.teacher.weights=resnet20.npz --config.data.name=npz --config.data.path=TEST.npz

which scores on arrays of your own; `--config.data.train_path=TRAIN.npz --config.continual.controls="('finetune','replay')"`
are for the control that replays real images. Figures are in docs/results.md: 86.0% of all
20 classes, 84.4% with real images of the old ones, about ten minutes on two busy CPU cores. `:smoke` shrinks the run to
seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'digits' or 'smoke'."""
    config = default_config('cifar10_fast')
    config.tasks = ('teacher', 'continual', 'report')
    config.data.name = 'cifar10'
    config.teacher.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.verifier.network = ''
    config.distillation.controls = ()
    sgd = {'optimizer': 'sgd', 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    if arg == 'digits':
        config.teacher.network = 'resnet20'
        config.continual.steps = ({'name': 'digits', 'image_size': 32},)
        config.synthesis.update(images=1024, batch_size=256)
        config.continual.update(updates=300, batch_size=32, learning_rate=0.01, warmup=30, clip_norm=10.0, **sgd)
        config.continual.update(old_images=2.0, flip=False, shift=2, controls=('finetune', 'lwf_mc'))
        config.logging.update(every=20, checkpoint_every=100)
        return config
    config.teacher.network = 'resnet32'
    config.teacher.training.update(updates=40_000, learning_rate=0.1, warmup=1000, **sgd)
    config.data.classes = (0, 1, 2, 3, 4)
    config.continual.steps = ({'classes': (5, 6, 7, 8, 9)},)
    config.synthesis.update(images=100 * 256, batch_size=256)
    config.continual.update(updates=20_000, batch_size=256, learning_rate=0.02, warmup=500, clip_norm=10.0, **sgd)
    config.continual.controls = ('finetune', 'lwf_mc', 'always_be_dreaming', 'replay', 'joint')
    config.logging.update(every=100, checkpoint_every=1000)
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the arguments digits and smoke, not {arg!r}')
    return config
