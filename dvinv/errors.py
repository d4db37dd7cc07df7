"""The one exception that is meant for the user's eyes."""


class DvinvError(Exception):
    """A user's mistake or a full disk, told in one sentence: what is wrong, the value, the way out.

    `dvinv.main` prints the sentence and exits with status 1, without a traceback.
    """
