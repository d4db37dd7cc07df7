"""Where dvinv is started: from any folder, without a home, without a device, beside others' flags, on Windows."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from absl import flags

import dvinv
from dvinv import main
from dvinv.errors import DvinvError, say_once
from dvinv.runtime import compilation
from dvinv.runtime.devices import make_mesh

ROOT = Path(__file__).parents[1]


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
        compilation.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert said.startswith('dvinv: Compiled programs are not kept for later runs (')
    assert said.count('\n') == 1


def test_compiled_programs_are_kept_in_the_cache_of_the_user(monkeypatch, tmp_path, no_cache):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    compilation.keep_compiled()
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


# Others' flags


def test_a_users_module_may_define_flags_of_the_same_names(monkeypatch):
    """The module that teacher.factory names, for instance: what was given on the command line stays."""
    for flag in (main._CONFIG, main._WORKDIR, main._PLAN, main._SEEDS, main._DISTRIBUTED):
        given = flags.FLAGS[flag.name]
        flags.DEFINE_string(flag.name, None, 'Of another module.')
        flags.FLAGS[flag.name] = given
    monkeypatch.setattr(flags.FLAGS['workdir'], 'using_default_value', False)
    flags.DEFINE_string('workdir', None, 'Of another module.')
    assert flags.FLAGS['workdir'].help == 'The folder for all that the run writes; the same command resumes it.'


# Windows


def test_windows_is_told_before_anything_is_written(monkeypatch):
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.delitem(sys.modules, 'dvinv.runtime.claims', raising=False)
    with pytest.raises(DvinvError, match=r'runs on Linux and macOS: .* use WSL 2'):
        import dvinv.runtime.claims  # noqa: F401
