"""Messages to users: the exception for their mistakes, parts of its sentences, and the validation that settings share."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

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


def validate_choices(settings: Any) -> None:
    """Validates the fields of a dataclass that are annotated as `Literal` or as a tuple of a `Literal`.

    Raises:
      DvinvError: names the field, its value and the choices.
    """
    for field in dataclasses.fields(settings):
        value, choices = getattr(settings, field.name), get_args(field.type)
        if value is None:
            continue
        if get_origin(field.type) is Literal and value not in choices:
            raise DvinvError(f'{field.name} is {value!r}; choose one of {", ".join(map(str, choices))}.')
        if get_origin(field.type) is tuple and get_origin(choices[0]) is Literal:
            for name in value:
                if name not in get_args(choices[0]):
                    raise DvinvError(f'{field.name} names {name!r}; choose among {", ".join(get_args(choices[0]))}.')


def validate_bounds(settings: Any, minimum: float, *names: str) -> None:
    """Validates that fields are at least `minimum` and finite; skips None, the value of a field that is not set yet.

    Raises:
      DvinvError: names the field and its value.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not minimum <= value < math.inf:
            finite = '' if value < minimum else ' and finite'
            raise DvinvError(f'{name} is {value}; it must be at least {minimum}{finite}.')


def validate_positive(settings: Any, *names: str) -> None:
    """Validates that fields are above 0 and finite.

    Raises:
      DvinvError: names the field and its value.
    """
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise DvinvError(f'{name} is {getattr(settings, name)}; it must be above 0.')
