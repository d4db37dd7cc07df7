"""The ConfigDict that config files change: conversion to `Settings` and back, documentation, and the argument `smoke`."""

import dataclasses
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import ml_collections
from ml_collections import config_dict

from dvinv.config.inversion import PRESETS, InversionConfig, preset_for
from dvinv.config.settings import Settings, SynthesisSettings
from dvinv.runtime.errors import DvinvError

# {name of a field in earlier versions: its current name}
RENAMED = {
    'optimiser': 'optimizer',
    'synthesis.canvas': 'synthesis.parameterization',
    'pruning.left': 'pruning.target_ratio',
    'pruning.least': 'pruning.min_channels',
    'pruning.multiple': 'pruning.round_to',
    'pruning.protected': 'pruning.ignored_layers',
}

EXAMPLES: dict[Any, Any] = {int: 100, float: 0.1, str: 'resnet20'}  # a value of each type, for error messages
FIELD = re.compile(r'    (\w+): \w')


def default_config(preset: str = '') -> ml_collections.ConfigDict:
    """Returns all fields with their defaults, for a config file to change.

    Args:
      preset: name of the preset of the synthesis, see `PRESETS`; '': its fields are None, and a run fills those that are
        still None from the preset for images of the teacher's size.

    Returns:
      A locked config: setting a field that does not exist is an error.
    """
    settings = Settings()
    config = _as_config(settings.with_preset(PRESETS[preset]) if preset else settings)
    return config.lock()  # otherwise a typo would add a field that nothing reads


def parse(config: ml_collections.ConfigDict | Settings) -> Settings:
    """Returns the typed settings of a config; returns `Settings` unchanged.

    Raises:
      DvinvError: names a field that does not exist, or its value and what it must be.
    """
    return config if isinstance(config, Settings) else parse_group(Settings, config, '')


def parse_group(cls: type, config: Any, path: str) -> Any:
    """Returns the settings of one group.

    Args:
      cls: the dataclass of the group.
      config: the values, a dict or a ConfigDict.
      path: the path of the group in error messages; '' for the run itself.

    Raises:
      DvinvError: see `parse`.
    """
    known_fields, prefix = {field.name: field for field in dataclasses.fields(cls)}, f'{path}.' if path else ''
    for name in config:
        if name not in known_fields:
            raise DvinvError(_unknown(f'{prefix}{name}', [f'{prefix}{known}' for known in known_fields]))
    required = [field.name for field in _required_fields(cls)]
    for name in required:
        if name not in config:
            raise DvinvError(f'{path} has no {name}; it needs {" and ".join(required)}.')
    values = {name: _value(known_fields[name].type, config[name], f'{prefix}{name}') for name in config}
    try:
        return cls(**values)
    except DvinvError as error:
        # A message begins with the name of a field, except for messages about several groups.
        raise DvinvError(
            f'{prefix}{error}' if str(error).split(' ')[0].split('[')[0] in known_fields else str(error)
        ) from None


def current_name(path: str) -> str:
    """Returns the current name of the field that an earlier version named `path`, for instance 'pruning.left'."""
    group, _, name = path.rpartition('.')
    new = RENAMED.get(path) or (f'{group}.{RENAMED[name]}' if name in RENAMED else path)
    return new.lstrip('.')


def _as_config(settings: Any) -> ml_collections.ConfigDict:
    """Returns a dataclass as a ConfigDict, with a placeholder of the field's type for each None."""
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            config[field.name] = _as_config(value)
        elif value is None:
            kind = next(kind for kind in (*get_args(field.type), field.type) if kind is not type(None))
            config[field.name] = config_dict.placeholder(get_origin(kind) or kind)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            config[field.name] = tuple(map(_as_config, value))
        else:
            config[field.name] = value
    return config


def _required_fields(cls: type) -> list[dataclasses.Field]:
    """Returns the fields of a dataclass that have no default."""
    return [field for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING]


