"""The paper's VGG-11 on CIFAR-10: taught to a VGG-11 from scratch by Adaptive DeepInversion. For a GPU.

    python -m dvinv.main --config configs/cifar10_vgg11.py --workdir runs/cifar10_vgg11

All but the networks is as in `cifar10_resnet34.py`: data, budget, flags for weights and arrays of your own. For the other
student of the paper: `--config.student.network=cifar_resnet18`. What each part costs, by `--plan`:

| | teacher | synthesis | student | all | all with a ResNet-18 |
|---|---|---|---|---|---|
| PFLOP | 1.4 | 1.3 | 4.9 | 7.5 | 18.8 |
| PFLOP of `:paper` | 9.2 | 626 | 15.3 | 650 | 1,505 |

`:paper` has the budget of the paper: as there, with 1,000 batches, four a round. The paper: teacher 92.34, student 90.78
(84.16 without the competition of the student), ResNet-18 90.36 (83.82). Measured on an H200, trained and scored on CIFAR-10
as JPEG, one seed: teacher 88.02 in half a minute, student 86.48 (83.84 without the competition) in two minutes. `:smoke`
shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import cifar10_resnet34


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'paper' or 'smoke'."""
    config = cifar10_resnet34.get_config(arg)
    config.teacher.network = config.student.network = 'vgg11_bn'
    if arg == 'paper':
        config.synthesis.update(images=1000 * 256, batches_per_round=4)
    return config
