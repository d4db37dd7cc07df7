"""Progress: a bar on a terminal, plain lines with a time of arrival elsewhere."""

import io
import re

import pytest

from dvinv.runtime.errors import CLEAR, say
from dvinv.runtime.progress import BAR, Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_tell_how_long_it_still_takes():
    stream, clock = io.StringIO(), Clock()
    with Progress('synthesis', 100, 'batches', done=20, stream=stream, clock=clock) as progress:
        clock.now = 5
        progress.update(30, loss=2.5)  # too soon for a line
        clock.now = 20
        progress.update(60, total_variation=1.25)  # 30 in 15 s, so the remaining 40 take 20 s
        clock.now = 40
        progress.update(100)
    assert stream.getvalue().splitlines() == [
        'synthesis: goes on after 20 of 100 batches',
        'synthesis: 60/100 batches, 20 s left, total variation 1.25',
        'synthesis: 100/100 batches',
        'synthesis: done, 100 batches in 40 s',
    ]


def test_neither_compilation_nor_what_was_done_before_counts_for_the_time_left():
    stream, clock = io.StringIO(), Clock()
    with Progress('synthesis', 1000, 'iterations', stream=stream, clock=clock) as progress:
        progress.pass_over(600)
        for done, seconds in ((610, 300), (620, 1), (630, 1), (640, 60), (650, 1)):  # two compilations
            clock.now += seconds
            progress.update(done)
        clock.now += 10
        progress.update(750)
    assert stream.getvalue().splitlines() == [
        'synthesis: goes on after 600 of 1,000 iterations',
        'synthesis: 610/1,000 iterations',
        'synthesis: 640/1,000 iterations, 36 s left',
        'synthesis: 750/1,000 iterations, 25 s left',
    ]


def test_what_takes_no_time_is_not_told_where_nobody_asked():
    stream, clock = io.StringIO(), Clock()
    for seconds in (9, 11):
        with Progress('check', 1, 'batches', brief=True, stream=stream, clock=clock) as progress:
            clock.now += seconds
            progress._last = clock.now
            progress.update(1)
    assert stream.getvalue() == 'check: done, 1 batches in 11 s\n'


@pytest.mark.parametrize('title', ['synthesis: deepinversion', 'distillation: student_of_65536'])
def test_a_bar_keeps_its_length_and_terms_that_do_not_fit_are_dropped(monkeypatch, title):
    monkeypatch.setenv('COLUMNS', '80')
    stream, clock = Terminal(), Clock()
    with Progress(title, 120_000, 'iterations', stream=stream, clock=clock) as progress:
        for done in (10_000, 20_000):
            clock.now += 1000
            progress.update(done, loss=1.0, cross_entropy=0.1234, feature=12.34, total_variation=0.5)
    drawn = [part.removesuffix('\r') for part in stream.getvalue().split(CLEAR) if '█' in part]
    assert len(drawn) == 2
    for line in drawn:
        assert len(line) < 80
        assert len(re.search('█+░+', line)[0]) >= BAR
    assert '20,000/120,000 iterations, 2 h 46 min left' in drawn[1]
    assert 'feature' not in drawn[1]
    assert title in drawn[0] or drawn[0].startswith('…')
    assert stream.getvalue().endswith(CLEAR)  # it did not come to its end


def test_a_bar_of_a_wide_terminal_has_the_terms_and_says_that_it_compiles(monkeypatch):
    monkeypatch.setenv('COLUMNS', '160')
    stream = Terminal()
    with Progress('synthesis', 4, 'updates', stream=stream) as progress:
        assert '0/4 updates, compiling' in stream.getvalue()
        progress.update(4, cross_entropy=2.0, loss=1.0)
    assert '4/4 updates, loss 1, cross entropy 2' in stream.getvalue()
    with Progress('synthesis', 8, 'iterations', stream=stream) as progress:
        progress.update(7, loss=1.0)
        progress.compiles()
        assert stream.getvalue().endswith(' 7/8 iterations, compiling\r')
        progress.update(8, 'batches 1 to 2 of 4', cross_entropy=2.0, loss=1.0)
    assert '8/8 iterations, batches 1 to 2 of 4: loss 1, cross entropy 2' in stream.getvalue()
    assert re.search(r'synthesis: done, 4 updates in \d s\n', stream.getvalue())


def test_a_sentence_takes_the_place_of_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr('sys.stderr', stream)
    say('All is well.')
    assert stream.getvalue() == f'{CLEAR}dvinv: All is well.\n'


def test_a_run_that_fails_is_not_called_done():
    stream = io.StringIO()
    try:
        with Progress('synthesis', 4, 'updates', stream=stream):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert 'done' not in stream.getvalue()


def test_durations_are_for_people():
    assert [duration(s) for s in (0.4, 7, 60, 200, 7500)] == ['0 s', '7 s', '1 min 00 s', '3 min 20 s', '2 h 05 min']
