"""Several processes run one program: they start, decide, train, synthesize, stop and resume together."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from smoke import lasting, smoke_config, synthesis_config

from dvinv.config import parse
from dvinv.data.pool import ImagePool
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime import devices
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Metrics, Workdir
from dvinv.synthesis.pools import BatchCheckpoints

pytestmark = pytest.mark.slow

COUNT = 2
# XLA splits some sums by the number of its threads, which are as many as there are devices or cores, or NPROC.
THREADS = {'NPROC': '8'}
FLAGS = (
    '--config.verifier.network=',
    '--config.distillation.controls=()',
    '--config.teacher.factory=factories:own',
)
TRAINING_FLAGS = (
    "--config.tasks=('synthesis', 'distillation')",
    '--config.synthesis.images=80',
    '--config.student.network=small_convnet',
    '--config.student.width=0.25',
    '--config.distillation.updates=40',
    '--config.distillation.curve_points=2',
)
OFTEN = '--config.logging.checkpoint_minutes=1e-9'  # every dispatch is saved


def _free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def _flags(index, port):
    return f'--coordinator=127.0.0.1:{port}', f'--num_processes={COUNT}', f'--process_id={index}'


@pytest.fixture
def begin(start):
    """`begin(workdir, *flags, devices=1)`: the processes of a run, process 0 first. None outlives the test."""
    with contextlib.ExitStack() as stack:

        def begin(workdir, *flags, devices=1):
            port, more = _free_port(), {**THREADS, 'JAX_NUM_CPU_DEVICES': str(devices)}
            begun = []
            for index in range(COUNT):
                begun.append(stack.enter_context(start('--workdir', workdir, *_flags(index, port), *flags, more=more)))
                stack.callback(begun[-1].kill)
            return begun

        yield begin


def _until(path: Path, begun):
    while not path.exists():
        assert all(process.poll() is None for process in begun), [process.stderr.read() for process in begun]
        time.sleep(0.002)


def _ended(begun) -> tuple[list[int], list[str]]:
    """(exit statuses, what was said) of processes at their end."""
    said = [process.communicate()[1] for process in begun]
    return [process.returncode for process in begun], said


def test_processes_stop_resume_and_end_as_if_undisturbed(begin, start, tmp_path):
    """kill -9 of process 0 while images are made; SIGTERM to one while the student is trained; then the end."""
    run, undisturbed, one = tmp_path / 'run', tmp_path / 'undisturbed', tmp_path / 'one'
    flags = FLAGS + TRAINING_FLAGS
    begun = begin(run, *flags, OFTEN)
    _until(run / 'pool' / 'shard-000001.json', begun)
    begun[0].kill()
    statuses, said = _ended(begun)
    assert statuses[1] not in (0, 1, 143)  # to be started again
    assert 'Another process of the run has ended' in said[1] or 'another task died' in said[1]
    kept = {path.name: path.stat().st_mtime_ns for path in (run / 'pool').glob('*.npz')}

    begun = begin(run, *flags)
    _until(run / 'checkpoints' / 'student' / '000000010.json', begun)
    begun[1].send_signal(signal.SIGTERM)
    statuses, said = _ended(begun)
    assert statuses == [143, 143], said
    assert all(re.search('SIGTERM: .* saved; the same command goes on from here', text) for text in said), said

    statuses, said = _ended(begin(run, *flags))
    assert statuses == [0, 0], said
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (run / 'pool').glob('*.npz')}.items()
    statuses, said = _ended(begin(undisturbed, *flags, "--config.tasks=('teacher', 'synthesis', 'distillation', 'report')"))
    assert statuses == [0, 0], said
    assert (undisturbed / 'report.html').exists()
    found, expected = lasting(run), lasting(undisturbed)
    assert expected['results.json'].pop('teacher')
    assert found == expected

    # One process with as many devices makes the same images.
    flags = [*flags, "--config.tasks=('synthesis',)"]
    with start('--workdir', one, *flags, more={**THREADS, 'JAX_NUM_CPU_DEVICES': '2'}) as process:
        assert (process.communicate(), process.returncode)[1] == 0
    expected, found = ({path.name: path.read_bytes() for path in (folder / 'pool').glob('*.npz')} for folder in (run, one))
    assert len(found) == 4
    assert found == expected


@pytest.mark.parametrize('method', ['deepinversion', 'adaptive'])
def test_processes_split_a_batch_and_teach_together(begin, tmp_path, method):
    """With bn_stats 'global' a batch lies on the devices of all; its images are those of one process but for rounding."""
    run, changes = tmp_path / 'run', {'bn_stats': 'global', 'synthesis__images': 40, 'synthesis__method': method}
    if method == 'adaptive':
        changes |= {'synthesis__batches_per_round': 1, 'distillation__updates_per_round': 5}
        changes |= {'student__network': 'small_convnet', 'student__width': 0.25, 'synthesis__weights__competition': 10.0}
    names = {name.replace('__', '.'): value for name, value in changes.items()}
    flags = [f'--config.{name}={value}' for name, value in names.items()]
    flags += [*FLAGS, "--config.tasks=('synthesis',)"]
    statuses, said = _ended(begin(run, *flags, devices=2))
    assert statuses == [0, 0], said
    pipeline.run(synthesis_config(devices=4, **changes), tmp_path / 'one')
    for number in range(2):
        pools = [ImagePool(tmp_path / name / 'pool') for name in ('one', 'run')]
        one, two = (pool.read(number) for pool in pools)
        np.testing.assert_array_equal(two['labels'], one['labels'])
        # Adam divides by the size of a gradient that is rounded differently; hardly any pixel feels it. A student that
        # learned with other rounding, against which later batches are made, adds its own.
        difference = np.abs(two['images'].astype(int) - one['images'])
        assert np.quantile(difference, 0.99 if method == 'deepinversion' else 0.9) <= 1
        losses = [pool.sidecar(number)['curve']['loss'] for pool in pools]
        np.testing.assert_allclose(*losses, rtol=1e-3 if method == 'deepinversion' else 1e-2)


TRAINING = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import jax, numpy as np
from smoke import smoke_config
from dvinv.inversion.invert import BatchCheckpoint
from dvinv.networks import Classifier, create
from dvinv.config import TrainingSettings
from dvinv.training.step import Rounds
from dvinv.runtime import devices
from dvinv.runtime.devices import make_mesh
from dvinv.synthesis.pools import BatchCheckpoints
from dvinv.teacher.task import supervised
from dvinv.training.step import TrainJob, TrainStep

class Counted:
    def __init__(self, array): self.array, self.read = array, []
    def __getitem__(self, rows):
        self.read.append(len(rows))
        return self.array[rows]

with devices.joined(None, *{joined!r}):
    rng = np.random.default_rng(0)
    images = Counted(rng.integers(0, 256, (64, 8, 8, 1), np.uint8))
    labels = rng.integers(0, 10, 64).astype(np.int32)
    like = Classifier(None, None, (8, 8, 1), 10, (0.5,), (0.5,))
    recipe = TrainingSettings(updates=5, batch_size=16, learning_rate=0.01, warmup=0)
    job = TrainJob(recipe, supervised(0.0), Rounds(64))
    step = TrainStep(create('small_convnet', 10, 0.25), job, like, make_mesh(0, of_all=True))
    state = step.place(step.initial_state(jax.random.key(0)))
    step.batches.load(images, labels)
    losses, key = [], step.place(jax.random.key(1))
    for chosen in step.batches.each([np.arange(16, dtype=np.int32) + 8 * i for i in range(5)]):
        state, loss = step(state, chosen, key)
        losses.append(float(loss))
    batches, index = BatchCheckpoints(Path({folder!r}), 'teacher'), jax.process_index()
    for iterations in range(1, 4 if index else 9):  # not as many in each process: none waits for another
        state = [np.full((4, 100), index, np.float32), np.arange(iterations, dtype=np.int32), np.array(index, np.int32)]
        batches.save(index, BatchCheckpoint(iterations, state, {{'loss': np.full(iterations, index, np.float32)}}))
        assert batches.load(index).iterations == iterations
    devices.meet('saved')
    assert [batches.load(i).state[2] for i in range({count})] == [*range({count})]
    held = sum(shard.data.shape[0] for shard in chosen[0].addressable_shards) if {count} > 1 else 16
    print(json.dumps({{'losses': losses, 'read': images.read, 'held': held}}))
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(what two processes print that train and save together, what one prints, the folder where the two have saved)."""

    def outputs(count, folder):
        port = _free_port()
        found = []
        for index in range(count):
            joined = (f'127.0.0.1:{port}', count, index) if count > 1 else ()
            fields = {'tests': str(Path(__file__).parents[1]), 'joined': joined, 'count': count, 'folder': str(folder)}
            code = 'import json\n' + TRAINING.format(**fields)
            environment = {**os.environ, **THREADS, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(4 // count)}
            found.append(subprocess.Popen([sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in found]
        assert [process.returncode for process in found] == [0] * count, said
        return [json.loads(next(line for line in text.splitlines() if line.startswith('{'))) for text in said]

    folder = tmp_path_factory.mktemp('saved')
    return outputs(2, folder), outputs(1, tmp_path_factory.mktemp('alone')), folder


def test_each_process_reads_its_part_of_a_batch_and_the_losses_are_those_of_one(trained):
    (first, second), (alone,), _ = trained
    assert first['losses'] == second['losses']
    assert first['read'] == second['read'] == [8] * 5
    assert first['held'] == second['held'] == 8
    np.testing.assert_allclose(first['losses'], alone['losses'], rtol=1e-5)


def test_each_process_saves_its_batches_and_another_number_of_processes_loads_them(trained):
    batches = BatchCheckpoints(trained[2], 'teacher')
    assert batches.numbers() == [0, 1]
    for index, iterations in enumerate((8, 3)):
        batch = batches.load(index)
        assert batch.iterations == iterations
        expected = [np.full((4, 100), index, np.float32), np.arange(iterations, dtype=np.int32), np.array(index, np.int32)]
        for found, leaf in zip(batch.state, expected, strict=True):
            np.testing.assert_array_equal(found, leaf, strict=True)
        np.testing.assert_array_equal(batch.metrics['loss'], np.full(iterations, index, np.float32), strict=True)


@pytest.mark.parametrize('index', [0, 1])
def test_a_process_that_waits_in_vain_for_the_others_ends_with_a_sentence(index):
    wait = f'devices.JOIN = 1\nwith devices.joined(None, "127.0.0.1:{_free_port()}", 2, {index}): pass'
    ended = subprocess.run(
        [sys.executable, '-c', f'from dvinv.runtime import devices\n{wait}'], capture_output=True, text=True
    )
    assert ended.returncode == devices.LOST
    assert 'dvinv: Waited 1 s for all processes to start.' in ended.stderr


# What needs no other process


SLURM = {'SLURM_PROCID': '3', 'SLURM_STEP_NUM_TASKS': '4'}


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, False),
        (SLURM, True),
        ({'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, False),
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'}, False),  # the batch script itself: srun started nobody
        ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
        ({'TPU_WORKER_HOSTNAMES': '10.0.0.2,10.0.0.3'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ],
)
def test_a_launcher_tells_that_there_are_several(monkeypatch, environment, expected):
    for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert devices._several(None, '', 0, -1) == expected
    assert not devices._several(False, '', 0, -1)
    assert devices._several(True, '', 0, -1)
    assert not devices._several(None, 'host:1', 1, 0)


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, True),
        ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, True),
        ({'SLURM_STEP_TASKS_PER_NODE': '4(x2)'}, False),
        ({'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}, False),
    ],
)
def test_one_process_a_host_has_all_devices(environment, expected):
    assert devices._one_a_host(environment) == expected


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('', 2, 0), "--coordinator is '', --num_processes 2 and --process_id 0; give all three"),
        (('host:1', 0, 0), 'give all three'),
        (('host:1', 2, -1), 'give all three'),
        (('host', 2, 0), "--coordinator is 'host'; it must be host:port"),
        (('host:1', 2, 2), '--process_id is 2, but --num_processes is 2'),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(DvinvError, match=message):
        devices._several(None, *flags)


def test_processes_that_jax_does_not_find_are_told(monkeypatch):
    def initialize(*_, **__):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(devices.jax.distributed, 'initialize', initialize)
    with pytest.raises(DvinvError, match='nothing tells JAX where they are'), devices.joined(True):
        pass


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as number 1 of two; `said` are the values that process 0 broadcasts, in turn, as JSON knows them."""

    def second_of_two(*said):
        messages = [np.frombuffer(json.dumps(value).encode(), np.uint8) for value in said]
        answers = iter([part for message in messages for part in (np.int32(len(message)), message)])
        monkeypatch.setattr(devices.jax, 'process_count', lambda: 2)
        monkeypatch.setattr(devices.jax, 'process_index', lambda: 1)
        monkeypatch.setattr(devices.multihost_utils, 'broadcast_one_to_all', lambda value: next(answers))

    return second_of_two


@pytest.mark.parametrize(
    ('error', 'sentence', 'status'),
    [
        (DvinvError('The disk is full.'), 'process 1: The disk is full.', 1),
        (KeyError('a bug'), 'process 1 has failed.', 1),
        (
            RuntimeError('Gloo all-reduce failed: Connection closed by peer\nmore'),
            'Another process of the run has ended, and says why (Gloo all-reduce failed: Connection closed by peer).',
            devices.LOST,
        ),
    ],
)
def test_a_process_that_fails_says_which_one_it_is(second_of_two, monkeypatch, error, sentence, status):
    def end(*said):
        raise SystemExit(said)

    second_of_two()
    monkeypatch.setattr(devices, '_join', lambda *_: None)
    monkeypatch.setattr(devices, '_end', end)
    with pytest.raises(SystemExit) as ended, devices.joined(None, 'host:1', 2, 1):
        raise error
    assert ended.value.code == (sentence, status)


def test_process_0_decides_for_all(second_of_two):
    assert devices.decide(lambda: [1, 'a'], 'this') == [1, 'a']
    second_of_two({'value': [2, 'b']}, {'error': 'The disk is full.'})
    assert devices.decide(lambda: [1, 'a'], 'this') == [2, 'b']
    with pytest.raises(DvinvError, match='The disk is full'):
        devices.decide(lambda: None, 'this')


def test_another_config_or_version_on_another_process_is_refused_by_name(second_of_two, monkeypatch):
    second_of_two({'value': {'seed': 0, 'jax': '0.1', 'same': 1}})
    monkeypatch.setattr(devices.multihost_utils, 'process_allgather', lambda differs: np.array([False, differs]))
    with pytest.raises(
        DvinvError, match=r"differ: jax \('0\.1' in process 0, '0\.2' here\), seed \(0 in process 0, 1 here\)\."
    ):
        devices.refuse_differing({'seed': 1, 'jax': '0.2', 'same': 1}, 'configs and versions')
    second_of_two({'value': {'seed': 0}}, {'value': {'seed': 0}})
    devices.refuse_differing({'seed': 0}, 'configs')
    monkeypatch.setattr(devices.multihost_utils, 'process_allgather', lambda differs: np.array([False, differs, True]))
    with pytest.raises(DvinvError, match='The configs of the processes differ: another process says how'):
        devices.refuse_differing({'seed': 0}, 'configs')


def test_a_wait_that_takes_too_long_ends_the_process(capfd):
    code = "with devices._time_limit('the clock', 0.1):\n import time; time.sleep(60)"
    ended = subprocess.run([sys.executable, '-c', f'from dvinv.runtime import devices\n{code}'], capture_output=True)
    assert ended.returncode == devices.LOST
    assert b'Waited 0 s for the clock.' in ended.stderr


def test_only_process_0_writes_files_of_the_run(second_of_two, tmp_path):
    second_of_two()
    Metrics(tmp_path / 'metrics.jsonl').append('teacher', 'teacher', [{'step': 1, 'loss': 0.5}])
    processes_own = ImagePool(tmp_path / 'pool')
    processes_own.write(0, np.zeros((1, 2, 2, 1)), np.zeros(1), np.zeros((1, 2)), {})
    assert {path.name for path in tmp_path.rglob('*')} == {'pool', 'shard-000000.npz', 'shard-000000.json'}


def test_two_runs_in_one_work_directory_are_refused(tmp_path):
    config = ml_collections.ConfigDict({'seed': 0})
    first = Workdir(tmp_path, parse(config))
    with pytest.raises(DvinvError, match=f'Another run is under way in {tmp_path}'):
        Workdir(tmp_path, parse(config))
    first.close()
    Workdir(tmp_path, parse(config)).close()


def test_a_batch_that_all_devices_do_not_divide_is_refused(tmp_path):
    with pytest.raises(DvinvError, match=r'synthesis.batch_size is 20, which 8 devices do not divide'):
        pipeline.run(synthesis_config(bn_stats='global'), tmp_path)
    with pytest.raises(DvinvError, match='batch'):
        pipeline.run(smoke_config(devices=3, bn_stats='global', tasks=('synthesis',)), tmp_path)
