"""Lists the fields of a config with the comments in their source, for `--helpfull` and docs/settings.md."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from dvinv.config.inversion import InversionConfig
from dvinv.config.parsing import default_config, parse
from dvinv.config.settings import SynthesisSettings

FIELD = re.compile(r'    (\w+): \w')


class Field(NamedTuple):
    """A field of a config: 'teacher.training.updates' for instance."""

    path: str
    default: Any
    comment: str


def described(width: int = 100) -> str:
    """Returns one paragraph per field: the flag that sets it, with its default, and its comment."""
    paragraphs = ['Fields of a config, with the defaults of dvinv.default_config and the preset of the digits:']
    for field in fields():
        text = textwrap.fill(field.comment, width, initial_indent='    ', subsequent_indent='    ')
        paragraphs.append(f'  --config.{field.path}={field.default!r}' + (f'\n{text}' if field.comment else ''))
    return '\n'.join(paragraphs)


def as_markdown() -> str:
    """Returns the contents of docs/settings.md: one table per group."""
    lines = [
        '# Settings',
        '',
        'Every field of a config, its default, and what it does. The defaults of the group `synthesis`',
    ]
    lines += ['are those of the preset `digits`; they differ from preset to preset (dvinv/config/presets.py).', '']
    lines += ['This page is made by `python -m dvinv.config.documentation > docs/settings.md`.']
    group = None
    for field in fields():
        owner, _, name = field.path.rpartition('.')
        if owner != group:
            lines += ['', f'## {owner or "The run"}', '', '| field | default | |', '|---|---|---|']
            group = owner
        comment = field.comment.replace('|', '\\|')
        lines.append(f'| `{name}` | `{field.default!r}` | {comment} |')
    return '\n'.join(lines) + '\n'


def fields() -> list[Field]:
    """Returns all fields, those of the run itself first; the fields of a stage are listed once."""
    # The sort is stable: the groups keep their order.
    return sorted(_fields(parse(default_config('digits')), ''), key=lambda field: '.' in field.path)


def _fields(settings: Any, prefix: str) -> Iterator[Field]:
    classes = type(settings).__mro__[::-1]
    if isinstance(settings, SynthesisSettings):  # fields that a preset fills have their comments in `InversionConfig`
        classes = (InversionConfig, *classes)
    comments: dict[str, str] = {}
    for cls in classes:
        if dataclasses.is_dataclass(cls):
            comments |= _comments(inspect.getsource(cls))
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), f'{prefix}{field.name}'
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f'{path}.')
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            yield from _fields(value[0], f'{path}[0].')
        else:
            yield Field(path, value, comments.get(field.name, ''))


def _comments(source: str) -> dict[str, str]:
    """Returns {field: its comment}, from the field's line and the comment lines above it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        if (text := line.strip()).startswith('#'):
            above.append(text.lstrip('# '))
            continue
        if field := FIELD.match(line):
            _, _, comment = line.partition('  # ')
            if text := ' '.join([*above, comment]).strip():
                comments[field[1]] = text
        above = []
    return comments


if __name__ == '__main__':
    print(as_markdown(), end='')
