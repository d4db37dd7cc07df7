"""Several processes, one pool: the bytes are those of one process, whoever dies meanwhile."""

import concurrent.futures
import contextlib
import signal
import time

import factories
import numpy as np
import pytest
from smoke import flip, lasting, smoke_config, synthesis_config

from dvinv import pipeline, seeds, worker
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.runtime import mistakes, waiting
from dvinv.runtime.processes import Processes
from dvinv.runtime.workdir import Workdir
from dvinv.synthesizer import fill_pool

COUNT = 2
# XLA splits some sums by the number of its threads, which are as many as there are devices or cores, or NPROC.
THREADS = {'NPROC': '8'}
FLAGS = (
    '--config.verifier.network=',
    '--config.synthesis.images=160',
    '--config.teacher.network=small_convnet',
    '--config.teacher.training.updates=60',
    "--config.tasks=('teacher','synthesis')",
)


@pytest.fixture
def begin(start, tmp_path):
    """`begin(index)`: a process of two, with four devices, on tmp_path/'run'. None outlives the test."""
    with contextlib.ExitStack() as stack:

        def begin(index):
            more = {**THREADS, 'JAX_NUM_CPU_DEVICES': '4', 'DVINV_PROCESS': str(index), 'DVINV_PROCESSES': str(COUNT)}
            process = stack.enter_context(start('--workdir', tmp_path / 'run', *FLAGS, more=more))
            stack.callback(process.kill)
            return process

        yield begin


def _until(there, process):
    while not there():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def test_two_processes_that_die_and_come_back_make_the_pool_of_one(start, begin, tmp_path):
    run = tmp_path / 'run'
    helper, leader = begin(1), begin(0)
    _until((run / 'checkpoints' / 'teacher' / '000000010.json').exists, leader)
    leader.send_signal(signal.SIGTERM)
    assert leader.wait() == 143
    assert 'SIGTERM: all is saved' in leader.stderr.read()
    assert helper.poll() is None  # it waits for the teacher
    leader = begin(0)
    _until((run / 'networks' / 'teacher.safetensors').exists, leader)
    helper.kill()
    helper.wait()
    helper = begin(1)
    (_, told), (_, err) = helper.communicate(), leader.communicate()
    assert (helper.returncode, leader.returncode) == (0, 0), told + err
    assert 'process 1: its share is done (4 batches now)' in told

    one = tmp_path / 'one'
    with start('--workdir', one, *FLAGS, more=THREADS) as process:  # eight devices
        _, err = process.communicate()
    assert process.returncode == 0, err
    expected, found = lasting(one), lasting(run)
    assert sum(name.startswith('pool') for name in expected) == 16
    assert [name for name in {*expected, *found} if expected.get(name) != found.get(name)] == []
    assert not [*run.glob('metrics-*')]


# In one process of the system, one thread each


@pytest.fixture
def threads(monkeypatch):
    """`threads(config, workdir, count) -> results of the leader`."""
    monkeypatch.setattr(waiting, 'POLL', 0.02)

    def threads(config, workdir, count=COUNT):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            running = [pool.submit(pipeline.run, config, workdir, Processes(index, count)) for index in range(count)]
            results = [future.result() for future in running]  # a mistake of the leader first
            return results[0]

    return threads


def _config(**changes):
    return synthesis_config(**{'devices': 1, **changes})


def test_an_adaptive_pool_is_that_of_one_process(threads, tmp_path):
    config = _config(
        synthesis__method='adaptive',
        synthesis__batches_per_round=2,
        synthesis__weights__competition=10.0,
        distillation__updates_per_round=4,
        student__network='small_convnet',
        student__width=0.1,
    )
    alone = pipeline.run(config, tmp_path / 'alone')
    together = threads(config, tmp_path / 'together')
    assert together['synthesis']['rounds'] == alone['synthesis']['rounds'] == 2
    assert lasting(tmp_path / 'together') == lasting(tmp_path / 'alone')
    assert not [*(tmp_path / 'together' / 'checkpoints' / 'rounds').iterdir()]


def test_what_ends_one_process_ends_those_that_wait_for_it(threads, tmp_path, monkeypatch):
    def out_of_memory(config, workdir):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(worker, 'run', out_of_memory)
    monkeypatch.setattr(mistakes, 'PATIENCE', 0.0)  # whichever comes first
    with pytest.raises(DvinvError, match=r'Process 1 has ended with a mistake: RuntimeError: out of memory'):
        threads(_config(), tmp_path)


