"""benchmarks/step_time.py, without PyTorch: what it refuses, how far medians are trusted, dvinv's part alone."""

import json
import os
import subprocess
import sys

import pytest
from smoke import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
import step_time
from paired import median_interval

from dvinv.errors import DvinvError


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--batch', '7', '--devices', '2'], '--batch 7 is not divided by 2 devices'),
        (['--batch', '1'], '--batch is 1; it must be at least 2'),
        (['--rounds', '0'], '--rounds is 0'),
    ],
)
def test_mistakes_are_told(flags, words):
    with pytest.raises(DvinvError, match=words):
        step_time.parse([*flags, '--alone'])


def test_without_pytorch_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(step_time.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DvinvError, match=r"pip install -e '\.\[benchmarks\]', or --alone"):
        step_time.parse(['--devices', '1'])
    assert step_time.parse(['--devices', '1', '--alone']).batch == 64


def test_first_steps_that_differ_are_not_timed():
    ours = {'terms': {'loss': 1.0}, 'gradient': step_time.np.ones(3)}
    assert step_time.compared('torch', ours, ours, 'float32') == {'terms': 0, 'gradient': 0}
    for theirs in ({**ours, 'terms': {'loss': 1.001}}, {**ours, 'gradient': step_time.np.array([1, 1, 1.01])}):
        with pytest.raises(DvinvError, match='do not take the same first step'):
            step_time.compared('torch', ours, theirs, 'float32')


@pytest.mark.parametrize(('count', 'cut'), [(1, 0), (5, 0), (6, 0), (9, 1), (20, 5)])
def test_the_interval_of_a_median_is_the_sign_tests(count, cut):
    # Of 9 values the second smallest and largest hold the median with 96%; of 6 the outermost, with 97%.
    assert median_interval(range(count)) == ((count - 1) / 2, cut, count - 1 - cut)


def test_dvinv_alone():
    flags = ['--network', 'resnet20', '--width', '0.25', '--batch', '4', '--devices', '2', '--rounds', '1', '--steps', '1']
    command = [sys.executable, str(ROOT / 'benchmarks' / 'step_time.py'), *flags, '--alone']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result['ratio_over_torch'] is result['ratio_over_torch_frozen'] is None
    assert 0 < result['fraction_of_peak'] < 1
    assert result['gflops'] == pytest.approx(result['fraction_of_peak'] * result['peak_gflops'], rel=1e-2)


def test_a_network_that_does_not_exist_is_told():
    command = [
        sys.executable,
        str(ROOT / 'benchmarks' / 'step_time.py'),
        '--network',
        'resnet21',
        '--alone',
        '--devices',
        '1',
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "step_time: There is no network 'resnet21'" in done.stderr
