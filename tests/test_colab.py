"""launch/colab.ipynb: its cells run, and everybody names one address of the repository."""

import json
import re
import shutil
import tomllib

from smoke import ROOT

NOTEBOOK = ROOT / 'launch' / 'colab.ipynb'


def _cells() -> list[str]:
    """The code cells, from the first that is Python; those before install the package."""
    cells = [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    install, *rest = cells
    assert install.startswith('!git clone')
    return rest


def test_the_cells_run_in_order_with_a_smoke_config(finished, tmp_path, monkeypatch, capsys):
    """On the work directory of a finished run, which they find finished."""
    workdir = shutil.copytree(finished, tmp_path / 'run')
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('DVINV_CONFIG', 'configs/digits.py:smoke')
    monkeypatch.setenv('DVINV_WORKDIR', str(workdir))
    names = {}
    for cell in _cells():
        exec(compile(cell, str(NOTEBOOK), 'exec'), names)
    assert set(names['results']) == {'teacher', 'synthesis', 'distillation'}
    assert re.search(r'synthesized images, no data +\d+\.\d%', capsys.readouterr().out)


def test_the_repository_has_one_address():
    address = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['urls']['Repository']
    owner = address.removeprefix('https://github.com/')
    assert f'git clone -q {address} ' in NOTEBOOK.read_text()
    assert (
        f'https://colab.research.google.com/github/{owner}/blob/main/launch/colab.ipynb' in (ROOT / 'README.md').read_text()
    )
