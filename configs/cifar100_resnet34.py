"""ResNet-34 teaches ResNet-18 on CIFAR-100 by Adaptive DeepInversion. For a GPU.

    python -m dvinv.main --config configs/cifar100_resnet34.py --workdir runs/cifar100_resnet34

All but the data is as in `cifar10_resnet34.py`: networks, budget (`:paper` too), flags for weights and arrays of your own.
Others report 78.05 for the teacher and 61.32 for a student by DeepInversion without competition. Not measured on a GPU yet.
`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import cifar10_resnet34


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'paper' or 'smoke'."""
    config = cifar10_resnet34.get_config(arg)
    if config.data.name == 'cifar10':
        config.data.name = 'cifar100'
        config.teacher.mean, config.teacher.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return config
