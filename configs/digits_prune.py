"""The digits' teacher loses half of its operations, without data: channels go by their importance on synthesized images.

    python -m dvinv.main --config configs/digits_prune.py --workdir runs/digits_prune

The teacher and its pool are those of configs/digits.py; no download, a few minutes on a CPU. In three steps half of the
operations go; what is left is drawn to the teacher's answers and, by hints, to the BatchNorm inputs of its channels.

`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import shrink
from dvinv.configs import digits


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = digits.get_config()
    config.tasks = ('teacher', 'synthesis', 'pruning', 'report')
    config.pruning.update({field: config.distillation[field] for field in ('batch_size', 'shift', 'noise')})
    config.pruning.update(steps=3, updates_per_step=60, updates=800, learning_rate=0.01, warmup=20, hint=3.0)
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    return config
