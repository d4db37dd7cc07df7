"""What the README tells newcomers to type works, and the tree is clean."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_own_model_example_runs():
    example = re.search(r'```python\n(.*?)```', README, re.DOTALL).group(1)
    assert example.count('\n') <= 22
    names = {}
    exec(compile(example.replace('iterations=500', 'iterations=3'), 'README.md', 'exec'), names)
    assert names['pixels'].shape == (20, 16, 16, 3)
    assert names['pixels'].dtype == 'uint8'


def test_commands_name_files_that_exist():
    for path in re.findall(r'(?:configs|launch|benchmarks|docs)/\w+\.\w+', README):
        assert (ROOT / path).exists(), path


def test_the_linter_has_nothing_to_say():
    run = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', str(ROOT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
