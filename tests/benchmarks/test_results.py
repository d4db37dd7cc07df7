"""results/*.csv, the tables that are generated from them, and the scripts that append to them."""

import datetime
import math
import re
import sys
from pathlib import Path

import gpu_rows
import measured
import pytest
import step_time
import tables
from smoke import ROOT

FILES = sorted((ROOT / 'results').glob('*.csv'))
LOCAL_PATH = re.compile(r'(?<![\w.$])(/(home|root|tmp|work|mnt|data|Users|var)\b|[A-Z]:\\|~/)')
ROWS = {
    'a': [{'what': 'a', 'value': value, 'seed': seed} for seed, value in (('0', '0.90'), ('1', '0.92'))],
    'b': [{'what': 'b', 'value': value, 'seed': seed} for seed, value in (('0', '0.80'), ('1', '0.84'))],
    'mean': [{'what': 'mean', 'value': '0.9055', 'seed': '', 'std': '0.012', 'low': '0.5', 'high': '0.95'}],
}


def test_tables_are_those_of_the_files(capsys):
    assert tables.main(['--check']) == 0, capsys.readouterr().out + 'Run python benchmarks/tables.py.'


def test_every_table_is_on_the_results_page_or_sums_up_in_the_readme():
    pages = [(ROOT / name).read_text() for name in ('README.md', 'docs/results.md')]
    assert [name for name in tables.definitions() if not any(f'<!-- table: {name} -->' in page for page in pages)] == []


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_rows_are_complete_and_well_formed(path):
    rows = measured.read(path)
    assert rows
    assert path.read_bytes().count(b'\r') == 0
    for row in rows:
        assert None not in (*row, *row.values()), row  # too few or too many columns
        assert re.fullmatch(r'[\w.-]+', row['what']), row
        assert math.isfinite(float(row['value'])), row
        assert row['unit'] in measured.UNITS, row
        assert re.fullmatch(r'\d*', row['seed']), row
        assert re.fullmatch(r'\d*', row['n']), row
        assert not row['std'] or (float(row['std']) >= 0 and not row['seed'] and int(row['n']) > 1), row
        assert not row['low'] or float(row['low']) <= float(row['value']) <= float(row['high']), row
        assert re.fullmatch(r'[0-9a-f]{7,40}|', row['commit']), row
        assert not row['date'] or datetime.date.fromisoformat(row['date']), row
        assert not LOCAL_PATH.search(' '.join(row.values())), row


def test_keys_are_unique():
    assert tables.load(FILES)


@pytest.mark.parametrize(
    ('placeholder', 'text'),
    [
        ('{a:.3f}', '0.910'),
        ('{a seeds:.1%}', '90.0%, 92.0%'),
        ('{a std:.4f}', '0.0141'),
        ('{a spread:.1%}', '91.0 ± 1.4%'),
        ('{mean spread:.1%}', '90.6 ± 1.2%'),  # halves are rounded up
        ('{mean interval:.2f}', '0.91 (0.50 to 0.95)'),
        ('{a minus b:.2%}', '+9.00 ± 1.00%'),
        ('{a per b:.2f}', '1.11'),
        ('{a * 1000:,.0f} and {a / 60:.3f}', '910 and 0.015'),
    ],
)
def test_placeholders(placeholder, text):
    assert tables.render(f'| {placeholder} |', ROWS) == f'| {text} |'


def test_a_changed_figure_changes_the_page():
    page = 'before\n<!-- table: t -->\n<!-- end -->\nbetween\n<!-- sources: t u -->\n<!-- end -->\nafter'
    definitions = {'t': '| {a:.2f} |\n', 'u': '| {b:.2f} |\n'}
    columns = dict.fromkeys(('date', 'machine', 'versions', 'commit'), '') | {'date': '2026-11-27'}
    rows = {what: [{**row, **columns, 'command': f'run {what}'} for row in ROWS[what]] for what in 'ab'}
    new, changed = tables.render_page(page, definitions, rows)
    assert changed == ['table t', 'sources t u']
    assert new.splitlines()[2] == '| 0.91 |'
    assert '- 2026-11-27: `run a`\n- 2026-11-27: `run b`\n<!-- end -->\nafter' in new
    assert tables.render_page(new, definitions, rows) == (new, [])
    rows['a'][0]['value'] = '0.7'
    assert tables.render_page(new, definitions, rows)[1] == ['table t']


def test_missing_figures_and_tables_are_named():
    with pytest.raises(KeyError, match=r'No file in results has digits\.nothing'):
        tables.render('{digits.nothing:.1%}', ROWS)
    with pytest.raises(KeyError, match='The table nothing is not defined'):
        tables.render_page('<!-- table: nothing -->\n<!-- end -->', {}, ROWS)


def test_appended_rows_say_what_measured_them(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'rows.csv'
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'benchmarks' / 'table.py'), f'--workdir={tmp_path}/runs', '--seeds', '3'])
    measured.append(path, [{'what': 'x', 'value': 0.5, 'unit': 'share', 'seed': 0}])
    measured.append(path, [{'what': 'x', 'value': 0.6, 'unit': 'share', 'seed': 1}], date='2026-11-27')
    first, second = measured.read(path)
    assert first['command'] == 'python benchmarks/table.py --workdir=runs --seeds 3'
    assert 'jax ' in first['versions']
    assert (second['value'], second['date'], second['std']) == ('0.6', '2026-11-27', '')
    with pytest.raises(ValueError, match='unknown'):
        measured.append(path, [{'unknown': 1}])
    (tmp_path / 'other.csv').write_text('what,value\nx,1\n')
    with pytest.raises(ValueError, match='it must have what, value'):
        measured.read(tmp_path / 'other.csv')
    measured.append(tmp_path / 'twice.csv', [{'what': 'x', 'value': 1, 'unit': 'share'}] * 2)
    with pytest.raises(ValueError, match='x with seed none twice'):
        tables.load([tmp_path / 'twice.csv'])


def test_step_time_appends_the_keys_of_speed_csv():
    known = {row['what']: row['unit'] for row in measured.read(ROOT / 'results' / 'speed.csv')}
    shared = {'network': 'resnet20', 'batch': 64, 'rounds': 9, 'gflops': 71.64, 'fraction_of_peak': 0.45}
    ratios = {'ratio_over_torch': 0.42, 'ratio_over_torch_frozen': None, 'intervals': {'ratio_over_torch': (0.4, 0.53)}}
    comparison = step_time.csv_rows(shared | ratios)
    first = {'what': 'step.resnet20_64.over_eager', 'value': 0.42, 'low': 0.4, 'high': 0.53, 'unit': 'ratio', 'n': 9}
    assert comparison[0] == first
    assert len(comparison) == 3  # without PyTorch's frozen form
    sweep = step_time.csv_rows({'sweep': {'batch': [{'batch': 16, 'gflop': 2.0, 'seconds': 0.04}]}, 'rounds': 7})
    assert sweep == [{'what': 'sweep.batch_16', 'value': 50.0, 'unit': 'GFLOP/s', 'n': 7}]
    for row in (*comparison, *sweep):
        assert known[row['what']] == row['unit']


def test_gpu_files_are_in_the_csv():
    known = {(row['what'], row['seed']): row for row in measured.read(ROOT / 'results' / 'gpu.csv')}
    found = list(gpu_rows.rows(Path(ROOT / 'results' / 'gpu')))
    assert len(found) > 100
    for row in found:
        assert float(known[row['what'], row.get('seed', '')]['value']) == row['value'], row
