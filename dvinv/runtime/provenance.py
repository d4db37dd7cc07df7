"""How a run came about, in words for people: by which command, on which devices, with which packages."""

import os
import platform
import shlex
import sys
from collections import Counter
from pathlib import Path

from dvinv.runtime.devices import cores, local_devices
from dvinv.runtime.versions import PACKAGES, versions


def command() -> str:
    """Returns the command line that started this process; '' where it was not dvinv's, as in a notebook."""
    program, *arguments = sys.argv or ['']
    path = Path(program)
    if path.name == 'main.py' and path.parent.name == 'dvinv':
        return shlex.join(['python', '-m', 'dvinv.main', *arguments])
    return shlex.join(['dvinv', *arguments]) if path.stem == 'dvinv' else ''


def devices() -> str:
    """Returns the devices that JAX uses here, by name; of a CPU its name and how many cores of it may be used."""
    kinds = Counter(device.device_kind for device in local_devices() if device.platform != 'cpu')
    if kinds:
        return ', '.join(f'{count} x {kind}' if count > 1 else kind for kind, count in kinds.items())
    return f'CPU ({_processor()}), {cores()} core{"s" if cores() > 1 else ""}'


def _processor() -> str:
    """Returns the name of the CPU as Linux tells it, else what Python knows of it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [value.strip() for name, _, value in (line.partition(':') for line in lines) if name.strip() == 'model name']
    return names[0] if names else platform.processor() or platform.machine() or os.name


def packages() -> str:
    """Returns the versions of dvinv, Python and the packages that the results depend on."""
    found = versions()
    names = ('dvinv', *PACKAGES)
    return ', '.join([*(f'{name} {found[name]}' for name in names), f'Python {platform.python_version()}'])
