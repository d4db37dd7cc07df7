"""benchmarks/gpu.py: its command line and its bundle."""

import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_bundle
import gpu_schedule
import pytest
from smoke import ROOT

from dvinv.runtime.errors import DvinvError


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--minutes', '0.1'], '--minutes is 0.1; it must be at least 0.5'),
        (['--minutes', 'nan'], '--minutes is nan'),
        (['--side-by-side', '0'], '--side-by-side is 0; it must be at least 1'),
        ([], '--out is missing, and OUT is not set'),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, argv, words):
    monkeypatch.delenv('OUT', raising=False)
    with pytest.raises(DvinvError, match=words):
        gpu.parse(argv)


def test_figures_go_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv('OUT', str(tmp_path))
    assert gpu.parse([]).out == tmp_path
    assert gpu.parse(['--rehearse']).out == ROOT / 'runs' / 'gpu_rehearsal' / 'out'


def test_without_a_gpu_the_rehearsal_is_offered(tmp_path):
    command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu.py'), '--out', str(tmp_path / 'out')]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PATH': str(tmp_path)}, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('gpu: No NVIDIA GPU is found here (FileNotFoundError')
    assert done.stderr.endswith('--rehearse does everything in toy sizes on a CPU.\n')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('output', 'status'), [('No devices were found', 6), ('', 0)])
def test_a_driver_without_a_gpu_is_none(monkeypatch, tmp_path, output, status):
    write_executable(tmp_path / 'nvidia-smi', f'echo -n "{output}"; exit {status}')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DvinvError, match='No NVIDIA GPU is found here'):
        gpu_schedule.find_gpu()


def test_the_gpu_is_named(monkeypatch, tmp_path):
    write_executable(tmp_path / 'nvidia-smi', 'echo NVIDIA X100; echo NVIDIA X100')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    assert gpu_schedule.find_gpu() == 'NVIDIA X100'


def write_executable(path: Path, script: str) -> None:
    """Writes a shell script."""
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)


def test_the_bundle_has_the_dependencies_that_the_machine_lacks():
    assert gpu_bundle._wanted() == ['ml-collections>=1.1']


def test_a_bundle_is_built_and_checked(monkeypatch, tmp_path):
    bundle, data = tmp_path / 'bundle', tmp_path / 'data'
    with pytest.raises(DvinvError, match=r'There is no bundle at .*; make it by `python benchmarks/gpu.py --bundle`'):
        gpu_bundle.check(bundle)
    data.mkdir()
    with pytest.raises(DvinvError, match=r'has no cifar10_train_jpeg.npz, .*; set DVINV_DATA'):
        gpu_bundle.build(bundle, data)
    for name in gpu_bundle.DATA:
        (data / name).write_bytes(b'1234')
    wheel = 'some-1.0-py3-none-any.whl'
    monkeypatch.setattr(gpu_bundle, '_download', lambda wanted, folder: (folder / wheel).write_bytes(b''))
    assert gpu_bundle.build(bundle, data).startswith('bundle has 0.0 MiB and the checkout ')
    gpu_bundle.check(bundle)
    (bundle / 'data' / gpu_bundle.DATA[1]).unlink()
    with pytest.raises(DvinvError, match=r'lacks data/cifar10_test_jpeg.npz; make it by'):
        gpu_bundle.check(bundle)
    monkeypatch.setattr(gpu_bundle, 'MOST_BYTES', 2**20)
    with pytest.raises(
        DvinvError, match=r'bundle has .* MiB, together more than the 1 MiB that travel; remove what is large'
    ):
        gpu_bundle.build(bundle, data)


def test_a_bundle_without_wheels_is_refused(monkeypatch, tmp_path):
    assert gpu_bundle.install(tmp_path, tmp_path / 'site') == []  # nothing is missing here
    monkeypatch.setattr(gpu_bundle, '_missing', lambda: ['ml-collections'])
    with pytest.raises(DvinvError, match=r'ml-collections is not installed here, and the bundle .* has no wheel of it'):
        gpu_bundle.install(tmp_path, tmp_path / 'site')
    (tmp_path / 'wheels').mkdir()
    (tmp_path / 'wheels' / 'ml_collections-1.1.0-py3-none-any.whl').write_bytes(b'no wheel')
    with pytest.raises(DvinvError, match=r'The wheels of .* cannot be installed: ERROR'):
        gpu_bundle.install(tmp_path, tmp_path / 'site')
