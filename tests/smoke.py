"""The smoke config, and work directories to compare and to damage."""

import runpy
from pathlib import Path

from dvinv.config import parse
from dvinv.pipeline.run import Run

ROOT = Path(__file__).parents[1]
lasting = runpy.run_path(str(ROOT / 'benchmarks' / 'kill_test.py'))['lasting']

# The names of figures that users may rely on.
NAMES = {
    'teacher': {'test_accuracy', 'test_images', 'parameters', 'flops', 'wall_seconds', 'seed'},
    'synthesis': {
        'images',
        'iterations',
        'teacher_accuracy',
        'verifier_accuracy',
        'verifier_top5_accuracy',
        'feature_loss_first',
        'feature_loss_last',
        'feature_loss_real',
        'wall_seconds',
        'seed',
    },
    'distillation': {
        'test_accuracy',
        'noise_test_accuracy',
        'prior_only_test_accuracy',
        'real_test_accuracy',
        'parameters',
        'images',
        'updates',
        'hinted_layers',
        'wall_seconds',
        'seed',
    },
}


def smoke_config(**changes):
    """configs/digits.py:smoke; `changes` are dotted names with '__' for the dot."""
    config = runpy.run_path(str(ROOT / 'configs' / 'digits.py'))['get_config']('smoke')
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return config


def smoke_run(path='', **changes) -> Run:
    """The run of such a config, whose work directory is not open."""
    return Run(parse(smoke_config(**changes)), path)


def synthesis_config(**changes):
    """The same for four batches of a tiny network alone: nothing is trained."""
    tiny = {'teacher__factory': 'factories:own', 'verifier__network': '', 'distillation__controls': ()}
    return smoke_config(**{**tiny, 'synthesis__images': 80, 'tasks': ('synthesis',), **changes})


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file (by default of the byte in its middle)."""
    data = bytearray(path.read_bytes())
    data[position if position >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)
