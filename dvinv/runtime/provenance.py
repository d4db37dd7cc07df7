"""How a run came about, in words for people: by which command, with which packages."""

import platform
import shlex
import sys
from pathlib import Path

from dvinv.runtime.versions import PACKAGES, versions


def command() -> str:
    """Returns the command line that started this process; '' where it was not dvinv's, as in a notebook."""
    program, *arguments = sys.argv or ['']
    path = Path(program)
    if path.name == 'main.py' and path.parent.name == 'dvinv':
        return shlex.join(['python', '-m', 'dvinv.main', *arguments])
    return shlex.join(['dvinv', *arguments]) if path.stem == 'dvinv' else ''


def packages() -> str:
    """Returns the versions of dvinv, Python and the packages that the results depend on."""
    found = versions()
    names = ('dvinv', *PACKAGES)
    return ', '.join([*(f'{name} {found[name]}' for name in names), f'Python {platform.python_version()}'])
