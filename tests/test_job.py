"""One batch split over several processes: they tell each other what is to be done, stand and fall together, and resume."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from smoke import synthesis_config

from dvinv import pipeline
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.inversion.invert import Unfinished
from dvinv.orders import _group, _message
from dvinv.runtime import job
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.meeting import Meeting
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.processes import Processes

COUNT, DEVICES, ITERATIONS = 2, 2, 20
FLAGS = (
    '--config.bn_stats=global',
    '--config.teacher.factory=factories:own',
    '--config.verifier.network=',
    '--config.distillation.controls=()',
    f'--config.synthesis.stages[0].iterations={ITERATIONS}',
    "--config.tasks=('synthesis',)",
)
OFTEN = '--config.logging.checkpoint_minutes=1e-9'  # every dispatch is saved


def _free_address():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{free.getsockname()[1]}'


@pytest.fixture
def begin(start):
    """`begin(workdir, *flags)`: the processes of a job, the leader first. None outlives the test."""
    with contextlib.ExitStack() as stack:

        def begin(workdir, *flags):
            processes, coordinator = [], _free_address()
            for index in range(COUNT):
                more = {'NPROC': '8', 'JAX_NUM_CPU_DEVICES': str(DEVICES), 'DVINV_COORDINATOR': coordinator}
                more |= {'DVINV_PROCESS': str(index), 'DVINV_PROCESSES': str(COUNT)}
                processes.append(stack.enter_context(start('--workdir', workdir, *FLAGS, *flags, more=more)))
                stack.callback(processes[-1].kill)
            return processes

        yield begin


def _until(path, processes):
    while not path.exists():
        assert all(process.poll() is None for process in processes), [process.stderr.read() for process in processes]
        time.sleep(0.002)


def test_two_processes_split_batches_and_resume_together(begin, tmp_path):
    """Of a job: SIGTERM to one in the middle of a batch, kill -9 of the leader in the middle of the next, then the end."""
    run, alone = tmp_path / 'run', tmp_path / 'alone'
    saved = run / 'checkpoints' / 'synthesis-deepinversion'
    leader, other = job_of_two = begin(run, OFTEN)
    _until(saved / 'batch-000000.state', job_of_two)
    other.send_signal(signal.SIGTERM)
    told = [process.communicate()[1] for process in job_of_two]
    assert [process.returncode for process in job_of_two] == [143, 143], told
    assert all('SIGTERM: all is saved' in text for text in told)

    leader, other = job_of_two = begin(run, OFTEN)
    _until(saved / 'batch-000001.state', job_of_two)
    leader.kill()
    other.communicate()
    assert other.returncode not in (0, 1, 143)  # to be started again

    job_of_two = begin(run)
    told = [process.communicate()[1] for process in job_of_two]
    assert [process.returncode for process in job_of_two] == [0, 0], told
    assert not [*saved.iterdir()]

    config = synthesis_config(bn_stats='global', devices=COUNT * DEVICES, synthesis__images=40)
    with config.unlocked():
        config.synthesis.stages[0].iterations = ITERATIONS
    pipeline.run(config, alone)
    expected, found = ([*Metrics(path / 'metrics.jsonl').lines('synthesis', 'deepinversion')] for path in (alone, run))
    assert [(line['batch'], line['step']) for line in found] == [(line['batch'], line['step']) for line in expected]
    for number in range(2):
        one, two = (ImagePool(path / 'pool').read(number) for path in (alone, run))
        np.testing.assert_array_equal(two['labels'], one['labels'])
        # Adam divides by the size of a gradient that is rounded differently; hardly any pixel feels it.
        difference = np.abs(two['images'].astype(int) - one['images'])
        assert np.quantile(difference, 0.99) <= 1


# What needs no other process


def test_all_hear_the_leader_and_the_most_urgent_wish():
    meeting = Meeting(make_mesh(4, joined=True), leader=True)
    assert [int(meeting.vote(wish)) for wish in (0, 2, 1)] == [0, 2, 1]
    message = bytes(range(256))
    assert [meeting.say(text) for text in (message, b'')] == [message, b'']


def test_a_batch_is_told_with_its_state():
    state = [np.float32([[-0.0, 1.5]]), np.int32(7)]
    ((number, begun),) = _group(_message([(300, Unfinished(2, state, {'loss': np.float32([3, 2])}))]))
    assert (number, begun.iterations, begun.metrics['loss'].tolist()) == (300, 2, [3, 2])
    assert [leaf.tobytes() for leaf in begun.state] == [leaf.tobytes() for leaf in state]
    assert _group(_message([(3, None)])) == [(3, None)]
    assert _message(None) == b''


ADAPTIVE = {
    'synthesis__method': 'adaptive',
    'synthesis__batches_per_round': 2,
    'synthesis__weights__competition': 10.0,
    'distillation__updates_per_round': 4,
}


@pytest.mark.parametrize(
    ('joined', 'changes', 'message'),
    [
        (False, {}, "bn_stats is 'global', .* of all 2 processes, but they are not joined"),
        (True, ADAPTIVE, "synthesis.method is 'adaptive', .* but there are 2"),
        (True, {}, 'synthesis.batch_size is 20, which 8 devices do not divide'),
    ],
)
def test_what_a_job_cannot_do_is_refused(tmp_path, joined, changes, message):
    config = synthesis_config(bn_stats='global', **changes)
    with pytest.raises(DvinvError, match=message):
        pipeline.run(config, tmp_path, Processes(0, 2, joined))
    told = set() if joined else {'.lock', '.processes', '.failed-0'}
    assert {path.name for path in tmp_path.iterdir()} == told


@pytest.mark.parametrize(
    ('address', 'message'),
    [('', 'nothing tells where process 0 is: set DVINV_COORDINATOR'), ('host', "DVINV_COORDINATOR is 'host'; it must be")],
)
def test_processes_that_cannot_meet_are_told(monkeypatch, address, message):
    def initialize(*_, **__):
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for name, value in (('DVINV_PROCESS', '1'), ('DVINV_PROCESSES', '2'), (job.ADDRESS, address)):
        monkeypatch.setenv(name, value)
    preempted = signal.getsignal(signal.SIGTERM)
    with pytest.raises(DvinvError, match=message), job.job(None, 'global'):
        pass
    assert signal.getsignal(signal.SIGTERM) == preempted
    with job.job(None, 'device') as mine:
        assert mine == Processes(1, 2)


@pytest.mark.parametrize('index', [0, 1])
def test_who_waits_in_vain_for_the_others_is_told(index):
    environment = {'DVINV_PROCESS': str(index), 'DVINV_PROCESSES': '2', job.ADDRESS: _free_address()}
    wait = "from dvinv.runtime import job\njob.JOIN = 1\nwith job.job(None, 'global'): pass"
    ended = subprocess.run([sys.executable, '-c', wait], env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == job.STATUS
    assert 'dvinv: Not all 2 processes of the run came within 1 seconds; start them all.' in ended.stderr
