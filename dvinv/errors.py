"""Messages to users: the exception for their mistakes, parts of its sentences, and lines on the terminal."""

import functools
import sys
from collections.abc import Iterable

CLEAR = '\r\x1b[K'  # clears the terminal line of the cursor


class DvinvError(Exception):
    """A user's mistake or a full disk, described in one sentence: what is wrong, the value, the way out.

    `dvinv.main` prints the sentence and exits with status 1, without a traceback.
    """


def shape_text(shape: Iterable[int]) -> str:
    """Returns a shape as text, for instance '32x32x3'."""
    return 'x'.join(map(str, shape))


def listed(names: list[str], most: int = 12) -> str:
    """Joins the first `most` names, and says how many more there are."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def in_a_line(error: Exception) -> str:
    """Returns the class of an error and the first line of its message, which may be empty."""
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'


def say(sentence: str) -> None:
    """Prints a sentence to stderr; on a terminal, in place of a progress bar."""
    print(f'{CLEAR if sys.stderr.isatty() else ""}dvinv: {sentence}', file=sys.stderr, flush=True)


@functools.cache
def say_once(sentence: str) -> None:
    """Prints a sentence to stderr, unless this process has already printed it."""
    say(sentence)
