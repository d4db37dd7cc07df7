"""A published MobileNetV1 loses a fifth of its filters, without data; depthwise convolutions go with what they are fed by.

    python -m dvinv.main --config configs/imagenet_mobilenet_v1_prune.py --workdir runs/imagenet_mobilenet_v1_prune \\
      --config.teacher.weights=mobilenet.npz --config.teacher.width=0.75 --config.verifier.weights=squeezenet.npz

Weights and pictures are those of configs/imagenet_mobilenet_v1.py (`--config.pool=DIR` takes a pool that is there); its one
batch of 64 shows the way: a thousand classes want as many images as docs/scaling.md tells.

`:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import shrink
from dvinv.configs import imagenet_mobilenet_v1


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = imagenet_mobilenet_v1.get_config('short')
    config.tasks = ('teacher', 'synthesis', 'pruning', 'report')
    config.pruning.update(measure='filters', target_ratio=0.8, steps=2, latency_batch=1, controls=('untuned',))
    config.pruning.update(optimizer='sgd', learning_rate=1e-3, batch_size=16, updates=100, updates_per_step=20, flip=True)
    config.pruning.update(hint=10.0, clip_norm=10.0)
    if arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    return config
