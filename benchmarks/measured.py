"""Measured figures as rows of CSV files: results/*.csv, and what table.py, step_time.py and gpu_rows.py write.

A row is one measured cell. Columns:

  what: a key, the same in all rows that differ in the seed alone; 'digits.student'.
  value: a number.
  unit: one of UNITS; a share is of 1.
  seed: of the run; empty where the value is a mean or belongs to no seed.
  n, std: number of values behind a mean or median, and their sample standard deviation.
  low, high: interval of a median.
  commit, date, machine, versions, command: what measured it; empty where that is not known.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

COLUMNS = ('what', 'value', 'unit', 'seed', 'n', 'std', 'low', 'high', 'commit', 'date', 'machine', 'versions', 'command')
UNITS = (
    *('share', 'points', 'ratio', 'loss', 'nats', 'count', 's', 'ms', 'min', 'h', '1/s'),
    *('B', 'MB', 'GB/s', 'GFLOP', 'GFLOP/s', 'TFLOP/s'),
)


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file.

    Raises:
      ValueError: columns other than COLUMNS.
    """
    with open(path, newline='') as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f'{path} has the columns {reader.fieldnames}; it must have {", ".join(COLUMNS)}.')
        return list(reader)


def append(path: Path, rows: Iterable[Mapping], **provenance: str) -> None:
    """Adds rows to a CSV file, which is made where it does not exist.

    Args:
      rows: what, value and unit each, and any other columns.
      provenance: columns that all rows share, in place of those of this process.

    Raises:
      ValueError: a column that is not in COLUMNS.
    """
    shared = this_process() | provenance
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='', lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerows(shared | dict(row) for row in rows)


def this_process() -> dict[str, str]:
    """Returns commit, date, machine, versions and command of this process, without paths of this machine."""
    root = Path(__file__).resolve().parents[1]
    git = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--exclude=*']
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ''  # no clone, or no git
    arguments = [re.sub(r'(^|=)/.*/', r'\1', part) for part in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    program = script.relative_to(root) if script.is_relative_to(root) else script.name
    versions = [f'{name} {_version(name)}' for name in ('jax', 'flax', 'optax') if _version(name)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return {
        'commit': commit,
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'machine': f'{_processor()}, {cores} cores',
        'versions': ', '.join([*versions, f'python {platform.python_version()}']),
        'command': shlex.join(['python', str(program), *arguments]),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ''


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.machine())
