"""The one exception that is meant for the user's eyes, and how its sentences list."""


class DvinvError(Exception):
    """A user's mistake or a full disk, told in one sentence: what is wrong, the value, the way out.

    `dvinv.main` prints the sentence and exits with status 1, without a traceback.
    """


def listed(names: list[str], most: int = 12) -> str:
    """The first so many names, and how many more there are."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
