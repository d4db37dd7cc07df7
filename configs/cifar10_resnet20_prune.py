"""A published CIFAR-10 ResNet-20 loses 37% of its operations (the paper's first point), without data. For a laptop.

    python -m dvinv.main --config configs/cifar10_resnet20_prune.py --workdir runs/cifar10_resnet20_prune \\
      --config.teacher.weights=resnet20.th --config.verifier.weights=resnet32.th

Weights, test images and the pool are those of configs/cifar10_resnet20.py (`--config.pool=DIR` takes one that is there).
`:71` takes 71%, the paper's second point, with a larger `eta`: else layers inside the residual branches are left with three
to five channels, because they are in fewer sums than those of the stream. The network is drawn to the whole one's answers
and, by hints, to the BatchNorm inputs of the channels that are left. `--config.pruning.adaptive_batches=1` adds a batch a
step that is made in competition with the network just pruned, Adaptive DeepInversion; it has not been measured here.

`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import shrink
from dvinv.configs import cifar10_resnet20


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', '71' or 'smoke'."""
    config = cifar10_resnet20.get_config()
    config.tasks = ('teacher', 'synthesis', 'pruning', 'report')
    taught = {
        field: config.distillation[field] for field in ('optimizer', 'weight_decay', 'shift', 'flip', 'clip_norm', 'hint')
    }
    config.pruning.update(
        target_ratio=0.63, steps=4, eta=0.05, cost='flops', importance_batches=40, controls=('untuned',), **taught
    )
    config.pruning.update(updates=2500, updates_per_step=150, batch_size=16, learning_rate=0.02, warmup=20)
    if arg == '71':
        config.pruning.update(target_ratio=0.29, steps=8, eta=0.3)
    elif arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the arguments 71 and smoke, not {arg!r}')
    return config
