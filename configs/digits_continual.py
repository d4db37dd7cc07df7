"""New digits, old ones never seen again: a network that reads 0 to 4 learns 5 to 9, and recalls 0 to 4 from itself.

    python -m dvinv.main --config configs/digits_continual.py --workdir runs/digits_continual

A residual network is trained on the real images of five digits. Then 512 images of them are synthesized from it alone, and
it learns the other five from their real images and from these, 150 updates. Beside it: the other loss, fine-tuning and
LwF.MC on new images alone, replay of real images, joint training. `:twos` begins with 0 and 1 and learns two digits a task,
in four more tasks. Settings were chosen on a validation part of the training split (`--config.data.validation=True`).

Expected among all ten digits (docs/results.md): .970, by the other loss .976, after fine-tuning alone .514, with real
images replayed .990; about 90 s on two busy CPU cores, with all controls. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.config import default_config, shrink


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'twos' or 'smoke'."""
    config = default_config('digits_fast')
    config.tasks = ('teacher', 'continual', 'report')
    config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)  # of the training pixels of all digits
    augmentation = {'shift': 1, 'noise': 0.1}
    optimizer = {'batch_size': 64, 'weight_decay': 5e-4}
    config.teacher.training.update(updates=300, learning_rate=5e-3, warmup=30, **optimizer, **augmentation)
    config.verifier.network = ''
    config.distillation.controls = ()
    if arg == 'twos':
        config.data.classes = (0, 1)
        config.continual.steps = tuple({'classes': (first, first + 1)} for first in (2, 4, 6, 8))
    else:
        config.data.classes = (0, 1, 2, 3, 4)
        config.continual.steps = ({'classes': (5, 6, 7, 8, 9)},)
    config.synthesis.update(images=512, batch_size=256)
    config.continual.update(updates=150, learning_rate=2e-3, warmup=15, **{**optimizer, 'batch_size': 128}, **augmentation)
    config.continual.controls = ('finetune', 'lwf_mc', 'always_be_dreaming', 'replay', 'joint')
    if arg == 'twos':
        config.continual.update(updates=300, warmup=30, features=0.3)
    config.logging.checkpoint_every = 100
    if arg == 'smoke':
        shrink(config)
    elif arg not in ('', 'twos'):
        raise ValueError(f'This config knows the arguments twos and smoke, not {arg!r}')
    return config
