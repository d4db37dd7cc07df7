"""The digits' teacher loses half of its operations, without data: channels go by their importance on synthesized images.

    python -m dvinv.main --config configs/digits_prune.py --workdir runs/digits_prune

The teacher and its pool are those of configs/digits.py; no download, CPU is enough.

`:smoke` shrinks the run to seconds.
"""

import runpy
from pathlib import Path

import ml_collections

from dvinv.configuration import shrink

digits = runpy.run_path(str(Path(__file__).with_name('digits.py')))['get_config']


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = digits()
    config.tasks = ('teacher', 'synthesis', 'pruning', 'report')
    config.distillation.controls = ()
    config.pruning.update(updates=400, updates_per_step=60, batch_size=64, learning_rate=0.003, warmup=20)
    config.pruning.update(**{field: config.distillation[field] for field in ('shift', 'noise', 'temperature')})
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    return config
