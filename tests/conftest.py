"""Several CPU devices, where the real data are, and runs of the smoke config."""

import fcntl
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# The shapes and dtypes that these modules declare are checked at every call, which must be set before they are imported.
CHECKED = [
    'continual.losses',
    *('data.dataset', 'data.files', 'data.pool'),
    'distillation.student',
    'evaluation',
    'graph.stages',
    *('inversion.augmentation', 'inversion.capture', 'inversion.linen_modules', 'inversion.losses', 'inversion.nnx_models'),
    *('inversion.statistics', 'inversion.step', 'inversion.tap'),
    *('networks.calibration', 'networks.channel_groups', 'networks.classifier', 'networks.quantized'),
    'pruning.selection',
    'training.step',
]
install_import_hook([f'dvinv.{module}' for module in CHECKED], 'checking.check')

from tiny import tiny_teacher  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

if 'PYTEST_XDIST_WORKER' in os.environ and hasattr(os, 'sched_setaffinity'):
    # XLA's threads, which start now, get cores of their own in every process of pytest: on shared ones they would wait for
    # one another. What the tests start may use all.
    position, count = (int(os.environ[f'PYTEST_XDIST_{name}'].removeprefix('gw')) for name in ('WORKER', 'WORKER_COUNT'))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[position::count] or cores[position % len(cores) :][:1])
    jax.devices()
    os.sched_setaffinity(0, cores)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background deaf to Ctrl-C, and so would be all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Whole runs, trainings and inversions that several tests look at; such tests are slow, as are those marked so themselves.
SLOW_FIXTURES = {'adaptive', 'batches', 'finished', 'quantized_run', 'trained', 'undisturbed', 'undivided'}


def pytest_collection_modifyitems(items):
    """Marks tests as slow, and lets files of few and slow tests come first: at the end no process waits long for another."""
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    slow_first = {path: (0, count) if path in slow else (1, -count) for path, count in tests.items()}
    items.sort(key=lambda item: (slow_first[item.path], item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Lets XLA optimise little, here and in the processes that a test starts: compiling is most of what tests do.

    Tests that compare programs that XLA could optimise differently, bit for bit or instruction by instruction, are marked
    `optimized`, and get the programs that users run.
    """
    quick = item.get_closest_marker('optimized') is None
    jax.config.update('jax_disable_most_optimizations', quick)
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(quick)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder with published teachers and images; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get('DVINV_DATA') or Path(__file__).parents[2] / 'shared' / 'data')
    if not folder.is_dir():
        pytest.skip(f'no real data at {folder}; set DVINV_DATA')
    return folder


@pytest.fixture(scope='module')
def teacher():
    """A tiny Teacher."""
    return tiny_teacher()


@pytest.fixture(scope='module')
def student():
    """Another tiny network for the same images."""
    return tiny_teacher(seed=1, channels=(3,))


@pytest.fixture(scope='session')
def shared(tmp_path_factory) -> Path:
    """A folder that the processes of pytest have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


@pytest.fixture(scope='session', autouse=True)
def compiled(shared) -> None:
    """What one test has compiled serves all, and the processes that they start: most of their time goes into that."""
    settings = {'compilation_cache_dir': str(shared / 'cache'), 'persistent_cache_min_compile_time_secs': 0.0}
    for name, value in settings.items():
        jax.config.update(f'jax_{name}', value)
        os.environ[f'JAX_{name.upper()}'] = str(value)


@pytest.fixture(scope='session')
def start():
    """`start(*flags)`: the process of a run of the smoke config.

    `more`: environment variables.
    """
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '8',  # as here: on some CPUs sums are split by the number of threads, which follows
        'PYTHONPATH': str(Path(__file__).parent),
    }

    def start(*flags, config='configs/digits.py:smoke', more=None) -> subprocess.Popen:
        command = [sys.executable, '-m', 'dvinv.main', *(['--config', config] if config else []), *map(str, flags)]
        return subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment, **(more or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture(scope='session')
def command(start):
    """`command(*flags) -> (exit status, stdout, stderr)` of such a run."""

    def command(*flags, **options):
        with start(*flags, **options) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    return command


@pytest.fixture(scope='session')
def finished(command, shared) -> Path:
    """The work directory of a finished run of the smoke config. Tests that change it copy it."""
    workdir = shared / 'finished' / 'run'
    with open(shared / 'finished.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process that comes first makes it, for all
        if not (workdir / 'report.html').exists():
            status, _, err = command('--workdir', workdir)
            assert status == 0, err
    return workdir
