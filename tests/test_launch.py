"""launch/local.sh with a recording stand-in for Python."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'launch' / 'local.sh'


def launch(tmp_path: Path, statuses: list[int], *arguments: str) -> tuple[int, list[str]]:
    """Run the script; its i-th Python ends with the i-th of `statuses`. Returns (exit status, recorded calls)."""
    for number, status in enumerate(statuses, 1):
        (tmp_path / f'status-{number}').write_text(str(status))
    python = tmp_path / 'python'
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit $(cat {tmp_path}/status-$(wc -l < {tmp_path}/calls))\n'
    )
    python.chmod(0o755)
    run = subprocess.run(
        ['bash', SCRIPT, *arguments], env={**os.environ, 'PYTHON': str(python), 'DELAY': '0'}, capture_output=True, text=True
    )
    calls = tmp_path / 'calls'
    return run.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_arguments_reach_the_program(tmp_path):
    status, calls = launch(tmp_path, [0], 'configs/digits.py', 'runs/a b', '--config.seed=3')
    assert status == 0
    assert calls == ['-m dvinv.main --config configs/digits.py --workdir runs/a b --config.seed=3']


def test_a_killed_run_is_resumed_and_a_mistake_is_not(tmp_path):
    assert launch(tmp_path, [137, 137, 0], 'c.py', 'w')[0] == 0
    assert len((tmp_path / 'calls').read_text().splitlines()) == 3
    (tmp_path / 'calls').unlink()
    status, calls = launch(tmp_path, [1], 'c.py', 'w')
    assert (status, len(calls)) == (1, 1)


@pytest.mark.parametrize('arguments', [(), ('configs/digits.py',)])
def test_missing_arguments_are_told(tmp_path, arguments):
    assert launch(tmp_path, [], *arguments) == (2, [])
