"""The smoke config, and work directories to compare and to damage."""

import importlib.util
import json
from pathlib import Path


def smoke_config(**changes):
    """configs/digits.py:smoke; `changes` are dotted names with '__' for the dot."""
    file = Path(__file__).parents[1] / 'configs' / 'digits.py'
    spec = importlib.util.spec_from_file_location('digits_config', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config('smoke')
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return config


def lasting(workdir) -> dict:
    """{path: bytes} of all that a run promises to make again bit for bit; results without their times."""
    workdir = Path(workdir)
    folders = ('pool', 'controls', 'networks', 'samples')
    files = [path for folder in folders for path in (workdir / folder).rglob('*') if path.is_file()]
    content = {str(path.relative_to(workdir)): path.read_bytes() for path in [*files, workdir / 'metrics.jsonl']}
    results = json.loads((workdir / 'results.json').read_text())
    return {
        **content,
        'results': {
            task: {name: value for name, value in figures.items() if name != 'wall_seconds'}
            for task, figures in results.items()
        },
    }


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file (by default of the byte in its middle)."""
    data = bytearray(path.read_bytes())
    data[position if position >= 0 else len(data) // 2] ^= 1
    path.write_bytes(data)
