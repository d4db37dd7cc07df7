"""Which packages make the images. Others make other bits: the processes of one run must have the same."""

import importlib.metadata
import json
import sys
from pathlib import Path

import dvinv
from dvinv.errors import listed
from dvinv.runtime.files import state_of, write_atomic

PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'
FILE = 'versions.json'


def versions() -> dict[str, str]:
    """{package: its version here}, dvinv's among them."""
    return {'dvinv': dvinv.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def record(folder: Path) -> None:
    """For the leader: leave its versions in the work directory, and tell where a run goes on under others than it had."""
    if differing := differing_from(folder):
        print(
            f'This run goes on under other versions: {differing}. What is made from now on may differ from what would have '
            'been made, in its last bits.',
            file=sys.stderr,
        )
    write_atomic(folder / FILE, (json.dumps(versions(), indent=2, sort_keys=True) + '\n').encode())


def record_in(folder: Path) -> tuple | None:
    """Which record of versions the leader left last, as the file system tells; None where it has left none."""
    return state_of(folder / FILE)


def differing_from(folder: Path) -> str:
    """'jax 0.10.2 there, 0.12.0 here' and so on, against the versions that the leader left; '' where nothing differs."""
    try:
        theirs = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return ''
    mine = versions()
    return listed(
        [f'{name} {theirs.get(name)} there, {mine[name]} here' for name in mine if theirs.get(name) != mine[name]], 8
    )
