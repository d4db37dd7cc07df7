"""launch/colab.ipynb: its cells run, and the first asks for the address of the repository."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from smoke import ROOT

import dvinv
from dvinv.networks import save_network

NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'


def _cells() -> list[str]:
    """The code cells; the first installs the package."""
    return [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


def _compiled(cell: str):
    return compile(cell, str(NOTEBOOK), 'exec')


@pytest.mark.parametrize(('status', 'package'), [(0, './dvinv[cuda12]'), (9, './dvinv')], ids=['GPU', 'driver without GPU'])
def test_jax_comes_with_its_cuda_plugin_where_there_is_a_gpu(tmp_path, status, package):
    for name, body in (('nvidia-smi', f'exit {status}'), ('pip', f'echo "$@" > {tmp_path}/said')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    [install] = re.findall('^!(pip .*)', _cells()[0], re.MULTILINE)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    subprocess.run(['sh', '-c', install], env=environment, check=True)
    assert (tmp_path / 'said').read_text() == f'install -q -e {package}\n'


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """Stand-ins for what only a notebook has; `google.colab.files.upload` gives the file `tmp_path`/upload.safetensors."""
    uploaded = types.SimpleNamespace(upload=lambda: {str(tmp_path / 'upload.safetensors'): b''})
    modules = {'IPython': {}, 'IPython.display': {'HTML': str}, 'google.colab': {'files': uploaded}}
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_cells_run_in_order_with_a_smoke_config(finished, tmp_path, monkeypatch, capsys, notebook):
    """On the work directory of a finished run whose student was lost: the cells teach another."""
    workdir = shutil.copytree(finished, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / 'student')
    (workdir / 'networks' / 'student.safetensors').unlink()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('DVINV_CONFIG', 'configs/digits.py:smoke')
    monkeypatch.setenv('DVINV_WORKDIR', str(workdir))
    short = dataclasses.replace(dvinv.PRESETS['digits'].stages[0], iterations=2)
    monkeypatch.setitem(dvinv.PRESETS, 'digits', dataclasses.replace(dvinv.PRESETS['digits'], stages=(short,)))
    names = {}
    for cell in _cells()[1:]:
        exec(_compiled(cell), names)
    assert (workdir / 'networks' / 'student.safetensors').exists()
    assert set(names['results']) == {'teacher', 'synthesis', 'distillation'}
    out = capsys.readouterr().out
    told = re.findall(r'^([a-z ,]+?) +\d+\.\d%$', out, re.MULTILINE)
    assert told == [
        'the teacher itself',
        'synthesized images, no data',
        'real images, for comparison',
        'noise',
        'images made without the feature term',
    ]
    assert len(re.findall(r'^a \w+ +is read as \w+$', out, re.MULTILINE)) == 10
    assert '&lt;h1&gt;small_resnet on digits' in names['page']
    assert names['result'].images.shape == (80, 8, 8, 1)

    save_network(tmp_path / 'upload.safetensors', names['variables'], names['about'])
    with_upload = _cells()[-1].replace('UPLOAD = False', 'UPLOAD = True').replace("'resnet20'", "'small_resnet'")
    monkeypatch.setattr(dvinv, 'invert', lambda teacher, labels, *_: types.SimpleNamespace(images=np.zeros((80, 8, 8, 1))))
    exec(_compiled(with_upload), names)
    assert 'Rows from the top: airplane, automobile,' in capsys.readouterr().out


def test_the_notebook_runs_the_demo_by_which_the_control_tells_the_story():
    """With `:fast` a student of images without the feature term reads nearly as well: 93.9% beside 98.6% (seed 0)."""
    assert "'DVINV_CONFIG', 'configs/digits.py')" in ''.join(_cells())


def test_the_first_cell_asks_for_the_address_of_the_repository():
    lines = _cells()[0].splitlines()
    with pytest.raises(ValueError, match='the address or folder that `git clone` gets dvinv from'):
        exec('\n'.join(line for line in lines if not line.startswith(('!', '%'))), {})
    assert '!git clone -q "{repository}" dvinv' in lines
