"""benchmarks/step_time.py and driver_overhead.py: what they refuse, how far medians are trusted, a tiny run of each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import step_time
from paired import median_interval
from smoke import ROOT

from dvinv.runtime.errors import DvinvError


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--batch', '7', '--devices', '2'], 'A batch of 7 is not divided by 2 devices'),
        (['--sweep', '--batches', '8', '9', '--devices', '2'], 'A batch of 9 is not divided'),
        (['--sweep', '--batches', '8', '8', '--devices', '2'], '--batches needs at least two'),
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


@pytest.mark.parametrize(
    ('network', 'batch', 'devices'),
    [('resnet20', 64, 2), ('resnet20', 256, 8), ('resnet20', 7, 1), ('mobilenet_v1', 16, 16)],
)
def test_a_device_gets_as_many_pixels_as_suit_it(monkeypatch, network, batch, devices):
    monkeypatch.setattr(step_time, 'cores', lambda: 2)
    assert step_time.parse(['--network', network, '--batch', str(batch), '--alone']).devices == devices


def first_step(loss: float = 1.0, wrong: int = 0, by: float = 0.0) -> dict:
    """Of 5 images, of which so many have a gradient that is `by` too large, relatively."""
    gradient = np.ones((5, 2, 2, 1))
    gradient[:wrong] *= 1 + by
    return {'terms': {'loss': loss, 'feature': 2.0}, 'gradient': gradient}


def test_first_steps_that_are_alike_are_timed():
    differences = step_time.compared('torch', first_step(), first_step(1 + 5e-6, 2, 1e-3), 'float32')
    assert differences == {
        'loss': pytest.approx(5e-6),
        'terms': pytest.approx(5e-6),
        'gradient': pytest.approx(1e-3 * (2 / 5) ** 0.5),
        'gradient_of_median_image': 0,
    }


@pytest.mark.parametrize(
    ('step', 'words'),
    [
        (first_step(1.001), 'they differ in loss by 0.001, terms by 0.001'),
        (first_step(float('nan')), 'loss by nan'),
        (first_step(1.0, 1, 0.1), r'they differ in gradient by 0\.045\.'),  # more than a ReLU that chose otherwise
        (first_step(1.0, 3, 1e-3), r'they differ in gradient_of_median_image by 0\.001\.'),
    ],
)
def test_first_steps_that_differ_are_not_timed(step, words):
    with pytest.raises(DvinvError, match=words):
        step_time.compared('torch', first_step(), step, 'float32')


def test_the_exponent_of_a_power_is_found():
    assert step_time.exponent([1.0, 2.0, 4.0, 8.0], [3.0 * work**0.75 for work in (1, 2, 4, 8)]) == pytest.approx(0.75)


def test_who_begins_a_round_changes():
    assert [*step_time.in_turns(['a', 'b', 'c'], 4)] == [[*'abc'], [*'bca'], [*'cab'], [*'abc']]


@pytest.mark.parametrize(('count', 'cut'), [(1, 0), (5, 0), (6, 0), (9, 1), (20, 5)])
def test_the_interval_of_a_median_is_the_sign_tests(count, cut):
    # Of 9 values the second smallest and largest hold the median with 96%; of 6 the outermost, with 97%.
    assert median_interval(range(count)) == ((count - 1) / 2, cut, count - 1 - cut)


def run(script: str, *flags: str) -> tuple[int, dict, str]:
    """(exit status, the JSON of the last line, stderr) of a benchmark."""
    command = [sys.executable, str(ROOT / 'benchmarks' / script), *flags]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


TINY = ('--network', 'vgg11_bn', '--width', '0.0625', '--batch', '4', '--devices', '2')
ONCE = (*TINY, '--rounds', '1', '--steps', '1')


@pytest.mark.slow
def test_dvinv_alone():
    status, result, err = run('step_time.py', *ONCE, '--alone')
    assert status == 0, err
    assert result['ratio_over_torch'] is result['ratio_over_torch_frozen'] is result['seconds_torch'] is None
    assert 0 < result['fraction_of_peak'] < 1
    assert result['gflops'] == pytest.approx(result['fraction_of_peak'] * result['peak_gflops'], rel=1e-2)
    assert (result['network'], result['batch'], result['resolution'], result['devices']) == ('vgg11_bn', 4, 32, 2)
    assert result['compile_seconds'] > 0
    assert result['peak_memory_mb'].keys() == {'dvinv'}


def test_beside_pytorch_the_first_steps_are_alike():
    pytest.importorskip('torch')
    status, result, err = run('step_time.py', *ONCE)
    assert status == 0, err
    assert result['differences'].keys() == {'torch', 'torch_frozen'}
    for name in ('torch', 'torch_frozen'):
        ratio = result['seconds_dvinv'] / result[f'seconds_{name}']
        assert result[f'ratio_over_{name}'] == pytest.approx(ratio, rel=1e-2)  # of one round
        assert result['intervals'][f'ratio_over_{name}'] == [result[f'ratio_over_{name}']] * 2


@pytest.mark.slow
def test_a_sweep_has_an_exponent_for_batches_and_one_for_resolutions():
    status, result, err = run('step_time.py', *ONCE, '--sweep', '--batches', '2', '4', '--resolutions', '32', '64')
    assert status == 0, err
    batches, resolutions = result['sweep']['batch'], result['sweep']['resolution']
    assert [row['batch'] for row in batches] == [2, 4]
    assert batches[1]['gflop'] == pytest.approx(2 * batches[0]['gflop'], rel=1e-3)
    assert resolutions[1]['gflop'] == pytest.approx(4 * resolutions[0]['gflop'], rel=1e-2)
    assert result['exponents'].keys() == {'batch', 'resolution'}


@pytest.mark.slow
def test_the_drivers_overhead():
    status, result, err = run('driver_overhead.py', *TINY, '--iterations', '2', '--pairs', '1')
    assert status == 0, err
    assert result['overhead'] == result['overhead_low'] == result['overhead_high']
    assert result['overhead'] == pytest.approx(result['seconds_driver'] / result['seconds_bare'] - 1, rel=1e-2, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('script', ['step_time.py', 'driver_overhead.py'])
def test_a_network_that_does_not_exist_is_told(script):
    status, _, err = run(
        script, '--network', 'resnet21', '--devices', '1', *(['--alone'] if script == 'step_time.py' else [])
    )
    assert status == 1
    assert f"{script.removesuffix('.py')}: There is no network 'resnet21'" in err
