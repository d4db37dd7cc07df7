"""Several CPU devices, strict promotion, and where the real data are."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder with published teachers and images; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get('DVINV_DATA') or Path(__file__).parents[2] / 'shared' / 'data')
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}; set DVINV_DATA')
    return folder
