"""SIGTERM and Ctrl-C in the middle of batches: what is under way is saved, and goes on to the bit."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys

import filelock
import jax
import ml_collections
import numpy as np
import pytest
from smoke import flip, synthesis_config

from dvinv import balanced_labels
from dvinv.config import InversionConfig, Stage
from dvinv.data.pool import ImagePool
from dvinv.inversion import make_inverter
from dvinv.inversion.invert import BatchCheckpoint
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime import preemption
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.errors import DvinvError
from dvinv.synthesis import task as synthesis
from dvinv.synthesis.pools import BatchCheckpoints, open_pool
from dvinv.synthesis.synthesizer import Synthesizer, in_words

BATCH = 8
STAGES = Stage(4, 0.1, jitter=2, flip=True, warmup=2, schedule='cosine'), Stage(3, 0.05, noise=0.1)


def test_the_thread_of_an_earlier_installation_ends():
    listening, bell = socket.socketpair()
    bell.close()
    preemption._listen(listening, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(('bn_stats', 'dispatch'), [('device', 1), ('device', 3), ('global', 1)])
def test_a_batch_goes_on_from_any_dispatch(teacher, bn_stats, dispatch):
    batches = 2 if bn_stats == 'device' else 1
    config = InversionConfig(STAGES, bn_stats=bn_stats, iterations_per_dispatch=dispatch)
    run = make_inverter(teacher, config, make_mesh(2))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(np.arange(batches))
    labels, taken = np.stack([balanced_labels(i, BATCH, 3) for i in range(batches)]), []
    whole = run(keys, labels, pause=lambda take: taken.append(take()))
    assert [states[0].iterations for states in taken] == ([1, 2, 3, 4, 5, 6] if dispatch == 1 else [3, 4])
    assert {len(states) for states in taken} == {batches}
    for begun in taken:
        told = []
        result = run(keys, labels, on_chunk=lambda done, _, told=told: told.append(done), begun=begun)
        assert result.images.tobytes() == whole.images.tobytes()
        assert {term: values.tolist() for term, values in result.metrics.items()} == {
            term: values.tolist() for term, values in whole.metrics.items()
        }
        assert told[-1] == 7


# A run


def run_config(**changes):
    """Four batches of a tiny teacher's, in nine iterations."""
    config = synthesis_config(**{'devices': 4, 'logging__iterations': 1, **changes})
    config.synthesis.stages = (ml_collections.ConfigDict({**config.synthesis.stages[0], 'iterations': 9}),)
    return config


def content(workdir):
    return {path.name: path.read_bytes() for path in (workdir / 'pool').iterdir()}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    pipeline.run(run_config(), workdir)
    return workdir


@pytest.fixture
def pauses(monkeypatch):
    """Lists the batches of each pause; `pauses.before(n, what)`: what happens at pause number n, counted from now."""

    class Pauses(list):
        at, what = 0, None

        def before(self, number, what):
            self.clear()
            self.at, self.what = number, what

    pauses, original = Pauses(), Synthesizer._pause

    def pause(self, numbers, *args):
        pauses.append(numbers)
        if len(pauses) == pauses.at:
            pauses.what()
        original(self, numbers, *args)

    monkeypatch.setattr(Synthesizer, '_pause', pause)
    return pauses


