"""Shared validation of settings. A message begins with the name of the field, so that its group can precede it."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin

from dvinv.errors import DvinvError


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
