"""What is meant for the user's eyes: the one exception, how its sentences list, and what is said but once."""

import functools
import sys


class DvinvError(Exception):
    """A user's mistake or a full disk, told in one sentence: what is wrong, the value, the way out.

    `dvinv.main` prints the sentence and exits with status 1, without a traceback.
    """


def listed(names: list[str], most: int = 12) -> str:
    """The first so many names, and how many more there are."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def say(sentence: str) -> None:
    """Prints a sentence to stderr."""
    print(f'dvinv: {sentence}', file=sys.stderr, flush=True)


@functools.cache
def say_once(sentence: str) -> None:
    """Prints a sentence to stderr, where the process has not printed it before."""
    say(sentence)
