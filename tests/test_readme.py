"""What the README tells newcomers to type works, and the tree is clean."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dvinv

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
OWN_NETWORK = (ROOT / 'docs' / 'your_own_network.md').read_text()
LINEN, NNX = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def shortened(example, *replacements):
    """The code with less to compute."""
    for long, short in (('range(600)', 'range(2)'), *replacements):
        assert long in example
        example = example.replace(long, short)
    return compile(example, 'your_own_network.md', 'exec')


def remembered(function, result):
    """The function, for calls that it would take: what it returned before, since to compute it again would take its time."""

    def call(*arguments, **more):
        inspect.signature(function).bind(*arguments, **more)
        return result

    return call


@pytest.mark.slow
def test_the_own_network_examples_run(tmp_path, monkeypatch):
    """Those of docs/your_own_network.md, which train networks, and with these networks the README's."""
    linen, nnx = re.findall(r'```python\n(.*?)```', OWN_NETWORK, re.DOTALL)[:2]
    assert linen.count('\n') <= 56
    monkeypatch.chdir(tmp_path)
    preset = dvinv.PRESETS['8px']
    monkeypatch.setitem(dvinv.PRESETS, '8px', dataclasses.replace(preset, stages=(dvinv.Stage(1, 0.1),)))
    names = {}
    exec(shortened(linen, ('(32, 1), (32, 1), (64, 2), (64, 1)', '(4, 1), (4, 2)')), names)
    assert names['images'].shape == (100, 8, 8, 1)
    assert names['images'].dtype == 'uint8'
    with Image.open('my_digits.png') as made, Image.open(ROOT / 'docs' / 'own_network.png') as shown:
        assert made.size == shown.size

    known = {'net': names['net'], 'variables': names['variables'], 'real_images': names['images'][::-1]}
    monkeypatch.setattr(dvinv, 'from_linen', remembered(dvinv.from_linen, names['teacher']))
    monkeypatch.setattr(dvinv, 'invert', remembered(dvinv.invert, names['result']))
    exec(compile(LINEN, 'README.md', 'exec'), known)
    np.testing.assert_array_equal(known['images'], names['images'])
    long = 'block(1, 32, 1), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1)'
    exec(shortened(nnx, (long, 'block(1, 64, 2)')), names)
    assert names['model'](names['batch']()[0]).shape == (64, 10)
    monkeypatch.setattr(dvinv, 'from_nnx', remembered(dvinv.from_nnx, names['teacher']))
    exec(compile(NNX, 'README.md', 'exec'), known | {'model': names['model']})


def test_it_is_a_page():
    assert README.count('\n') <= 150


def test_its_first_command_runs_the_digits():
    command = re.search('```bash\n(.*?)```', README, re.DOTALL).group(1)
    assert command == 'pip install -e . && python -m dvinv.main --config configs/digits.py --workdir runs/digits\n'


def test_ci_finds_the_command_of_the_tests():
    """.ci/run looks for it in this section."""
    section = README.split('\n## Tests\n')[1].split('\n## ')[0]
    assert re.findall('```bash\n(.*?)```', section, re.DOTALL) == ["pip install -e '.[test]' && python -m pytest\n"]


def test_the_linter_has_nothing_to_say():
    run = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', str(ROOT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
