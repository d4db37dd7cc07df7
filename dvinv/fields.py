"""The fields of a config with what the source says of each, for `--helpfull`."""

import inspect
import re
import textwrap

from dvinv.configuration import base_config
from dvinv.continual.settings import Continual
from dvinv.inversion import InversionConfig, Stage, Weights
from dvinv.pruning.removal import Removal
from dvinv.quantization.settings import QuantizationSettings
from dvinv.recipe import Recipe
from dvinv.runtime.workdir import flat, plain

# The classes that fields of a group come from; the comments of others stand in `base_config`.
CLASSES = {
    'teacher.training': (Recipe,),
    'verifier.training': (Recipe,),
    'synthesis': (InversionConfig,),
    'synthesis.weights': (Weights,),
    'synthesis.stages[0]': (Stage,),
    'distillation': (Recipe,),
    'pruning': (Recipe, Removal),
    'continual': (Recipe, Continual),
    'quantization': (QuantizationSettings,),
    'quantization.training': (Recipe,),
}
FIELD = re.compile(r"\s*(?:config\.(?P<top>\w+) = |'(?P<key>\w+)': |(?P<attribute>\w+): \w)")
NESTED = re.compile(r"\s*'(\w+)': \{$")  # a group within a group
GROUP = re.compile(r'\s*config\.(\w+) = ml_collections\.ConfigDict\(')


def described(width: int = 100) -> str:
    """Returns a paragraph a field: the flag that sets it, with its default, and its comment."""
    paragraphs = ['Fields of a config, with the defaults of dvinv.configuration.base_config:']
    for name, comment, value in fields():
        text = textwrap.fill(comment, width, initial_indent='    ', subsequent_indent='    ')
        paragraphs.append(f'  --config.{name}={value!r}' + (f'\n{text}' if comment else ''))
    return '\n'.join(paragraphs)


def fields() -> list[tuple[str, str, object]]:
    """Returns (path, comment or '', default) of each field of the base config, of one stage for all."""
    known = _comments(inspect.getsource(base_config))
    for group, classes in CLASSES.items():
        for owner in classes:
            for name, comment in _comments(inspect.getsource(owner)).items():
                known.setdefault(f'{group}.{name}', comment)
    values = flat(plain(base_config('digits')))
    defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return [(name, known.get(name, ''), value) for name, value in defaults.items() if '[' not in name or '[0]' in name]


def _comments(source: str) -> dict[str, str]:
    """Returns {field: its comment}, of the field's line and of the lines above it; with its group in a config's source."""
    found, above, group, inner = {}, [], '', ''
    for line in source.splitlines():
        if (text := line.strip()).startswith('#'):
            above.append(text.lstrip('# '))
            continue
        if opened := GROUP.match(line):
            group = f'{opened[1]}.'
        elif opened := NESTED.match(line):
            inner = f'{opened[1]}.'
        elif text == '},':
            inner = ''
        elif field := FIELD.match(line):
            name = field['top'] or f'{group}{inner}{field["key"] or field["attribute"]}'
            _, _, comment = line.partition('  # ')
            found.setdefault(name, ' '.join([*above, comment]).strip())
        above = []
    return {name: comment for name, comment in found.items() if comment}