def _value(kind: Any, value: Any, path: str) -> Any:
    """Returns the value of a field of the type `kind`."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and (type(None) in options or kind is float):  # a field, or a weight, that a preset will fill
        return None
    kind = next(option for option in options if option is not type(None))
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            example = {field.name: EXAMPLES[field.type] for field in _required_fields(kind)}
            raise DvinvError(f'{path} is {value!r}; it must be a dict, as in {example}.')
        return parse_group(kind, value, path)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise DvinvError(f'{path} is {value!r}; it must be a tuple.')
        return tuple(_value(inner[0], item, f'{path}[{index}]') for index, item in enumerate(value))
    if origin is Literal:
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise DvinvError(
                f"{path} is {value!r}; it must be a dict of fields of data, {{'classes': (5, 6)}} for instance."
            )
        return dict(value)
    if not isinstance(value, int | float if kind is float else kind):
        raise DvinvError(f'{path} is {value!r}; it must be of the type {kind.__name__}.')
    return value


def _unknown(path: str, known: list[str]) -> str:
    """Returns the error message for a field that does not exist."""
    if (new := current_name(path)) != path:
        return f'The config field {path} is now called {new}.'
    close = difflib.get_close_matches(path, known, 1)
    suggestion = f'did you mean {close[0]!r}?' if close else f'choose among {", ".join(known)}.'
    return f'The config has no field {path!r}; {suggestion} --helpfull lists all fields.'


def shrink(config: ml_collections.ConfigDict, width: float = 0.25) -> None:
    """Shrinks a config to seconds instead of minutes, without a download; the figures of such a run have no meaning.

    Every part still runs. Enlarged digits replace other data sets, but for a network of the user's own (teacher.factory),
    which may take only images of one shape: its config keeps its data, or none.

    Args:
      config: changed in place.
      width: factor of the number of channels of all networks.
    """
    if config.data.name != 'digits' and not config.teacher.factory:
        config.data.update(name='digits', image_size=32)
        config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)
    config.teacher.width, config.verifier.width = width, width
    config.teacher.moments_images = min(config.teacher.moments_images, 20)
    config.verifiers = ()
    config.student.width = width if config.distillation.hint else width / 2  # hints of layers need equal shapes
    trainings = (config.teacher.training, config.verifier.training, config.quantization.training)
    for group in (*trainings, config.distillation, config.pruning, config.continual):
        group.update(updates=20, batch_size=32, warmup=2, precision='float32')
    config.pruning.update(steps=2, updates_per_step=10, importance_batches=2, latency_batch=2)
    if config.continual.steps:
        config.data.classes = (0, 1, 2, 3)
        config.continual.steps = ({'classes': (4, 5, 6)}, {'classes': (7, 8, 9)})[: len(config.continual.steps)]
    config.bn_stats = 'device'  # since a batch of 20 images cannot be split over any number of devices
    config.synthesis.update(images=40, batch_size=20, classes=(), precision='float32')
    if config.synthesis.stages is None:
        config.synthesis.stages = default_config(preset_for((8, 8, 1))).synthesis.stages
    largest = max(stage.resolution for stage in config.synthesis.stages)
    for stage in config.synthesis.stages:
        resolution = stage.resolution and stage.resolution * config.data.image_size // largest
        stage.update(iterations=5, warmup=0, resolution=resolution, jitter=min(stage.jitter, 2))
    if config.synthesis.batches_per_round:
        config.synthesis.batches_per_round, config.distillation.updates_per_round = 1, 10
    if config.distillation.counts:
        config.distillation.counts = (20, 40)
    config.logging.update(every=5, checkpoint_every=10, iterations=2)


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
    lines += ['are those of the preset `digits`; they differ from preset to preset (dvinv/config/inversion.py).', '']
    command = "from dvinv.config.parsing import as_markdown as page; print(page(), end='')"
    lines += [f'This page is made by `python -c "{command}" > docs/settings.md`.']
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
