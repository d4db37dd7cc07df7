"""A residual teacher, a plain convolutional student of a quarter of its parameters, real 8x8 digits. CPU is enough.

    python -m dvinv.main --config configs/digits_convnet.py --workdir runs/digits_convnet

Teacher and images are those of `digits.py`. The student has another architecture: besides the teacher's answers it is given
hints at the end of each stage (`distillation.hint`), the last values of 8x8 and of 4x4 pixels, in both networks, and learns
its stages side by side (`distillation.graft`). About a minute on two CPU cores; over five seeds the student (23,183
parameters, .247 of the teacher's) reads .987 +- .005 of the real test images right, the teacher .996. `:answers` is without
hints, as in the paper. `:smoke` shrinks the run to seconds.
"""

import ml_collections

from dvinv.configs import digits


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'answers' or 'smoke'."""
    config = digits.get_config('smoke' if arg == 'smoke' else '')
    config.student.update(network='small_convnet', width=0.25 if arg == 'smoke' else 0.65)
    if arg != 'smoke':
        config.distillation.updates = 1200
    if arg != 'answers':
        config.distillation.hint = 10.0
    if arg not in ('', 'answers', 'smoke'):
        raise ValueError(f'This config knows the arguments answers and smoke, not {arg!r}')
    return config
