"""metrics.jsonl: what is kept and cut."""

from pathlib import Path

import pytest

from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Metrics


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
    before = path.read_bytes()
    for look in (
        lambda: [*metrics.lines('teacher', 'student')],
        lambda: metrics.cut('teacher', 'teacher', 15),
        lambda: metrics.cut('teacher', 'teacher', 5),  # what comes before it is to go
    ):
        with pytest.raises(DvinvError, match=r"metrics\.jsonl holds a line that is damaged \('rub\ufffdbish'\); delete"):
            look()
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_full_disk_is_told():
    with pytest.raises(DvinvError, match='The disk is full: /dev/full could not be written'):
        Metrics(Path('/dev/full')).append('teacher', 'teacher', [{'step': 1, 'loss': 0.5}])


def test_no_metrics_yet_is_no_error(tmp_path):
    metrics = Metrics(tmp_path / 'metrics.jsonl')
    metrics.cut('teacher', 'teacher', 0)
    assert [*metrics.lines('teacher', 'teacher')] == []
    assert not [*tmp_path.iterdir()]
