"""Appends the figures that gpu.py measured to results/gpu.csv, which the tables are made of.

    python benchmarks/gpu_rows.py results/gpu [--csv results/gpu.csv] [--commit C] [--date YYYY-MM-DD]

Figures that the file has already are left as they are. A seed at the end of an item's name becomes the column `seed`.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from gpu_report import DONE, read_json
from measured import append, read

COMMAND = 'python3 benchmarks/gpu.py --minutes 9.5 --out "$OUT"'
UNITS = (  # the first that occurs in the name of a figure; a figure without one is a setting, and left out
    ('seconds', 's'),
    ('hours', 'h'),
    ('minutes', 'min'),
    ('images_per_second', '1/s'),
    ('accuracy', 'share'),
    ('share_of_peak', 'share'),
    ('loss', 'loss'),
    ('tflops', 'TFLOP/s'),
    ('gflop_per_step', 'GFLOP'),
    ('gb_per_second', 'GB/s'),
    ('memory_mb', 'MB'),
    ('points', 'points'),
)
SETTINGS = ('peak_tflops', 'paper_v100_hours_over_it', 'gpu_memory_mib')


def main() -> None:
    """Appends the rows of finished items."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='the JSON files of gpu.py')
    parser.add_argument('--csv', type=Path, default=Path(__file__).parents[1] / 'results' / 'gpu.csv')
    parser.add_argument('--commit', help="that was measured; default: the checkout's")
    parser.add_argument('--date', help='of the measurement; default: today')
    arguments = parser.parse_args()
    known = {(row['what'], row['seed']) for row in read(arguments.csv)} if arguments.csv.exists() else set()
    new = [row for row in rows(arguments.folder) if (row['what'], str(row.get('seed', ''))) not in known]
    given = {key: value for key in ('commit', 'date') if (value := getattr(arguments, key))}
    append(arguments.csv, new, command=COMMAND, **given)
    print(f'{len(new)} rows')


def rows(folder: Path) -> Iterator[dict]:
    """Yields the rows of the finished items in a folder of gpu.py's JSON files."""
    versions = read_json(folder / 'peak.json').get('items', {}).get('versions', {}).get('figures', {})
    packages = {'python': versions.get('python'), **(versions.get('packages') or {})}
    shared = {
        'machine': f'{versions.get("gpu")}, {versions.get("cpu_cores")} CPU cores',
        'versions': ', '.join(f'{name} {packages[name]}' for name in ('jax', 'torch', 'python') if packages.get(name)),
    }
    for path in sorted(folder.glob('*.json')):
        report = read_json(path)
        for name, item in report['items'].items():
            if item['state'] != DONE or report['rehearsal'] or name == 'summary':  # computed from the others
                continue
            name, _, seed = name.partition('_seed')
            for what, figure in _figures(item['figures'], f'gpu.{report["stage"]}.{name}'):
                yield {'what': what, 'seed': seed, **figure, **shared}


def _figures(figures: dict, path: str) -> Iterator[tuple[str, dict]]:
    """Yields key and columns of every measured number; a median with its interval is one row."""
    for key, value in figures.items():
        inner, unit = f'{path}.{key}', next((unit for part, unit in UNITS if re.search(part, f'{path}.{key}')), None)
        if isinstance(value, dict) and 'median' in value:
            if value['median'] is not None:
                yield inner, {'value': value['median'], 'low': value['low'], 'high': value['high'], 'unit': 'ratio'}
        elif isinstance(value, dict):
            yield from _figures(value, inner)
        elif isinstance(value, int | float) and unit and not any(part in SETTINGS for part in inner.split('.')):
            yield inner, {'value': value, 'unit': unit}


if __name__ == '__main__':
    main()
