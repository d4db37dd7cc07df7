"""The pages in docs/ and the README: links, code, commands, names of settings and messages are those of the code."""

import ast
import importlib
import inspect
import itertools
import re
import runpy
from pathlib import Path

import pytest

import dvinv
from dvinv.config import default_config
from dvinv.config.parsing import fields

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *DOCS]
OF_THEIR_COMMITS = 'results.md', 'experiments.md'  # names in commands there are those of the code that was measured
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
API = (ROOT / 'docs' / 'api.md').read_text()
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def text_of(page):
    """A page without its blocks of code."""
    return FENCE.sub('', page.read_text())


def code_of(page, language):
    """The blocks of code of a page in one language."""
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def anchors_of(page):
    """The anchors of the headings, as GitHub makes them."""
    seen, anchors = {}, set()
    for heading in re.findall(r'^#+ (.*)$', text_of(page), re.MULTILINE):
        anchor = re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')
        number = seen.setdefault(anchor, 0)
        seen[anchor] += 1
        anchors.add(f'{anchor}-{number}' if number else anchor)
    return anchors


@each_page
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match('[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@each_page
def test_tables_of_figures_are_marked_from_start_to_end(page):
    marks = re.findall(r'^<!-- (table: \w+|sources: [\w ]+|end) -->$', page.read_text(), re.MULTILINE)
    assert page.read_text().count('<!--') == len(marks)
    assert [mark == 'end' for mark in marks] == [False, True] * (len(marks) // 2)


def test_the_map_shows_every_page():
    links = {link.partition('#')[0] for link in LINK.findall((ROOT / 'docs' / 'index.md').read_text())}
    assert {page.name for page in DOCS} <= {*links, 'index.md'}


@each_page
def test_python_is_right_and_names_what_there_is(page):
    for code in code_of(page, 'python'):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'dvinv':
                assert node.attr in dvinv.__all__
            if isinstance(node, ast.ImportFrom) and node.module.startswith('dvinv'):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


@each_page
def test_files_configs_and_their_arguments_are_there(page):
    text = page.read_text()
    for path in re.findall(r'(?<!:)\b(?:configs|launch|benchmarks)/\w+\.\w+', text):
        assert (ROOT / path).exists(), path
    for path, argument in re.findall(r'(configs/\w+\.py):(\w+)', text):
        runpy.run_path(str(ROOT / path))['get_config'](argument)  # refuses one that it does not know
    for row in re.findall(r'^\| `configs/.*', text, re.MULTILINE):  # a table that names arguments after their config
        path = ''
        for name in re.findall('`(.*?)`', row):
            path = name if name.startswith('configs/') else path
            if name.startswith(':'):
                runpy.run_path(str(ROOT / path.partition(':')[0]))['get_config'](name[1:])


@pytest.mark.parametrize('page', [page for page in PAGES if page.name not in OF_THEIR_COMMITS], ids=lambda page: page.name)
def test_settings_are_there(page):
    known = {re.sub(r'\[\d+\]', '[0]', field.path) for field in fields()}
    groups = {path.rpartition('.')[0] for path in known} - {''}
    text = page.read_text()
    flags = re.findall(r'--config\.([\w.\[\]]+)', text)
    quoted = re.findall(r'`(\w+(?:\.\w+)+)(?:=[^`]*)?`', text)
    named = [name for name in quoted if name.split('.')[0] in groups and not name.endswith(('.py', '.npz', '.json'))]
    for name in (*flags, *named):
        name = re.sub(r'\[\d+\]', '[0]', name)
        assert name in known | groups | {'synthesis.stages'}, name


def parameters(function):
    """[(name, kind, default)] of a function or of its definition."""
    if isinstance(function, ast.FunctionDef):
        scope = {}
        exec(ast.unparse(ast.Module([function], [])), {'Teacher': None, 'Inversion': None, 'Moments': None}, scope)
        function = scope[function.name]
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize('name', dvinv.__all__)
def test_the_api_page_has_every_public_name_as_it_is(name):
    assert f'\n### `dvinv.{name}`\n' in API
    section = API.split(f'\n### `dvinv.{name}`\n')[1].split('\n### ')[0].split('\n## ')[0]
    thing = getattr(dvinv, name)
    if inspect.isfunction(thing):
        definition = ast.parse(re.search(r'```python\n(def .*?)```', section, re.DOTALL).group(1)).body[0]
        assert parameters(definition) == parameters(thing)
    elif hasattr(thing, '__dataclass_fields__'):
        assert all(f'`{field}`' in section or f'`{field}(' in section for field in thing.__dataclass_fields__)
    elif isinstance(thing, dict):
        assert all(f'`{key}`' in section for key in thing)
    assert '```python\n' in section


def test_the_api_page_has_no_other_name():
    assert {*re.findall(r'^### `dvinv\.(\w+)`$', API, re.MULTILINE)} == {*dvinv.__all__}


def test_presets_that_the_pages_name_are_there():
    for page, quote in itertools.product(PAGES, '\'"'):
        for preset in re.findall(rf'default_config\({quote}(\w+){quote}\)', page.read_text()):
            default_config(preset)


def sentences():
    """The texts of the code, with a NUL in place of every value."""
    for path in (ROOT / 'dvinv').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield ''.join(part.value if isinstance(part, ast.Constant) else '\0' for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code():
    said, page = '\n'.join(sentences()), (ROOT / 'docs' / 'troubleshooting.md').read_text()
    messages = [text for row in re.findall(r'^\| (`.*?`) \| ', page, re.MULTILINE) for text in re.findall('`(.*?)`', row)]
    assert len(messages) > 40
    for message in messages:
        for part in message.split('...'):
            assert part.strip(' ;,.') in said, message
