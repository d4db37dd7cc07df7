"""Which of several processes this one is, and who may run in one work directory."""

import contextlib
import itertools
import types

import ml_collections
import numpy as np
import pytest

from dvinv import sharing
from dvinv.errors import DvinvError
from dvinv.runtime import mistakes, versions, waiting
from dvinv.runtime.claims import OccupiedError
from dvinv.runtime.mistakes import told
from dvinv.runtime.processes import ALONE, Processes, processes
from dvinv.runtime.waiting import wait_for
from dvinv.runtime.workdir import Workdir

CONFIG = ml_collections.ConfigDict({'seed': 0})
LEADER = Processes(0, 2)
SLURM = {'SLURM_PROCID': '3', 'SLURM_STEP_NUM_TASKS': '4'}
TPU = {'TPU_WORKER_ID': '1', 'TPU_WORKER_HOSTNAMES': '10.0.0.2,10.0.0.3'}


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, ALONE),
        ({'DVINV_PROCESS': '1', 'DVINV_PROCESSES': '3'}, Processes(1, 3)),
        ({'DVINV_PROCESS': '0', 'DVINV_PROCESSES': '2', **SLURM}, Processes(0, 2)),
        (SLURM, Processes(3, 4)),
        ({'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, ALONE),
        ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'}, ALONE),  # the batch script itself: srun started nobody
        (TPU, Processes(1, 2)),
        ({'TPU_WORKER_ID': '0', 'TPU_WORKER_HOSTNAMES': 'localhost'}, ALONE),
    ],
)
def test_the_environment_tells(environment, expected):
    assert processes(None, environment) == expected
    assert processes(False, environment) == ALONE


@pytest.mark.parametrize(
    ('environment', 'message'),
    [
        ({'DVINV_PROCESS': '1'}, 'DVINV_PROCESS is set, but DVINV_PROCESSES is not'),
        ({'DVINV_PROCESSES': '2'}, 'DVINV_PROCESSES is set, but DVINV_PROCESS is not'),
        ({'DVINV_PROCESS': '2', 'DVINV_PROCESSES': '2'}, 'DVINV_PROCESS is 2 and DVINV_PROCESSES makes 2 processes'),
        ({'DVINV_PROCESS': '-1', 'DVINV_PROCESSES': '2'}, 'at least 0 and below their number'),
        ({'DVINV_PROCESS': 'one', 'DVINV_PROCESSES': '2'}, "DVINV_PROCESS is 'one'; it must be a whole number"),
        ({**TPU, 'TPU_WORKER_ID': '2'}, 'TPU_WORKER_ID is 2'),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment, message):
    with pytest.raises(DvinvError, match=message):
        processes(None, environment)


def test_several_that_nobody_started_are_refused():
    assert processes(True, SLURM) == Processes(3, 4)
    with pytest.raises(DvinvError, match='--distributed was asked for, but nothing tells which'):
        processes(True, {})


@pytest.mark.parametrize('count', [1, 2, 3, 20])
def test_every_batch_is_made_by_one_process(count):
    shares = [Processes(index, count).share(range(10)) for index in range(count)]
    assert sorted(itertools.chain(*shares)) == [*range(10)]
    assert max(map(len, shares)) == Processes(0, count).most(10)


# One work directory


def refusal(path, mine):
    with pytest.raises(DvinvError) as caught:
        Workdir(path, CONFIG, mine)
    return str(caught.value)


def test_the_same_number_twice_and_another_count_are_refused(tmp_path):
    leader, other = (Workdir(tmp_path, CONFIG, Processes(index, 3)) for index in range(2))
    assert f'Another process 1 of 3 is running in {tmp_path}' in refusal(tmp_path, Processes(1, 3))
    assert f'Another process is running in {tmp_path}' in refusal(tmp_path, Processes(0, 3))
    assert f'A run of 3 processes is under way in {tmp_path}, and this one is of 4' in refusal(tmp_path, Processes(3, 4))
    leader.close()
    assert 'A run of 3 processes is under way' in refusal(tmp_path, ALONE)
    other.close()
    Workdir(tmp_path, CONFIG).close()
    Workdir(tmp_path, CONFIG, Processes(1, 2)).close()


def test_only_the_leader_writes_the_config(tmp_path):
    Workdir(tmp_path, CONFIG, Processes(1, 2)).close()
    assert not (tmp_path / 'config.json').exists()
    Workdir(tmp_path, CONFIG, Processes(0, 2)).close()
    with pytest.raises(DvinvError, match='another config: seed'):
        Workdir(tmp_path, ml_collections.ConfigDict({'seed': 1}), Processes(1, 2))


def test_who_comes_before_the_leader_with_another_config_is_refused_when_it_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, 'POLL', 0.001)
    other = ml_collections.ConfigDict({'seed': 1})
    early = Workdir(tmp_path, other, Processes(1, 2))
    Workdir(tmp_path, CONFIG, LEADER).close()
    with contextlib.closing(early), pytest.raises(DvinvError, match=r'another config: seed \(0 there, 1 here\)'):
        sharing.await_run(other, early)