def test_what_is_damaged_is_made_anew_by_its_owner_and_when_that_is_gone_by_the_leader(threads, tmp_path, capsys):
    run, config = tmp_path / 'run', _config()
    threads(config, run)
    expected = lasting(run)
    (run / 'results.json').unlink()
    pool = run / 'pool'
    flip(pool / 'shard-000000.npz')
    (pool / 'shard-000001.npz').write_bytes((pool / 'shard-000001.npz').read_bytes()[:-20])
    (pool / 'shard-000002.npz').unlink()
    flip(pool / 'shard-000003.json')
    for index in (1, 0):
        pipeline.run(config, run, Processes(index, COUNT))
    told, found = capsys.readouterr().err, lasting(run)
    for name in ('0.npz is damaged', '1.npz is damaged', '2.npz is missing', '3.json is damaged'):
        assert f'shard-00000{name}' in told
    kept = {name: found.pop(name) for name in [*found] if 'quarantine' in name}
    assert len(kept) == 7
    for content in (expected, found):
        content['metrics.jsonl'] = sorted(content['metrics.jsonl'].splitlines())  # of what was made anew: at the end
    assert found == expected


@pytest.mark.parametrize(('index', 'read'), [(0, [0]), (1, [1]), (2, [0])])  # the third has made none yet
def test_a_pool_of_another_teacher_is_refused_by_each_process(tmp_path, monkeypatch, index, read):
    for number in range(2):
        ImagePool(tmp_path / 'pool', 'a' * 64).write(number, np.zeros((2, 8, 8, 1)), np.zeros(2), np.zeros((2, 10)), {})
    asked, notes = [], ImagePool.notes
    monkeypatch.setattr(ImagePool, 'notes', lambda pool, number: asked.append(number) or notes(pool, number))
    config, teacher, mine = _config(synthesis__images=120), factories.own(), Processes(index, 3)
    pool = ImagePool(tmp_path / 'pool', teacher.digest())
    with (
        contextlib.closing(Workdir(tmp_path / 'run', config, mine)) as workdir,
        pytest.raises(DvinvError, match='was made from another teacher'),
    ):
        fill_pool(config, workdir, teacher, pool, 'noise', 'synthesis', 'noise', mine)
    assert asked == read


def test_more_processes_than_batches_and_a_pool_that_is_there(threads, tmp_path):
    config = _config(synthesis__images=40, synthesis__controls=('noise',))
    assert threads(config, tmp_path / 'run', 3)['synthesis']['batches'] == 2
    assert ImagePool(tmp_path / 'run' / 'controls' / 'noise').numbers() == [0, 1]
    assert pipeline.run(_config(pool=str(tmp_path / 'run' / 'pool')), tmp_path / 'other', Processes(1, 2)) == {}


@pytest.mark.parametrize(('index', 'heard'), [(0, 0), (1, 1)])
def test_a_mistake_with_one_seed_is_heard_by_who_is_at_the_next(tmp_path, monkeypatch, index, heard):
    config = smoke_config()
    ahead = Workdir(tmp_path / 'seed-1', config, Processes(1 - index, 2))
    monkeypatch.setattr(pipeline, 'check', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seeds.run(config, tmp_path, 2, Processes(index, 2))
    assert ahead.mistakes.heard() == {heard: 'ZeroDivisionError: division by zero'}
    monkeypatch.setattr(pipeline, 'run', lambda *_: {})
    seeds.run(config, tmp_path, 2, Processes(index, 2))
    assert ahead.mistakes.heard() == {}
    ahead.close()


def test_of_several_seeds_the_leader_writes_the_summary(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, 'run', lambda config, workdir, mine: asked.append((workdir.name, mine)) or {})
    for index in (1, 0):
        assert not (tmp_path / 'results.json').exists()
        seeds.run(smoke_config(), tmp_path, 2, Processes(index, 2))
    assert (tmp_path / 'results.json').exists()
    assert (tmp_path / 'report.html').exists()
    assert asked == [(f'seed-{seed}', Processes(index, 2)) for index in (1, 0) for seed in (0, 1)]
