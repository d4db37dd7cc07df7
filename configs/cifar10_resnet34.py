"""The paper's main pair on CIFAR-10: ResNet-34 teaches ResNet-18 by Adaptive DeepInversion. For a GPU.

    python -m dvinv.main --config configs/cifar10_resnet34.py --workdir runs/cifar10_resnet34

Trains the teacher from CIFAR-10 (prepared once, see the README; or `--config.teacher.weights=FILE` with weights of your
own, and `--config.data.name=npz --config.data.path=TEST.npz --config.data.train_path=TRAIN.npz` with arrays of your own).
Then 100 rounds: a batch of 256 images against the student of the moment, 150 updates of the student; 5,000 more updates on
all 25,600 images. The paper: teacher 95.42, student 93.26 (256,000 images; 91.43 without the student's competition).
Not measured on a GPU yet. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configuration import base_config, shrink

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = base_config('cifar10_crop')
    sgd = {'optimiser': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    config.data.name = 'cifar10'
    config.teacher.update(network='cifar_resnet34', mean=MEAN, std=STD)
    config.verifier.network = 'vgg16_bn'
    for group in (config.teacher.training, config.verifier.training):
        group.update(updates=78_000, warmup=1000, **sgd)  # 200 epochs
    config.student.network = 'cifar_resnet18'
    config.synthesis.update(method='adaptive', images=100 * 256, batches_per_round=1)
    config.synthesis.stages[0].iterations = 200
    config.distillation.update(updates=20_000, updates_per_round=150, batch_size=256, warmup=500, controls=(), **sgd)
    config.logging.update(every=100, checkpoint_every=1000, iterations=20)
    if arg == 'smoke':
        shrink(config, width=1 / 16)
    elif arg:
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    return config
