"""Progress: a bar on a terminal, plain lines with a time of arrival elsewhere."""

import io

from dvinv.runtime.progress import Progress, duration


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
    with Progress('synthesis', 100, done=20, stream=stream, clock=clock) as progress:
        clock.now = 5
        progress.update(30, loss=2.5)  # too soon for a line
        clock.now = 20
        progress.update(60, loss=1.25)  # 40 of the remaining 80 in 20 s: 20 s to go
        clock.now = 40
        progress.update(100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == 'synthesis: 60/100, 20 s left  loss 1.25'
    assert lines[-1] == 'synthesis: done, 100 in 40 s'
    assert len(lines) == 3


def test_what_was_done_before_takes_no_time():
    stream, clock = io.StringIO(), Clock()
    with Progress('synthesis', 100, stream=stream, clock=clock) as progress:
        progress.pass_over(60)
        clock.now = 20
        progress.update(80)  # 20 of the remaining 40 in 20 s
    assert stream.getvalue() == 'synthesis: 80/100, 20 s left\n'


def test_what_takes_no_time_is_not_told_where_nobody_asked():
    stream, clock = io.StringIO(), Clock()
    for seconds in (9, 11):
        with Progress('check', 1, brief=True, stream=stream, clock=clock) as progress:
            clock.now += seconds
            progress._last = clock.now
            progress.update(1)
    assert stream.getvalue() == 'check: done, 1 in 11 s\n'


def test_a_terminal_gets_a_bar_with_an_eta():
    stream = Terminal()
    with Progress('synthesis', 4, stream=stream) as progress:
        progress.update(2, loss=1.0)
        progress._bar.refresh()
    assert '2/4' in stream.getvalue()
    assert '<' in stream.getvalue()  # tqdm's elapsed<remaining
    assert 'loss 1' in stream.getvalue()


def test_a_run_that_fails_is_not_called_done():
    stream = io.StringIO()
    try:
        with Progress('synthesis', 4, stream=stream):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert 'done' not in stream.getvalue()


def test_durations_are_for_people():
    assert [duration(s) for s in (0.4, 7, 60, 200, 7500)] == ['0 s', '7 s', '1 min 00 s', '3 min 20 s', '2 h 05 min']
