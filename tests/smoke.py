"""The smoke config, and work directories to compare and to damage."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
lasting = runpy.run_path(str(ROOT / 'benchmarks' / 'kill_test.py'))['lasting']


def smoke_config(**changes):
    """configs/digits.py:smoke; `changes` are dotted names with '__' for the dot."""
    config = runpy.run_path(str(ROOT / 'configs' / 'digits.py'))['get_config']('smoke')
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return config


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file (by default of the byte in its middle)."""
    data = bytearray(path.read_bytes())
    data[position if position >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)
