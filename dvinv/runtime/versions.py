"""How a run came about: by which command, with which packages, under which settings. Others make other bits.

A run may go on under other packages, which is said, and differs in last bits. Settings of JAX that change random numbers or
precision would make images of two kinds in one pool: under others than its own a run does not go on.
"""

import enum
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Container
from pathlib import Path

import jax

import dvinv
from dvinv.errors import DvinvError, listed
from dvinv.runtime.files import write_atomic

PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'
SETTINGS = (  # of jax.config; the versions of JAX that lack one have no entry of it
    'jax_enable_x64',
    'jax_explicit_x64_dtypes',
    'jax_numpy_dtype_promotion',
    'jax_default_matmul_precision',
    'jax_allow_f16_reductions',
    'jax_default_prng_impl',
    'jax_threefry_partitionable',
    'jax_random_seed_offset',
    'jax_high_dynamic_range_gumbel',
    'jax_accurate_erf_inv',
    'jax_softmax_custom_jvp',
    'jax_use_hlo_logistic_lowering',
    'jax_disable_jit',
    'jax_disable_most_optimizations',
    'jax_optimization_level',
    'jax_exec_time_optimization_effort',
    'eager_constant_folding',
)
ENVIRONMENT = 'XLA_FLAGS', 'NVIDIA_TF32_OVERRIDE'
NO_MATTER = '--xla_force_host_platform_device_count', '--xla_dump'  # in XLA_FLAGS
FILE = 'versions.json'


def versions() -> dict[str, str]:
    """Returns {package: its version here}, dvinv's among them, and {setting: its value here}."""
    packages = {'dvinv': dvinv.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    variables = {name: os.environ.get(name, '').split() for name in ENVIRONMENT}
    return {
        **packages,
        **{name: _value(getattr(jax.config, name)) for name in SETTINGS if hasattr(jax.config, name)},
        **{name: ' '.join(sorted(w for w in words if not w.startswith(NO_MATTER))) for name, words in variables.items()},
    }


def _value(setting) -> str:
    """Returns a setting as the text that JAX reads from the environment."""
    if isinstance(setting, enum.Enum):
        setting = setting.value if isinstance(setting.value, str) else setting.name.lower()
    return str(setting)


def refuse_other_settings(folder: Path) -> None:
    """Refuses to go on with a run under other settings of JAX than it had.

    Raises:
      DvinvError: names the settings, and how to set them as they were.
    """
    if differing := _differing(folder, SETTINGS):
        assigned = ' '.join(
            f'no {name.upper()}' if there == 'None' else f'{name.upper()}={there}' for name, (there, _) in differing.items()
        )
        raise DvinvError(
            f'{folder} holds a run under other settings of JAX: {_sentence(differing)}. Its images would be of two kinds; '
            f'set them as they were ({assigned} in the environment), or choose another --workdir.'
        )


def record(folder: Path) -> None:
    """Leaves the versions in the work directory, and says where a run goes on under others than it had."""
    if differing := _differing(folder, versions()):
        print(
            f'This run goes on under other versions: {_sentence(differing)}. What is made from now on may differ from what '
            'would have been made, in its last bits.',
            file=sys.stderr,
        )
    write_atomic(folder / FILE, (json.dumps(versions(), indent=2, sort_keys=True) + '\n').encode())


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
    return ', '.join([*(f'{name} {found[name]}' for name in ('dvinv', *PACKAGES)), f'Python {platform.python_version()}'])


def _differing(folder: Path, names: Container[str]) -> dict[str, tuple[str, str]]:
    """Returns {name: (value there, value here)} of those of `names` that the run left with another value than they have."""
    try:
        there = dict(json.loads((folder / FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    here = {name: value for name, value in versions().items() if name in names and name in there}
    return {name: (there[name], value) for name, value in here.items() if there[name] != value}


def _sentence(differing: dict[str, tuple[str, str]]) -> str:
    return listed([f'{name} {there or "none"} there, {here or "none"} here' for name, (there, here) in differing.items()], 8)
