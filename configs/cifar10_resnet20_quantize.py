"""A published CIFAR-10 ResNet-20 in 8, 6 and 4 bits, without data. For a laptop: CPU is enough.

    python -m dvinv.main --config configs/cifar10_resnet20_quantize.py --workdir runs/cifar10_resnet20_quantize \\
      --config.teacher.weights=resnet20.th --config.verifier.weights=resnet32.th

Weights, data and images as in `cifar10_resnet20.py` (`--config.pool=POOL` takes images that are there already). 8 and 6 bits
by ranges from 512 of the images; 4 bits by 300 updates of 64 with the float network's answers besides. First and last layer
have 8 bits throughout. Figures are in docs/results.md. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import cifar10_resnet20


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    if arg not in ('', 'smoke'):
        raise ValueError(f'This config knows the argument smoke, not {arg!r}')
    config = cifar10_resnet20.get_config(arg)
    config.tasks = ('teacher', 'synthesis', 'quantization', 'report')
    config.synthesis.batches_per_round = 0  # nobody learns meanwhile
    if arg != 'smoke':
        config.quantization.training.update(updates=300, warmup=20, shift=4, flip=True)
    return config
