"""Where dvinv is started: from any folder, without a home, without a device, beside others' flags, on Windows."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from absl import flags

import dvinv
from dvinv import main
from dvinv.__main__ import cli
from dvinv.config import default_config, nested, parse, parsing
from dvinv.runtime import devices, progress
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.errors import DvinvError, say_once
from dvinv.runtime.workdir import flat

ROOT = Path(__file__).parents[2]


# The clone


def test_an_editable_install_wins_over_the_folder_of_the_clone(tmp_path):
    """setuptools puts a project on the path where it has a package-dir, and only there a regular package wins."""
    settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    assert settings['package-dir'] == {'': '.'}
    (tmp_path / 'dvinv').symlink_to(ROOT)  # the clone, in the folder where Python is started
    code = 'import dvinv; print(dvinv.__version__, dvinv.__file__)'
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'dvinv')}  # as the install's .pth file has it
    answer = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    assert answer.stdout.split() == [dvinv.__version__, str(tmp_path / 'dvinv' / 'dvinv' / '__init__.py')]


def test_the_command_sees_modules_of_the_working_folder(monkeypatch, tmp_path):
    """As `python -m dvinv.main` does; under -P neither."""
    run = []
    monkeypatch.setattr(runpy, 'run_module', lambda name, run_name, alter_sys: run.append((name, run_name, sys.path[0])))
    monkeypatch.setattr(sys, 'path', ['bin', *sys.path])
    monkeypatch.chdir(tmp_path)
    cli()
    cli()
    assert run == [('dvinv.main', '__main__', str(tmp_path))] * 2
    assert sys.path.count(str(tmp_path)) == 1
    script = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['scripts']['dvinv']
    assert script == f'{cli.__module__}:{cli.__name__}'


def test_flags_are_read_before_jax_is_imported():
    """A mistyped flag is reported at once, and importing JAX takes seconds."""
    code = "import sys, dvinv.main; print({'jax', 'optax', 'flax'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert answer.stdout == 'set()\n'


def test_public_names_are_listed_and_have_types():
    assert {*dvinv.__all__} <= {*dir(dvinv)}
    tree = ast.parse((ROOT / 'dvinv' / '__init__.py').read_text())
    typed = {
        alias.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert typed == dvinv._EXPORTS
    data = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['package-data']
    assert all((ROOT / 'dvinv' / name).is_file() for name in data['dvinv'])
    templates = sorted((ROOT / 'dvinv').rglob('*.j2'))
    assert data['dvinv'] == ['py.typed', *(path.relative_to(ROOT / 'dvinv').as_posix() for path in templates)]


def test_every_field_is_listed_with_its_comment():
    """The comments stand in the sources of the dataclasses."""
    text = parsing.described()
    for flag, comment in (
        ('seed=0', 'seed of all random numbers'),
        ('data.train_path=', 'path of the training images (npz, folders)'),
        ('teacher.training.optimizer=', "'adam' (with decoupled weight decay)"),
        ('teacher.training.label_smoothing=', 'fraction of the target probability that is spread'),
        ('teacher.mean=()', 'One number per channel, for pixels in [0, 1]; (): those in the weights file'),
        ('synthesis.stages[0].jitter=', "pixels, at this stage's resolution"),
        ('synthesis.weights.feature=', 'BatchNorm moments against running statistics'),
        ('pruning.steps=5', 'pruning steps to reach it'),
        ('continual.steps=()', 'One dict per task, with the fields that differ from the group `data`:'),
        ('quantization.ranges=', "'minmax', 'percentile' or 'mse'"),
    ):
        assert re.search(rf'--config\.{re.escape(flag)}.*\n    {re.escape(comment)}', text), flag
    names = {field.path for field in parsing.fields()}
    settings = nested(parse(default_config('digits')))
    assert {name.split('[')[0] for name in names} == {name.split('[')[0] for name in flat(settings)}
    assert [field.path for field in parsing.fields() if not field.comment] == []


def test_the_page_of_settings_is_that_of_the_fields():
    assert (ROOT / 'docs' / 'settings.md').read_text() == parsing.as_markdown()


# The user


@pytest.fixture
def no_cache():
    """JAX has no folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', None)
    say_once.cache_clear()
    yield
    jax.config.update('jax_compilation_cache_dir', before)


def without_home(monkeypatch, tmp_path):
    def home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setattr(Path, 'home', home)