def fail(folder, mine, error):
    with pytest.raises(type(error)), told([folder], mine):
        raise error


def test_who_waits_hears_of_a_mistake_in_another_process_but_not_of_an_old_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(waiting, 'POLL', 0.001)
    fail(tmp_path, LEADER, DvinvError('The disk is full.'))
    other = Workdir(tmp_path, CONFIG, Processes(1, 2))
    looks = iter([False, False, True])
    wait_for(other, lambda: next(looks), lambda: 'the teacher')
    assert capsys.readouterr().err == 'process 1: waiting for the teacher\n'
    fail(tmp_path, LEADER, RuntimeError('out of\nmemory'))
    with pytest.raises(DvinvError, match=r'Process 0 has ended with a mistake: RuntimeError: out of memory$'):
        wait_for(other, lambda: False, lambda: 'the teacher')
    fail(tmp_path, LEADER, DvinvError('Process 2 has ended with a mistake: The disk is full.'))
    with pytest.raises(DvinvError, match=r'^Process 2 has ended with a mistake: The disk is full\.'):
        wait_for(other, lambda: False, lambda: 'the teacher')
    Workdir(tmp_path, CONFIG, LEADER).close()  # came back: forgotten
    assert other.mistakes.heard() == {}
    other.close()


def test_word_that_stays_is_of_a_process_that_came_first_and_failed(tmp_path, monkeypatch):
    fail(tmp_path, Processes(1, 2), DvinvError('There is no teacher.npz.'))
    leader = Workdir(tmp_path, CONFIG, LEADER)
    assert leader.mistakes.heard() == {}
    monkeypatch.setattr(mistakes, 'PATIENCE', 0.0)
    assert leader.mistakes.heard() == {1: 'There is no teacher.npz.'}
    leader.close()


def test_nobody_is_told_of_who_is_alone_asked_to_leave_or_refused_as_a_second(tmp_path):
    fail(tmp_path / 'alone', ALONE, DvinvError('no'))
    fail(tmp_path / 'left', LEADER, SystemExit(143))
    assert [*tmp_path.iterdir()] == []
    leader = Workdir(tmp_path, CONFIG, LEADER)
    fail(tmp_path, LEADER, OccupiedError('Another process is running.'))
    fail(tmp_path, LEADER, DvinvError('what a second one runs into before it asks for its place'))
    other = Workdir(tmp_path, CONFIG, Processes(1, 2))
    assert other.mistakes.heard() == {}
    assert not [*tmp_path.glob('.failed-*')]
    for workdir in (leader, other):
        workdir.close()


def test_versions_that_are_not_the_leaders_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(waiting, 'POLL', 0.001)
    here = versions.versions()
    Workdir(tmp_path, CONFIG, LEADER).close()
    monkeypatch.setattr(versions, 'versions', lambda: {**here, 'jax': '0.1'})
    with contextlib.closing(Workdir(tmp_path, CONFIG, Processes(1, 2))) as early:
        Workdir(tmp_path, CONFIG, LEADER).close()
        assert f'goes on under other versions: jax {here["jax"]} there, 0.1 here' in capsys.readouterr().err
        sharing.await_run(CONFIG, early)  # the leader came back with the same
        monkeypatch.setattr(versions, 'versions', lambda: here)
        with pytest.raises(DvinvError, match=rf'than those of process 1: jax 0\.1 there, {here["jax"]} here'):
            sharing.await_run(CONFIG, early)
    monkeypatch.setattr(mistakes, 'PATIENCE', 0.0)
    late = Workdir(tmp_path, CONFIG, Processes(1, 2))
    with contextlib.closing(late), pytest.raises(DvinvError, match='install the same versions everywhere'):
        sharing.await_run(CONFIG, late)


def test_looks_that_take_long_are_few_but_a_mistake_is_heard_at_once(tmp_path, monkeypatch):
    now, looks = [0.0], []
    other = Workdir(tmp_path, CONFIG, Processes(1, 2))

    def look():
        looks.append(now[0])
        now[0] += 2.0
        return False

    def sleep(seconds):
        now[0] += seconds
        if len(looks) == 3 and now[0] > 50:
            fail(tmp_path, LEADER, DvinvError('The disk is full.'))

    monkeypatch.setattr(waiting, 'time', types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(DvinvError, match='The disk is full'):
        wait_for(other, look, lambda: 'the pool')
    assert np.diff(looks) == pytest.approx(2.0 / waiting.SHARE, abs=waiting.POLL)
    assert now[0] <= 50 + 2 * waiting.POLL
    other.close()
