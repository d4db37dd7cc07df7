"""benchmarks/gpu.py: a rehearsal of all stages but `resnet34`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_contest
import gpu_stage
import pytest
from gpu_cases import reasons
from gpu_report import DONE, PENDING
from smoke import ROOT

# `resnet34` runs the code of `vgg11` with networks that take longer to compile.
STAGES = [stage for stage in gpu_stage.MODULES if stage != 'resnet34']


def rehearse(workdir: Path) -> tuple[int, str]:
    """Returns (exit status, output) of a rehearsal of the first passes."""
    flags = ['--rehearse', '--core', '--workdir', str(workdir), '--stages', *STAGES]
    command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu.py'), *flags]
    # Programs that run once are not worth optimising.
    environment = {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason='takes long, and the GPU machine has Python 3.12')
def test_a_rehearsal_measures_the_figures_of_its_stages_and_goes_on_where_it_ended(tmp_path):
    status, output = rehearse(tmp_path)
    assert status == 0, output + (tmp_path / 'out' / 'log.txt').read_text()
    assert output.endswith('Not finished: resnet34.\n')
    has_torch = gpu_contest.importlib.util.find_spec('torch') is not None
    for stage in STAGES:
        report = json.loads((tmp_path / 'out' / f'{stage}.json').read_text())
        assert (report['stage'], report['rehearsal'], report['error']) == (stage, True, None)
        declared = gpu_stage.items_of(stage, True)
        assert report['items'].keys() == declared.keys()
        for name, item in declared.items():
            entry = report['items'][name]
            assert entry['state'] == (DONE if item.level == 1 else PENDING)
            why = reasons(entry)
            assert None not in why.values()
            if item.level == 1:
                allowed = ('no GPU', 'not installed here', 'PyTorch is not installed here', 'no seed has both students')
                assert {reason for reason in why.values() if not reason.startswith((*allowed, 'torch_'))} == set(), name
                assert has_torch or not any('torch' in path and path not in why for path in leaves(entry['figures']))
    names = {'log.txt', 'imagenet.jpg', *(f'{stage}.json' for stage in gpu_stage.MODULES)}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == names
    assert len(names) <= 8  # as many come back from the GPU machine

    for folder in ('out', 'figures'):
        (tmp_path / folder / 'peak.json').unlink()
    before = {stage: (tmp_path / 'out' / f'{stage}.json').read_text() for stage in STAGES if stage != 'peak'}
    status, output = rehearse(tmp_path)
    assert status == 0
    assert output.count('done in an earlier call') == len(before)
    assert 'versions done, jax done, torch done' in output
    assert before == {stage: (tmp_path / 'out' / f'{stage}.json').read_text() for stage in before}


def leaves(figures: dict, path: str = ''):
    """Yields the paths of all figures."""
    for key, value in figures.items():
        inner = f'{path}.{key}'.lstrip('.')
        if isinstance(value, dict):
            yield from leaves(value, inner)
        else:
            yield inner