def beneath_a_file(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(Path, 'home', lambda: tmp_path / 'file')


def read_only(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, 'home', lambda: tmp_path)
    monkeypatch.setattr(os, 'access', lambda *_: False)


@pytest.mark.parametrize('where', [without_home, beneath_a_file, read_only])
def test_without_a_home_nothing_is_kept_and_that_is_said_once(monkeypatch, tmp_path, capsys, no_cache, where):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    where(monkeypatch, tmp_path)
    for _ in range(2):
        devices.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.startswith('dvinv: Compiled programs are not kept for later runs (')
    assert said.count('\n') == 1


def test_compiled_programs_are_kept_in_the_cache_of_the_user(monkeypatch, tmp_path, no_cache):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    devices.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'dvinv' / 'jax')


# The device


@pytest.mark.parametrize('error', [RuntimeError("Unable to initialize backend 'cuda': no GPU\n(more)"), AssertionError()])
@pytest.mark.parametrize('platforms', ['cuda', 'tpu'])
def test_a_device_that_is_not_there_is_told(monkeypatch, error, platforms):
    def devices():
        raise error

    monkeypatch.setattr(jax, 'local_devices', devices)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', platforms)
    try:
        with pytest.raises(DvinvError, match=f"JAX_PLATFORMS is '{platforms}', but JAX cannot use .* set JAX_PLATFORMS=cpu"):
            make_mesh()
    finally:
        jax.config.update('jax_platforms', before)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(vendor, kind, smi)`: what is on the PCI bus, and the answer of nvidia-smi; None: it is not installed."""

    def machine(vendor='', kind='', smi=None):
        monkeypatch.setattr(progress, 'PCI', tmp_path)
        monkeypatch.setattr(progress.shutil, 'which', lambda name: smi is not None or None)
        monkeypatch.setattr(
            progress.subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(command, 0, smi, '')
        )
        monkeypatch.setattr(progress, 'PLUGINS', ('no_such_plugin',))
        if vendor:
            (tmp_path / '0000:00:04.0').mkdir()
            (tmp_path / '0000:00:04.0' / 'vendor').write_text(f'{vendor}\n')
            (tmp_path / '0000:00:04.0' / 'class').write_text(f'{kind}\n')

    return machine


@pytest.mark.parametrize(
    ('there', 'name'),
    [
        ({}, ''),
        ({'smi': 'No devices were found\n'}, ''),
        ({'smi': 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n'}, 'NVIDIA H100 80GB HBM3'),
        ({'vendor': '0x10de', 'kind': '0x030200'}, 'NVIDIA, at 0000:00:04.0 of the PCI bus'),
        ({'vendor': '0x10de', 'kind': '0x040300'}, ''),  # its sound
        ({'vendor': '0x1af4', 'kind': '0x030000'}, ''),  # the graphics of a virtual machine
    ],
)
def test_a_gpu_that_is_not_used_is_told(monkeypatch, machine, there, name):
    machine(**there)
    before = jax.config.jax_platforms
    try:
        jax.config.update('jax_platforms', '')
        expected = f"A GPU is there but not used ({name}): install JAX for it, as by pip install 'jax[cuda12]'"
        assert progress.unused_gpu().startswith(expected) if name else progress.unused_gpu() == ''
        jax.config.update('jax_platforms', 'cpu')
        assert progress.unused_gpu() == (f"A GPU is there but not used ({name}): JAX_PLATFORMS is 'cpu'." if name else '')
        jax.config.update('jax_platforms', '')
        monkeypatch.setattr(progress, 'PLUGINS', ('json',))
        assert ('although JAX for CUDA is installed' in progress.unused_gpu()) == bool(name)
    finally:
        jax.config.update('jax_platforms', before)


# Others' flags


def test_a_users_module_may_define_flags_of_the_same_names(monkeypatch):
    """The module that teacher.factory names, for instance: what was given on the command line stays."""
    for flag in (main._CONFIG, main._WORKDIR, main._PLAN, main._SEEDS, main._DISTRIBUTED):
        given = flags.FLAGS[flag.name]
        flags.DEFINE_string(flag.name, None, 'Of another module.')
        flags.FLAGS[flag.name] = given
    monkeypatch.setattr(flags.FLAGS['workdir'], 'using_default_value', False)
    flags.DEFINE_string('workdir', None, 'Of another module.')
    assert flags.FLAGS['workdir'].help == 'The folder for all files of the run; the same command resumes it.'
