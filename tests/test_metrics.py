"""metrics.jsonl: what is kept, cut and gathered, and that none of it holds the lines in memory."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from dvinv.errors import DvinvError
from dvinv.runtime.metrics import Metrics

MADE = 'synthesis', 'deepinversion'


@pytest.fixture
def metrics(tmp_path):
    metrics = Metrics(tmp_path / 'metrics.jsonl')
    for series in ('teacher', 'verifier'):
        metrics.append('teacher', series, [{'step': step, 'loss': step / 2} for step in (5, 10, 15)])
    return metrics


def _steps(metrics, series):
    return [line['step'] for line in metrics.lines('teacher', series)]


def test_a_line_tells_task_series_step_and_values(metrics):
    assert next(metrics.lines('teacher', 'verifier')) == {'task': 'teacher', 'series': 'verifier', 'step': 5, 'loss': 2.5}


def test_a_series_is_cut_and_the_others_are_not(metrics):
    metrics.cut('teacher', 'teacher', 10)
    assert (_steps(metrics, 'teacher'), _steps(metrics, 'verifier')) == ([5, 10], [5, 10, 15])


def test_a_cut_of_nothing_leaves_the_file(metrics, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    before = path.read_bytes(), path.stat().st_ino
    metrics.cut('teacher', 'verifier', 15)
    metrics.cut('synthesis', 'deepinversion', 0)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_a_half_written_last_line_is_dropped(metrics, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert _steps(metrics, 'verifier') == [5, 10]
    metrics.cut('synthesis', 'deepinversion', 0)
    assert path.read_text() == ''.join(whole.splitlines(keepends=True)[:5])


def test_a_line_that_is_no_measurement_is_shown(metrics, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    with open(path, 'ab') as file:
        file.write(b'rub\xffbish\n')
    before, other = path.read_bytes(), Metrics(tmp_path / 'metrics-1.jsonl')
    other.append(*MADE, [{'step': 0, 'batch': 1}])
    for look in (
        lambda: [*metrics.lines(*MADE)],
        lambda: metrics.cut('teacher', 'teacher', 15),
        lambda: metrics.cut('teacher', 'teacher', 5),  # what comes before it is to go
        lambda: metrics.gather([other], *MADE, [1]),
        lambda: other.gather([metrics], *MADE, [1]),
    ):
        with pytest.raises(DvinvError, match=r"metrics\.jsonl holds a line that is damaged \('rub\ufffdbish'\); delete"):
            look()
    assert path.read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_full_disk_is_told():
    with pytest.raises(DvinvError, match='The disk is full: /dev/full could not be written'):
        Metrics(Path('/dev/full')).append('teacher', 'teacher', [{'step': 1, 'loss': 0.5}])


def test_no_metrics_yet_is_no_error(tmp_path):
    metrics = Metrics(tmp_path / 'metrics.jsonl')
    metrics.cut('teacher', 'teacher', 0)
    metrics.gather([Metrics(tmp_path / 'metrics-1.jsonl')], *MADE, [0, 1])
    assert [*metrics.lines('teacher', 'teacher')] == []
    assert not [*tmp_path.iterdir()]


# Several processes


def _block(batch, steps, series='deepinversion', value=0.1):
    return [{'task': 'synthesis', 'series': series, 'step': step, 'batch': batch, 'loss': value} for step in steps]


def _write(path, lines, cut=0):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    path.write_text(text[: len(text) - cut])


def test_what_others_measured_makes_the_file_of_one_process(tmp_path):
    own, first, second = files = [tmp_path / name for name in ('metrics.jsonl', 'metrics-1.jsonl', 'metrics-2.jsonl')]
    training = [{'task': 'teacher', 'series': 'teacher', 'step': 50, 'loss': 0.25}]
    _write(own, training + _block(0, [0, 2, 4]) + _block(3, [0, 2, 4]))
    _write(first, _block(4, [0, 2, 4]) + _block(1, [0, 2, 4]) + _block(9, [0, 2, 4]), cut=5)
    _write(second, _block(1, [0, 2, 4]) + _block(2, [0, 2, 4]))
    mine, *others = map(Metrics, files)
    mine.gather(others, *MADE, [*range(5)])
    alone = tmp_path / 'alone'
    _write(alone, training + [line for batch in range(5) for line in _block(batch, [0, 2, 4])])
    assert own.read_bytes() == alone.read_bytes()
    before = own.stat().st_ino
    mine.gather(others, *MADE, [*range(5)])
    assert own.stat().st_ino == before  # nothing new


def _gathered(own, others, batches):
    """What `gather` leaves, lines from lines: by (batch, step), this process's own first, then the last that was read."""

    def among(line):
        return (line['task'], line['series']) == MADE and line['batch'] in batches

    def of(lines):
        return {(line['batch'], line['step']): line for line in lines if among(line)}

    mine, found = of(own), {}
    for lines in others:
        found |= of(lines)
    if found.keys() <= mine.keys():
        return None
    found |= mine
    return [line for line in own if not among(line)] + [found[key] for key in sorted(found)]


@pytest.mark.parametrize('seed', range(4))
def test_blocks_in_any_disorder_are_gathered_line_by_line(tmp_path, seed):
    """Parts of batches, batches twice, in several files and in wrong order, other series between, last lines cut short."""
    chance, changed = random.Random(seed), 0
    files = [tmp_path / f'{number}.jsonl' for number in range(3)]
    for _ in range(50):
        read = []
        for path in files:
            lines = []
            for _ in range(chance.randrange(5)):
                steps = chance.sample(range(3), chance.randint(1, 3))
                series = chance.choice(['deepinversion'] * 3 + ['noise'])
                lines += _block(chance.randrange(4), steps, series, value=chance.random())
            cut = chance.choice([0, 0, 7]) if lines else 0
            _write(path, lines, cut)
            read.append(lines[:-1] if cut else lines)
        before, expected = files[0].read_bytes(), _gathered(read[0], read[1:], {0, 1, 2})
        own, *others = map(Metrics, files)
        own.gather(others, *MADE, [0, 1, 2])
        if expected is None:
            assert files[0].read_bytes() == before
        else:
            changed += 1
            assert files[0].read_text() == ''.join(json.dumps(line) + '\n' for line in expected)
    assert 10 < changed < 50


def test_lines_are_not_held_in_memory(tmp_path):
    own, other = (Metrics(tmp_path / name) for name in ('metrics.jsonl', 'metrics-1.jsonl'))
    for path, batches in ((tmp_path / 'metrics.jsonl', range(0, 600, 2)), (tmp_path / 'metrics-1.jsonl', range(1, 600, 2))):
        _write(path, [line for batch in batches for line in _block(batch, range(30))])
    tracemalloc.start()
    try:
        own.gather([other], *MADE, [*range(600)])
        own.keep(*MADE, lambda line: line['batch'] < 599)
        assert max(line['batch'] for line in own.lines(*MADE)) == 598
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / 'metrics.jsonl').stat().st_size / 3
