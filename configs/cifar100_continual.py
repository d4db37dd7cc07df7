"""CIFAR-100 in 5, 10 or 20 tasks of equally many classes, without a picture of the old ones: Always Be Dreaming's protocol.

    python -m dvinv.main --config configs/cifar100_continual.py --workdir runs/cifar100_continual

trains a ResNet-32 on the first 20 classes of CIFAR-100 (see docs/real_data.md), then teaches it 20 more, four times;
`:10` and `:20` are for as many tasks. The loss is that of Always Be Dreaming (arXiv 2106.09701), whose authors report 43.9,
33.7 and 20.0% in the end for 5, 10 and 20 tasks, and 18.8, 10.9 and 5.7% for DeepInversion's. For a GPU, on which it has not
been measured yet. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import cifar10_continual


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', '10', '20' or 'smoke'."""
    if arg not in ('', '10', '20', 'smoke'):
        raise ValueError(f'This config knows the arguments 10, 20 and smoke, not {arg!r}')
    config = cifar10_continual.get_config('smoke' if arg == 'smoke' else '')
    config.continual.update(loss='always_be_dreaming', controls=('finetune', 'lwf_mc', 'deepinversion', 'replay', 'joint'))
    if arg == 'smoke':
        return config
    config.data.name = 'cifar100'
    config.teacher.update(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    size = 100 // int(arg or 5)
    tasks = [tuple(range(first, first + size)) for first in range(0, 100, size)]
    config.data.classes, config.continual.steps = tasks[0], tuple({'classes': classes} for classes in tasks[1:])
    return config
