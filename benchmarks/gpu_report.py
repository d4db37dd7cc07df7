"""The JSON file of one stage of gpu.py: declared figures, each with a value or with the reason why it has none."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

DONE, FAILED, PENDING = 'done', 'failed', 'pending'
NOT_STARTED = 'not started'


@dataclasses.dataclass(frozen=True)
class Item:
    """One measurement of a stage.

    Attributes:
      level: the pass in which it is measured, from 1.
      least_seconds: what it needs at least; it is not started with less time left.
      fields: nested dict of its figures, all None.
    """

    level: int
    least_seconds: float
    fields: dict


class Report:
    """The figures of one stage, on disk after every change.

    The file holds, an item each: its state ('done', 'failed' or 'pending'), the GPU, the seconds that it took, its figures,
    and in 'missing' why figures are null: the reason of a figure is the one at its path, 'a.b', or at that of its nearest
    group ('': the whole item).
    """

    def __init__(self, paths: list[Path], stage: str, items: Mapping[str, Item], gpu: str, rehearsal: bool):
        """Reads the first of `paths` that exists, adds the declared figures that it has no values of, and writes all.

        Args:
          paths: the file and its copies.
          items: the declared measurements, in the order of their worth.
          gpu: name of the GPU; '' for a rehearsal.
          rehearsal: whether the figures come from a rehearsal.
        """
        self._paths, self._items, self._gpu = [Path(path) for path in paths], items, gpu
        old = read_json(next((path for path in self._paths if path.exists()), Path()))
        self._header = {'stage': stage, 'rehearsal': rehearsal, 'error': old.get('error')}
        self._entries = {}
        for name, item in items.items():
            entry = old.get('items', {}).get(name, {})
            self._entries[name] = {
                'state': entry.get('state', PENDING),
                'gpu': entry.get('gpu'),
                'seconds': entry.get('seconds', 0.0),
                'figures': _merged(item.fields, entry.get('figures', {})),
                'missing': entry.get('missing', {'': NOT_STARTED}),
            }
        self._write()

    def state(self, name: str) -> str:
        """Returns 'done', 'failed' or 'pending'."""
        return self._entries[name]['state']

    def names(self, level: int | None = None) -> list[str]:
        """Returns all items (of a pass)."""
        return [name for name, item in self._items.items() if level in (None, item.level)]

    def reason(self, name: str) -> str:
        """Returns the reason that holds for a whole item; '' where there is none."""
        return self._entries[name]['missing'].get('', '') if self.state(name) != DONE else ''

    def failed(self) -> list[str]:
        """Returns the items that failed."""
        return [name for name in self._items if self.state(name) == FAILED]

    def unfinished(self, level: int) -> list[str]:
        """Returns the items of a pass that are not done."""
        return [name for name in self.names(level) if self.state(name) != DONE]

    def complete(self, level: int | None = None) -> bool:
        """Returns whether all items (of a pass) are done."""
        return all(self.state(name) == DONE for name in self.names(level))

    def figures(self, name: str) -> dict:
        """Returns the figures of an item."""
        return self._entries[name]['figures']

    def begin(self, name: str) -> None:
        """Forgets the reasons of an earlier try; figures that it left stay."""
        self._entries[name].update(state=PENDING, missing={'': NOT_STARTED})

    def record(self, name: str, figures: Mapping, path: str = '') -> None:
        """Sets declared figures of an item.

        Args:
          figures: nested like the declared ones; numbers that are not finite become null.
          path: the group that they belong to, 'a.b'; '' for the item's own.

        Raises:
          KeyError: a figure that the stage does not declare.
        """
        group = _group(self._entries[name]['figures'], path)
        self._set(name, group, figures, path)
        self._entries[name]['gpu'] = self._gpu
        self._write()

    def excuse(self, name: str, reason: str, path: str = '') -> None:
        """Gives the reason why the figures at `path` (and those in that group) are null where they are."""
        self._entries[name]['missing'][path] = reason
        self._write()

    def seconds(self, name: str) -> float:
        """Returns the seconds that an item took so far."""
        return self._entries[name]['seconds']

    def add_seconds(self, name: str, seconds: float) -> None:
        """Adds to the seconds that an item took."""
        self._entries[name]['seconds'] = round(self._entries[name]['seconds'] + seconds, 2)
        self._write()

    def finish(self, name: str) -> None:
        """Marks an item as done.

        Raises:
          ValueError: a figure is null without a reason of its own.
        """
        entry = self._entries[name]
        if entry['missing'].get('') == NOT_STARTED:
            del entry['missing']['']
        if silent := [path for path in nulls(entry['figures']) if place_of(path, entry['missing']) is None]:
            raise ValueError(f'{name} is done without {", ".join(silent)}, and without a reason')
        entry['state'] = DONE
        self._write()

    def fail(self, name: str, reason: str) -> None:
        """Marks an item as failed; its figures so far stay."""
        self._entries[name]['state'] = FAILED
        self._entries[name]['missing'][''] = reason
        self._write()

    def set_error(self, error: str | None) -> None:
        """Sets why the stage's process did not end normally; None where it did."""
        self._header['error'] = error
        self._write()

    def _set(self, name: str, group: dict, figures: Mapping, path: str) -> None:
        for key, value in figures.items():
            if key not in group:
                raise KeyError(f'{path}.{key} is no figure of {name}')
            inner = f'{path}.{key}'.lstrip('.')
            if isinstance(group[key], dict):
                self._set(name, group[key], value, inner)
                continue
            if value is None:
                self._entries[name]['missing'].setdefault(inner, 'it was not measured')
            if isinstance(value, float) and not math.isfinite(value):
                self._entries[name]['missing'][inner] = f'the value is {value}'
                value = None
            group[key] = float(f'{value:.6g}') if isinstance(value, float) else value

    def _write(self) -> None:
        items = {}
        for name, entry in self._entries.items():
            used = {place_of(path, entry['missing']) for path in nulls(entry['figures'])}
            missing = {path: reason for path, reason in entry['missing'].items() if path in used}
            items[name] = {**entry, 'missing': missing}
        text = json.dumps({**self._header, 'complete': self.complete(), 'items': items}, indent=1) + '\n'
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f'.{path.name}.part')
            part.write_text(text)
            os.replace(part, path)


def read_json(path: Path) -> dict:
    """Returns the parsed file; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def nulls(figures: Mapping, path: str = '') -> Iterator[str]:
    """Yields the paths, 'a.b.c', of the figures that are null."""
    for key, value in figures.items():
        inner = f'{path}.{key}'.lstrip('.')
        if isinstance(value, dict):
            yield from nulls(value, inner)
        elif value is None:
            yield inner


def place_of(path: str, missing: Mapping[str, str]) -> str | None:
    """Returns the path of the figure itself, of its nearest group, or of the whole item (''), that has a reason."""
    while path and path not in missing:
        path = path.rpartition('.')[0]
    return path if path in missing else None


def _merged(fields: Mapping, old: Mapping) -> dict:
    """Returns the declared figures with the old values of those that have some."""
    return {
        key: _merged(value, old.get(key) or {}) if isinstance(value, dict) else old.get(key) for key, value in fields.items()
    }


def _group(figures: dict, path: str) -> dict:
    """Returns the group of figures at a path."""
    for key in path.split('.') if path else ():
        figures = figures[key]
    return figures
