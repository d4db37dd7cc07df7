"""The bundle that travels to the GPU machine with the checkout: wheels of packages that it lacks, and data."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from dvinv.runtime.errors import DvinvError

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / '.gpu_bundle'
DATA = (
    'cifar10_train_jpeg.npz',
    'cifar10_test_jpeg.npz',
    'imagenet_mobilenet_v1_075_224.npz',
    'imagenet_squeezenet1.1.npz',
    'cifar10_resnet20.npz',
    'cifar10_resnet32.npz',
    'cifar10_lossless_test1000.npz',
    'cifar10_lossless_train4000.npz',
)
MOST_BYTES = 64 * 2**20  # of the checkout and the bundle together
# Of the dependencies in pyproject.toml: what the GPU machine has, and what only data sets need that are not used there.
INSTALLED_THERE = {
    'absl-py',
    'filelock',
    'flax',
    'jax',
    'jaxtyping',
    'jinja2',
    'ml-dtypes',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'packaging',
    'pillow',
    'pyyaml',
    'safetensors',
    'scikit-learn',
    'scipy',
    'typing-extensions',
}
NOT_NEEDED = {'tensorflow-datasets', 'importlib-resources'}
MODULES = {'absl-py': 'absl', 'orbax-checkpoint': 'orbax', 'pillow': 'PIL', 'pyyaml': 'yaml', 'scikit-learn': 'sklearn'}
PYTHON, PLATFORMS = '3.12', ('manylinux_2_28_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')
HOW = 'make it by `python benchmarks/gpu.py --bundle` where the data are, and let it travel with the checkout'


def build(folder: Path = BUNDLE, data: Path | None = None) -> str:
    """Fills the bundle; returns a sentence about its size.

    Args:
      data: the folder of the .npz files; None: DVINV_DATA, or ../shared/data next to the checkout.

    Raises:
      DvinvError: data are missing, wheels cannot be had, or all is too large.
    """
    data = data or Path(os.environ.get('DVINV_DATA') or ROOT.parent / 'shared' / 'data')
    if missing := [name for name in DATA if not (data / name).is_file()]:
        raise DvinvError(f'{data} has no {", ".join(missing)}; set DVINV_DATA to the folder that has them.')
    for part in ('wheels', 'data'):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    for name in DATA:
        shutil.copyfile(data / name, folder / 'data' / name)
    _download(_wanted(), folder / 'wheels')
    return check_size(folder)


def _wanted() -> list[str]:
    """Returns the requirements of dvinv that the GPU machine lacks."""
    requirements = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['dependencies']
    return [line for line in requirements if _name(line) not in INSTALLED_THERE | NOT_NEEDED]


def _name(requirement: str) -> str:
    """Returns the normalised name of the package of a requirement."""
    return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


def _download(requirements: list[str], folder: Path) -> None:
    platforms = [flag for platform in PLATFORMS for flag in ('--platform', platform)]
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', *platforms]
    command += ['--python-version', PYTHON, '--implementation', 'cp', '--dest', str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith('ERROR')] or done.stderr.splitlines()
        raise DvinvError(f'pip cannot download wheels of {", ".join(requirements)}: {" ".join(errors[-1:])}')


def check_size(folder: Path) -> str:
    """Returns a sentence about the sizes of bundle and checkout.

    Raises:
      DvinvError: together they are larger than what travels.
    """
    listed = subprocess.check_output(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True
    )
    checkout = sum(path.stat().st_size for name in listed.split('\0') if name and (path := ROOT / name).is_file())
    bundle = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    sizes = f'{folder.name} has {bundle / 2**20:.1f} MiB and the checkout {checkout / 2**20:.1f} MiB'
    if checkout + bundle > MOST_BYTES:
        raise DvinvError(f'{sizes}, together more than the {MOST_BYTES / 2**20:.0f} MiB that travel; remove what is large.')
    return f'{sizes}, of at most {MOST_BYTES / 2**20:.0f} MiB together.'


def check(folder: Path) -> None:
    """Refuses a bundle that the stages cannot be run with.

    Raises:
      DvinvError: there is none, or it lacks data.
    """
    if not folder.is_dir():
        raise DvinvError(f'There is no bundle at {folder}; {HOW}.')
    if missing := [name for name in DATA if not (folder / 'data' / name).is_file()]:
        raise DvinvError(f'The bundle {folder} lacks data/{", data/".join(missing)}; {HOW}.')


def install(folder: Path, target: Path) -> list[str]:
    """Installs the wheels of packages that are missing here; returns the paths to put on PYTHONPATH.

    Args:
      target: the folder to install into.

    Raises:
      DvinvError: a package is missing, and the bundle has no wheel of it.
    """
    if not _missing():
        return []
    wheels = [str(path) for path in sorted((folder / 'wheels').glob('*.whl'))]
    if wheels:
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--upgrade']
        done = subprocess.run([*command, '--target', str(target), *wheels], capture_output=True, text=True, check=False)
        if done.returncode:
            raise DvinvError(f'The wheels of {folder} cannot be installed: {" ".join(done.stderr.splitlines()[-1:])}')
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()
    if missing := _missing():
        raise DvinvError(f'{", ".join(missing)} is not installed here, and the bundle {folder} has no wheel of it; {HOW}.')
    return [str(target)]


def _missing() -> list[str]:
    """Returns the packages that dvinv needs and that cannot be imported."""
    requirements = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['dependencies']
    names = [name for name in map(_name, requirements) if name not in NOT_NEEDED]
    return [name for name in names if importlib.util.find_spec(MODULES.get(name, name.replace('-', '_'))) is None]
