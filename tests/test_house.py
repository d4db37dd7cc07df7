"""The rules of the house, as far as a program can see them: sizes, parameters, words and static types of dvinv/."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from smoke import ROOT

PACKAGE = ROOT / 'dvinv'
FILES = sorted(PACKAGE.rglob('*.py'))
NAMED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Words that say nothing about what they name, or that the field has better words for.
WORDS = {
    'leader',
    'mine',
    'ours',
    'theirs',
    'alike',
    'told',
    'lesson',
    'learner',
    'taught',
    'canvas',
    'paint',
    'ear',
    'ears',
}
WORDS |= {'hear', 'heard', 'atom', 'alive', 'rungs', 'ladder', 'meeting', 'mistakes', 'looked'}
ALONE = {'some', 'of', 'there', 'one', 'whole', 'made'}  # as a name of their own

# The floors of the house, from the ground; imports point down, or stay on their floor.
FLOORS = [
    {'runtime.errors', 'config'},
    {'runtime'},
    {'data', 'graph', 'networks'},
    {'inversion'},
    {'training', 'evaluation', 'pipeline.run'},
    {'teacher', 'synthesis', 'distillation', 'pruning', 'continual', 'quantization', 'report'},
    {'pipeline'},
    {'main', '__main__'},
]
OPENS = 'pipeline.run', 'teacher'  # an open run reads the networks of the run, from their files and a user's functions


def floor_of(module: str) -> int:
    """The number of the floor of a module of dvinv, such as 'pipeline.run' or 'graph.stages'."""
    return next(n for n, floor in enumerate(FLOORS) for name in (module, module.partition('.')[0]) if name in floor)


def names_of(tree: ast.AST) -> Iterator[str]:
    """All names that a module assigns, takes or defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, NAMED):
            yield node.name


def test_names_say_what_they_hold():
    poor = {}
    for path in FILES:
        for name in names_of(ast.parse(path.read_text())):
            if name in ALONE or {part.lower() for part in re.findall(r'[A-Z]?[a-z]+|[A-Z]+', name)} & WORDS:
                poor.setdefault(str(path.relative_to(ROOT)), set()).add(name)
    assert poor == {}


def test_imports_point_down():
    upward = []
    for path in FILES:
        module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if module != '__init__' and isinstance(node, ast.ImportFrom) and (node.module or '').startswith('dvinv.'):
                imported = node.module.removeprefix('dvinv.')
                if floor_of(imported) > floor_of(module) and (module, imported.partition('.')[0]) != OPENS:
                    upward.append((module, imported))
    assert upward == []


def test_no_function_is_named_check():
    functions = (node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, NAMED))
    assert [function.name for function in functions if function.name == 'check'] == []


def test_a_reader_finds_few_places():
    """A new part belongs into a file about the same thing, if there is one."""
    assert len(FILES) <= 90
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix == '.py' or (path / '__init__.py').exists()}
    assert len(entries - {'__init__.py', '__main__.py', 'main.py'}) <= 17


def test_no_file_is_too_long():
    assert {str(path.relative_to(ROOT)) for path in FILES if path.read_text().count('\n') > 500} == set()


def test_settings_are_parsed_once():
    """A ConfigDict goes no further than config/ and the pipeline, which parse it."""
    users = {path.relative_to(PACKAGE) for path in FILES if 'ConfigDict' in path.read_text()}
    assert {path.parts[0] for path in users} <= {'config', 'pipeline', 'main.py', '__init__.py'}


@pytest.mark.slow
def test_static_types():
    command = [sys.executable, '-m', 'mypy', '--cache-dir', '/dev/null', str(PACKAGE)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
