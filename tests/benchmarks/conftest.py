"""Lets tests import the scripts of benchmarks/; settings of gpu.py and the configs that its flags make."""

import dataclasses
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from smoke import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
from gpu_stage import Settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    """Settings of a rehearsal."""
    return Settings(str(tmp_path / 'out'), str(tmp_path / 'work'), str(tmp_path / 'data'), '', True, False, 2)


@pytest.fixture
def real(settings) -> Settings:
    """Settings that are no rehearsal."""
    return dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100')


@pytest.fixture
def config_of(monkeypatch):
    """`config_of(arguments)`: the config that the flags of a run make."""
    monkeypatch.chdir(ROOT)

    def config_of(arguments: list[str]):
        monkeypatch.setattr(sys, 'argv', ['dvinv', *arguments])  # where ml_collections looks for the names of fields
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file('config', None, flag_values=values)
        values(sys.argv)
        return config.value

    return config_of
