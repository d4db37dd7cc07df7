"""launch/colab.ipynb: its cells run, and everybody names one address of the repository."""

import json
import os
import re
import shutil
import subprocess
import tomllib

import pytest
from smoke import ROOT

NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'


def _cells() -> list[str]:
    """The code cells: the one that installs the package, and those of Python."""
    return [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


@pytest.mark.parametrize(('status', 'package'), [(0, './dvinv[cuda12]'), (9, './dvinv')], ids=['GPU', 'driver without GPU'])
def test_jax_comes_with_its_cuda_plugin_where_there_is_a_gpu(tmp_path, status, package):
    for name, body in (('nvidia-smi', f'exit {status}'), ('pip', f'echo "$@" > {tmp_path}/said')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    [install] = re.findall('^!(pip .*)', _cells()[0], re.MULTILINE)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    subprocess.run(['sh', '-c', install], env=environment, check=True)
    assert (tmp_path / 'said').read_text() == f'install -q -e {package}\n'


def test_the_cells_run_in_order_with_a_smoke_config(finished, tmp_path, monkeypatch, capsys):
    """On the work directory of a finished run whose student was lost: the cells teach another."""
    workdir = shutil.copytree(finished, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / 'student')
    (workdir / 'networks' / 'student.safetensors').unlink()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('DVINV_CONFIG', 'configs/digits.py:smoke')
    monkeypatch.setenv('DVINV_WORKDIR', str(workdir))
    names = {}
    for cell in _cells()[1:]:
        exec(compile(cell, str(NOTEBOOK), 'exec'), names)
    assert (workdir / 'networks' / 'student.safetensors').exists()
    assert set(names['results']) == {'teacher', 'synthesis', 'distillation'}
    assert re.search(r'synthesized images, no data +\d+\.\d%', capsys.readouterr().out)


def test_the_repository_has_one_address():
    address = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['urls']['Repository']
    owner = address.removeprefix('https://github.com/')
    assert f'git clone -q {address}\n' in _cells()[0]
    assert (
        f'https://colab.research.google.com/github/{owner}/blob/main/launch/colab.ipynb' in (ROOT / 'README.md').read_text()
    )
