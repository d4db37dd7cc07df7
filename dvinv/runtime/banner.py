"""The banner of a run: versions, devices, its tasks, the finished ones among them, and the path of the report."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import jax

from dvinv.config import Settings
from dvinv.runtime.devices import jax_option, local_devices

NVIDIA = '0x10de'  # vendor id on the PCI bus
DISPLAY = '0x03'  # prefix of the class of a graphics card on the PCI bus
PCI = Path('/sys/bus/pci/devices')
PLUGINS = 'jax_cuda12_plugin', 'jax_cuda13_plugin'


def announce(settings: Settings, workdir, tasks: Sequence[str], seeds: int = 0) -> None:
    """Prints the banner except for its first line, which `dvinv.main` prints as soon as the flags are read.

    Args:
      settings: the settings of the run.
      workdir: the path of the work directory.
      tasks: the tasks of the settings, in the order in which they run.
      seeds: the number of seeds; 0 for a single run.

    Raises:
      DvinvError: JAX cannot use the requested devices.
    """
    lines = [('devices', device_names(settings.devices))]
    if missed := unused_gpu():
        lines.append(('', missed))
    lines.append(('tasks', ', '.join(tasks)))
    if seeds:
        lines.append(('seeds', f'{settings.seed} to {settings.seed + seeds - 1}, in folders of their own'))
    elif done := done_already(workdir, tasks):
        lines.append(('done', f'{", ".join(done)}: not run again'))
    name = 'report.html' if 'report' in tasks else 'results.json'
    lines.append((name.split('.')[0], str(Path(workdir) / name)))
    for label, text in lines:
        print(f'  {label:9}{text}', file=sys.stderr)
    sys.stderr.flush()


def done_already(workdir, tasks: Sequence[str]) -> list[str]:
    """Returns the tasks that have results in the work directory; a damaged file counts as empty and is reported later."""
    try:
        results = json.loads((Path(workdir) / 'results.json').read_text())
    except (OSError, ValueError):
        return []
    return [task for task in tasks if task != 'report' and task in results]


def device_names(count: int) -> str:
    """Returns a description of the devices that the run uses: the first `count` of this process, or all if it is 0."""
    devices = local_devices()
    kinds = Counter(device.device_kind for device in devices[: count if count > 0 else None])
    if devices[0].platform == 'cpu':
        return f'{kinds.total()} virtual device{"s" if kinds.total() > 1 else ""} of the CPU{_processor()}'
    return ', '.join(f'{number} x {kind}' for kind, number in kinds.items())


def _processor() -> str:
    """Returns the name of the CPU in brackets; '' if Linux does not report one."""
    try:
        about = Path('/proc/cpuinfo').read_text()
    except OSError:
        return ''
    names = [line.partition(':')[2].strip() for line in about.splitlines() if line.startswith('model name')]
    return f' ({" ".join(names[0].split())})' if names else ''


def unused_gpu() -> str:
    """Returns a sentence if this machine has an NVIDIA GPU that JAX does not use, otherwise ''."""
    if jax.default_backend() != 'cpu' or not (name := _gpu()):
        return ''
    here = f'A GPU is there but not used ({name})'
    if platforms := jax_option('jax_platforms'):
        return f'{here}: JAX_PLATFORMS is {platforms!r}.'
    if any(map(find_spec, PLUGINS)):
        return f'{here}, although JAX for CUDA is installed: see whether nvidia-smi and the driver work.'
    return f"{here}: install JAX for it, as by pip install 'jax[cuda12]' (cuda13 for newer drivers)."


def _gpu() -> str:
    """Returns the name of the first NVIDIA GPU by nvidia-smi, or its place on the PCI bus; '' if there is none."""
    if shutil.which('nvidia-smi'):  # many containers have it without a GPU
        try:
            answer = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=5).stdout
        except (OSError, subprocess.TimeoutExpired):
            answer = ''
        if answer.startswith('GPU '):
            return answer.splitlines()[0].partition(': ')[2].partition(' (')[0]
    for device in PCI.glob('*'):
        try:
            vendor, kind = ((device / file).read_text().strip() for file in ('vendor', 'class'))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            return f'NVIDIA, at {device.name} of the PCI bus'
    return ''
