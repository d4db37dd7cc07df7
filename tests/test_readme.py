"""What the README tells newcomers to type works, and the tree is clean."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

import dvinv

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_own_model_example_runs(tmp_path, monkeypatch):
    example = re.search(r'```python\n(.*?)```', README, re.DOTALL).group(1)
    assert example.count('\n') <= 52
    monkeypatch.chdir(tmp_path)
    preset = dvinv.PRESETS['8px']
    monkeypatch.setitem(dvinv.PRESETS, '8px', dataclasses.replace(preset, stages=(dvinv.Stage(1, 0.1),)))
    names = {}
    for long, short in (('range(600)', 'range(2)'), ('(32, 1), (32, 1), (64, 2), (64, 1)', '(4, 1), (4, 2)')):
        assert long in example
        example = example.replace(long, short)
    exec(compile(example, 'README.md', 'exec'), names)
    assert names['images'].shape == (100, 8, 8, 1)
    assert names['images'].dtype == 'uint8'
    with Image.open('my_digits.png') as made, Image.open(ROOT / 'docs' / 'own_network.png') as shown:
        assert made.size == shown.size

    example = re.search(r'```python\n(from flax import nnx\n.*?)```', README, re.DOTALL).group(1)  # goes on from the first
    long, short = 'block(1, 32, 1), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1)', 'block(1, 64, 2)'
    assert long in example
    example = example.replace(long, short).replace('range(600)', 'range(2)')
    example, inverted, rest = example.rpartition('result = dvinv.invert(teacher, dvinv.balanced_labels(0, 100, 10))\n')
    assert inverted  # as above; that takes its time
    assert not rest
    exec(compile(example, 'README.md', 'exec'), names)
    assert names['teacher'].image_shape == (8, 8, 1)
    assert names['model'](names['batch']()[0]).shape == (64, 10)


def test_commands_name_files_that_exist():
    for path in re.findall(r'(?:configs|launch|benchmarks|docs)/\w+\.\w+', README):
        assert (ROOT / path).exists(), path


def test_the_linter_has_nothing_to_say():
    run = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', str(ROOT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