def test_what_is_under_way_is_saved_and_goes_on(undisturbed, tmp_path, monkeypatch, pauses, capsys):
    """Saved by the clock, then killed; saved at SIGTERM; gone on with other devices, but for a state that is damaged."""
    run, saved = tmp_path / 'run', tmp_path / 'run' / 'checkpoints' / 'synthesis-deepinversion'
    batches = BatchCheckpoints(saved, pipeline.validated(run_config()).planned_teacher.digest())

    def kill():
        raise KeyboardInterrupt

    pauses.before(4, kill)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(run_config(logging__checkpoint_minutes=1e-9), run)
    assert [batches.load(number).iterations for number in range(4)] == [3] * 4

    with monkeypatch.context() as patch:
        pauses.before(3, lambda: patch.setattr(preemption, '_received', signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            pipeline.run(run_config(), run)
    assert ended.value.code == 143
    said = 'SIGTERM: of 4 batches of deepinversion 0 are finished and 4 under way saved at iteration 6 of 9; the same'
    assert said in capsys.readouterr().err
    assert [batches.load(number).iterations for number in range(4)] == [6] * 4

    flip(saved / 'batch-000003' / '000000006' / '_METADATA')
    pauses.before(0, None)
    pipeline.run(run_config(devices=2), run)
    assert pauses == [[0, 1]] * 2 + [[2]] * 2 + [[3]] * 8
    assert content(run) == content(undisturbed)
    assert not [*saved.iterdir()]


def test_a_resume_reads_every_sidecar_once(undisturbed, tmp_path, monkeypatch):
    run, config = shutil.copytree(undisturbed, tmp_path / 'run'), run_config()
    (run / 'pool' / 'shard-000003.json').unlink()
    read, original = [], ImagePool.sidecar
    monkeypatch.setattr(ImagePool, 'sidecar', lambda pool, number: read.append(number) or original(pool, number))
    resumed = pipeline.validated(config, run)
    with contextlib.closing(resumed.open_workdir()):
        synthesis._fill(resumed, open_pool(resumed))
    assert read == [0, 1, 2]
    assert content(run) == content(undisturbed)


def test_a_damaged_state_and_one_of_another_teacher_are_passed_over(tmp_path):
    batches, other = BatchCheckpoints(tmp_path, 'teacher'), BatchCheckpoints(tmp_path, 'another')
    state, student = [np.arange(6.0).reshape(2, 3), np.int32(7)], {'params': {'kernel': np.ones(3)}}
    batches.save(3, BatchCheckpoint(2, state, {'loss': np.ones(2), 'feature': np.zeros(2)}), student)
    found = batches.load(3, student)
    assert (found.iterations, batches.numbers()) == (2, [3])
    assert [leaf.tolist() for leaf in found.state] == [leaf.tolist() for leaf in state]
    assert set(found.metrics) == {'loss', 'feature'}
    assert batches.load(3) is batches.load(4, student) is other.load(3, student) is None
    paths = [path for path in tmp_path.rglob('*') if path.is_file() and path.stat().st_size]
    assert len(paths) > 4
    for path in paths:
        flip(path, path.stat().st_size // 3)
        assert batches.load(3, student) is None
        flip(path, path.stat().st_size // 3)
    manifest = tmp_path / 'batch-000003' / '000000002.json'
    manifest.write_bytes(manifest.read_bytes()[:-50])
    assert batches.load(3, student) is None
    batches.save(3, BatchCheckpoint(2, state, {'loss': np.ones(2)}), student)  # in the place of the damaged one
    assert batches.load(3, student).iterations == 2
    batches.drop(3)
    assert not [*tmp_path.iterdir()]


def test_a_task_does_not_begin_after_sigterm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preemption, '_received', signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        pipeline.run(run_config(), tmp_path)
    assert ended.value.code == 143
    said = 'dvinv: SIGTERM: no task was under way, so nothing had to be saved; the same command goes on from here.\n'
    assert capsys.readouterr().err == said


def test_what_is_said_to_be_saved_of_batches(tmp_path, capsys):
    run = pipeline.validated(run_config(), tmp_path)
    run.open_workdir()
    synthesizer = Synthesizer(run, run.teacher, open_pool(run), 'noise', 'synthesis', 'noise')
    assert synthesizer._saved_clause(0) == 'no batch of noise was begun, so nothing had to be saved'
    synthesizer._finished = 3
    assert synthesizer._saved_clause(0) == 'of 4 batches of noise 3 are finished'
    assert synthesizer._saved_clause(1) == 'of 4 batches of noise 3 are finished and 1 under way saved'


def test_progress_names_the_batches_that_its_loss_is_of():
    assert [in_words(numbers, 8) for numbers in ([2], [4, 3], [0, 5, 2])] == [
        'batch 3 of 8',
        'batches 4 to 5 of 8',
        'batches 1, 3, 6 of 8',
    ]


def test_minutes_below_zero_are_refused(tmp_path):
    with pytest.raises(DvinvError, match=r'logging\.checkpoint_minutes is -1'):
        pipeline.run(run_config(logging__checkpoint_minutes=-1.0), tmp_path)


# Where nobody looks at the note

# As a compilation, it lets go of Python's lock, and a signal does not end it: a mutex is waited for that nobody unlocks.
WAITS = """import ctypes; c = ctypes.CDLL(None); mutex = ctypes.create_string_buffer(256)
c.pthread_mutex_init(mutex, None); c.pthread_mutex_lock(mutex); print("ready", flush=True); c.pthread_mutex_lock(mutex)"""
LOOKS = 'import time; print("ready", flush=True)\nwhile True: preemption.leave_if_asked(); time.sleep(0.01)'


def started(folder, code, grace=0.5, first=''):
    """A process that runs `first`, then `code` after `preemption.install`."""
    begin = f'{first}from pathlib import Path\nfrom dvinv.runtime import preemption\npreemption.HINT = 0.2\n'
    begin += 'import filelock\n'
    begin += f'preemption.install(grace={grace})\n'
    command = [sys.executable, '-c', begin + code.replace('{folder!r}', repr(str(folder)))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


SAVES = """import time; print("ready", flush=True)
while not preemption.asked(): time.sleep(0.01)
time.sleep(1.5); print("saved", flush=True)
preemption.leave_if_asked('3 of 5 are saved')"""


@pytest.mark.parametrize(
    ('number', 'code', 'heard', 'out'),
    [
        (signal.SIGTERM, WAITS, 'is in a long computation and ends now', ''),
        (
            signal.SIGTERM,
            f'filelock.FileLock(Path({{folder!r}}) / ".lock", timeout=0).acquire()\n{WAITS}',
            'is in a long computation and ends now',
            '',
        ),
        (signal.SIGTERM, LOOKS, 'SIGTERM: nothing under way had to be saved', ''),
        (signal.SIGTERM, SAVES, 'SIGTERM: 3 of 5 are saved; the same', 'saved\n'),
        (signal.SIGINT, LOOKS, 'Ctrl-C: nothing under way had to be saved; the same command goes on from here.', ''),
        (signal.SIGINT, f'preemption.install(0)\n{WAITS}', 'Ctrl-C: this process ends at once.', ''),
    ],
)
def test_a_signal_ends_a_process_that_cannot_look_and_waits_for_one_that_saves(tmp_path, number, code, heard, out):
    with started(tmp_path, code) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(number)
        answer = process.communicate(timeout=20)
    assert (process.returncode, answer[0]) == (128 + number, out)
    assert heard in answer[1]
    assert answer[1].count('\n') == 1
    filelock.FileLock(tmp_path / '.lock', timeout=0).acquire().lock.release()  # what it held is free


def test_a_second_ctrl_c_ends_a_process_at_once(tmp_path):
    with started(tmp_path, WAITS, grace=60.0) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGINT)
        assert 'Ctrl-C again ends it at once' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        answer = process.communicate(timeout=20)
    assert process.returncode == 130
    assert answer[1].startswith('dvinv: Ctrl-C again: this process ends at once')


def test_ctrl_c_stays_ignored_where_it_is(tmp_path):
    """A shell starts so what runs in its background."""
    code = 'import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)'
    with started(tmp_path, code, first='import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n') as process:
        assert process.stdout.read() == 'True\n'
