"""The paper's main pair on CIFAR-10: ResNet-34 teaches ResNet-18 by Adaptive DeepInversion. For a GPU.

    python -m dvinv.main --config configs/cifar10_resnet34.py --workdir runs/cifar10_resnet34

Trains the teacher for 30 epochs on CIFAR-10 (see docs/real_data.md; or `--config.teacher.weights=FILE` with weights
of your own, and `--config.data.name=npz --config.data.path=TEST.npz --config.data.train_path=TRAIN.npz` with arrays of your
own). Then 20 rounds: five batches of 256 images, 40 iterations each, against the student of the moment, and 400 updates of
the student; 7,625 more updates on all 25,600 images. The student is shown 4 million images in all. Everything is in
bfloat16. What each part costs, by `--plan`:

| | teacher | synthesis | student | all |
|---|---|---|---|---|
| PFLOP | 10.4 | 7.0 | 22.6 | 40.0 |
| PFLOP of `:paper` | 69 | 1,756 | 70.5 | 1,896 |

`:paper` has the budget of the paper: a teacher of 200 epochs, 500 batches of 256 images in 250 rounds, 2,000 iterations each
with the published settings, 48,750 updates. The paper: teacher 95.42, student 93.26 (91.43 without the competition of the
student). Measured on an H200, on CIFAR-10 as JPEG: the teacher 90.39 in a minute; the students are not measured yet.
`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training pixels


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'paper' or 'smoke'."""
    config = default_config('cifar10_paper' if arg == 'paper' else 'cifar10_fast')
    sgd = {'optimizer': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    config.data.name = 'cifar10'
    config.teacher.update(network='cifar_resnet34', mean=MEAN, std=STD)
    config.verifier.network = ''
    config.student.network = 'cifar_resnet18'
    config.synthesis.update(method='adaptive', precision='bfloat16')
    for group in (config.teacher.training, config.distillation):
        group.update(batch_size=256, warmup=500, precision='bfloat16', **sgd)
    config.distillation.controls = ()
    if arg == 'paper':
        config.teacher.training.updates = 39_000  # 200 epochs
        config.synthesis.update(images=500 * 256, batches_per_round=2)
        config.distillation.update(updates=48_750, updates_per_round=195, schedule='step')
    else:
        config.teacher.training.updates = 5_850  # 30 epochs
        config.synthesis.update(images=100 * 256, batches_per_round=5)
        config.synthesis.stages[0].iterations = 40
        config.distillation.update(updates=15_625, updates_per_round=400)
    config.logging.update(every=100, checkpoint_every=2000, iterations=20)
    if arg == 'smoke':
        shrink(config, width=1 / 16)
    elif arg not in ('', 'paper'):
        raise ValueError(f'This config knows the arguments paper and smoke, not {arg!r}')
    return config
