"""Converts a config file's ConfigDict to `Settings`, and `Settings` to the ConfigDict that config files change."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import ml_collections
from ml_collections import config_dict

from dvinv.config.presets import PRESETS
from dvinv.config.settings import Settings
from dvinv.errors import DvinvError

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


def default_config(preset: str = '') -> ml_collections.ConfigDict:
    """Returns all fields with their defaults, for a config file to change.

    Args:
      preset: name of the preset of the synthesis, see `presets.PRESETS`; '': its fields are None, and a run fills those that
        are still None from the preset for images of the teacher's size.

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
    fields, prefix = {field.name: field for field in dataclasses.fields(cls)}, f'{path}.' if path else ''
    for name in config:
        if name not in fields:
            raise DvinvError(_unknown(f'{prefix}{name}', [f'{prefix}{known}' for known in fields]))
    required = [field.name for field in _required_fields(cls)]
    for name in required:
        if name not in config:
            raise DvinvError(f'{path} has no {name}; it needs {" and ".join(required)}.')
    values = {name: _value(fields[name].type, config[name], f'{prefix}{name}') for name in config}
    try:
        return cls(**values)
    except DvinvError as error:
        # A message begins with the name of a field, except for messages about several groups.
        raise DvinvError(f'{prefix}{error}' if str(error).split(' ')[0].split('[')[0] in fields else str(error)) from None


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
