"""Writes the tables of README.md and docs/*.md from results/*.csv.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # names the tables that differ; exit status 1 where one does
    python benchmarks/tables.py --list     # names all tables

A page has a table between the lines `<!-- table: NAME -->` and `<!-- end -->`. Its text stands in results/tables.toml, with
placeholders for the figures, in the format that follows the colon (that of Python):

  {digits.student:.4f}              the value, or the mean over the seeds
  {digits.student std:.4f}          the standard deviation over the seeds
  {digits.student spread:.1%}       both: 98.9 ± 0.5%
  {digits_fast.student_25 seeds:.3f}    the value of every seed
  {step.resnet20_64.over_eager interval:.2f}    the median and its interval: 0.42 (0.40 to 0.53)
  {a.x minus a.y:.4f}               the mean difference, paired by seed, and its standard error
  {a.x per a.y:.2f}                 the ratio of the two values
  {a.x * 1000:.1f}, {a.x / 60:.1f}  the value in another unit

Between `<!-- sources: NAME NAME -->` and `<!-- end -->` stands what measured the rows of these tables.
"""

import argparse
import decimal
import re
import statistics
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from measured import read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'results'
BLOCK = re.compile(r'(<!-- (table|sources): ([\w ]+) -->\n)(.*?)(<!-- end -->)', re.DOTALL)
PLACEHOLDER = re.compile(
    r'\{(?P<key>[\w.-]+)(?: (?P<field>std|spread|seeds|interval))?'
    r'(?: (?P<operator>minus|per) (?P<other>[\w.-]+))?(?: (?P<scale>[*/]) (?P<factor>[\d.]+))?(?::(?P<format>[^{}]*))?\}'
)
Rows = Mapping[str, list[dict[str, str]]]  # those of one key, in the order of their seeds


def main(argv: list[str] | None = None) -> int:
    """Writes or checks all tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing, name the tables that differ')
    parser.add_argument('--list', action='store_true', help='write nothing, name all tables')
    arguments = parser.parse_args(argv)
    rows, tables = load(sorted(RESULTS.glob('*.csv'))), definitions()
    if arguments.list:
        print(*tables, sep='\n')
        return 0
    different = 0
    for page in pages():
        old = page.read_text()
        new, changed = render_page(old, tables, rows)
        different += len(changed)
        for name in changed:
            print(f'{page.relative_to(ROOT)}: {name} {"differs" if arguments.check else "written"}')
        if new != old and not arguments.check:
            page.write_text(new)
    return int(arguments.check and different > 0)


def pages() -> list[Path]:
    """Returns the pages that may have tables."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def definitions() -> dict[str, str]:
    """Returns the text of every table, with its placeholders, by name."""
    return tomllib.loads((RESULTS / 'tables.toml').read_text())


def load(paths: Iterable[Path]) -> Rows:
    """Returns the rows of CSV files by key.

    Raises:
      ValueError: two rows of one key and seed, or a key of one seed and of none.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for path in paths:
        for row in read(path):
            earlier = rows.setdefault(row['what'], [])
            if any(row['seed'] == other['seed'] or not row['seed'] or not other['seed'] for other in earlier):
                raise ValueError(f'{path} has {row["what"]} with seed {row["seed"] or "none"} twice.')
            earlier.append(row)
    return {what: sorted(found, key=lambda row: int(row['seed'] or 0)) for what, found in rows.items()}


def render_page(text: str, tables: Mapping[str, str], rows: Rows) -> tuple[str, list[str]]:
    """Returns a page with its tables as the rows say, and the names of those that were others.

    Raises:
      KeyError: a table that is not defined, or a figure that no CSV file has.
    """
    changed = []

    def replace(block: re.Match) -> str:
        start, kind, names, old, end = block.groups()
        if unknown := [name for name in names.split() if name not in tables]:
            raise KeyError(f'The table {unknown[0]} is not defined in results/tables.toml.')
        text = ''.join(tables[name] for name in names.split())
        new = render(text, rows) if kind == 'table' else sources(text, rows)
        if new != old:
            changed.append(f'{kind} {names}')
        return start + new + end

    return BLOCK.sub(replace, text), changed


def render(table: str, rows: Rows) -> str:
    """Returns the text of a table with figures in place of its placeholders."""
    with decimal.localcontext(rounding=decimal.ROUND_HALF_UP):
        return PLACEHOLDER.sub(lambda match: _figure(rows, match.groupdict()), table)


def sources(table: str, rows: Rows) -> str:
    """Returns a Markdown list of what measured the rows of a text's placeholders, in the order of their first use."""
    used = [row for match in PLACEHOLDER.finditer(table) for key in match.group('key', 'other') if key for row in rows[key]]
    lines: dict[str, list[str]] = {}
    for row in used:
        where = [row[name] for name in ('date', 'machine', 'versions') if row[name]]
        where += [f'commit {row["commit"]}'] if row['commit'] else []
        found = lines.setdefault(f'`{row["command"]}`' if row['command'] else 'no command is recorded', [])
        if ', '.join(where) not in found:
            found.append(', '.join(where))
    return ''.join(f'- {"; ".join(where)}: {command}\n' for command, where in lines.items())


def _figure(rows: Rows, match: Mapping[str, str | None]) -> str:
    """Returns the text in place of one placeholder, from its parts."""
    key, other, spec = match['key'], match['other'], match['format'] or ''
    if missing := [name for name in (key, other) if name and name not in rows]:
        raise KeyError(f'No file in results has {missing[0]}.')
    factor = decimal.Decimal(match['factor'] or 1)
    factor = 1 / factor if match['scale'] == '/' else factor
    values = [decimal.Decimal(row['value']) * factor for row in rows[key]]
    mean = statistics.mean(values)

    def show(value: decimal.Decimal, sign: str = '') -> str:
        return f'{value:{sign}{spec}}'

    if match['operator'] == 'per':
        return show(mean / statistics.mean(decimal.Decimal(row['value']) for row in rows[other]))
    if match['operator'] == 'minus':
        first, second = ({row['seed']: decimal.Decimal(row['value']) for row in rows[name]} for name in (key, other))
        differences = [(first[seed] - second[seed]) * factor for seed in first if seed in second]
        error = statistics.stdev(differences) / decimal.Decimal(len(differences)).sqrt()
        return _pair(show(statistics.mean(differences), '+'), show(error))
    if match['field'] == 'seeds':
        return ', '.join(map(show, values))
    if match['field'] == 'interval':
        low, high = (show(decimal.Decimal(rows[key][0][name]) * factor) for name in ('low', 'high'))
        return f'{show(mean)} ({low} to {high})'
    if match['field'] is None:
        return show(mean)
    std = statistics.stdev(values) if len(values) > 1 else decimal.Decimal(rows[key][0]['std']) * factor
    return show(std) if match['field'] == 'std' else _pair(show(mean), show(std))


def _pair(value: str, spread: str) -> str:
    return f'{value.removesuffix("%")} ± {spread}'


if __name__ == '__main__':
    sys.exit(main())
