"""The provenance of a run: its command, packages and settings of JAX, on which the bits of its results depend.

A run may be resumed with other packages; a message then says that results may differ in their last bits. Settings of JAX
that change random numbers or precision would mix two kinds of images in one pool, so a run is not resumed under other
settings.
"""

import enum
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import jax

import dvinv
from dvinv.errors import DvinvError, listed
from dvinv.runtime.files import write_atomic

PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'
SETTINGS = (  # names in jax.config; settings that a version of JAX does not have are skipped
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
NO_MATTER = '--xla_force_host_platform_device_count', '--xla_dump'  # flags in XLA_FLAGS without an effect on results
FILE = 'versions.json'


def versions() -> dict[str, str]:
    """Returns the versions of the packages in use, including dvinv, and the values of the settings, in one dict."""
    packages = {'dvinv': dvinv.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    variables = {name: os.environ.get(name, '').split() for name in ENVIRONMENT}
    return {
        **packages,
        **{name: _value(getattr(jax.config, name)) for name in SETTINGS if hasattr(jax.config, name)},
        **{name: ' '.join(sorted(w for w in words if not w.startswith(NO_MATTER))) for name, words in variables.items()},
    }


def _value(setting) -> str:
    """Returns the value of a setting as the text that JAX reads from the environment."""
    if isinstance(setting, enum.Enum):
        setting = setting.value if isinstance(setting.value, str) else setting.name.lower()
    return str(setting)


def refuse_other_settings(folder: Path) -> None:
    """Validates that the settings of JAX are those of the run in a folder.

    Raises:
      DvinvError: they differ; the message names the settings and says how to restore them.
    """
    if differing := _differing(folder, {name: value for name, value in versions().items() if name in SETTINGS}):
        assigned = ' '.join(
            f'no {name.upper()}' if old == 'None' else f'{name.upper()}={old}' for name, (old, _) in differing.items()
        )
        raise DvinvError(
            f'{folder} holds a run under other settings of JAX: {_sentence(differing)}. Its images would be of two kinds; '
            f'set them as they were ({assigned} in the environment), or choose another --workdir.'
        )


def record(folder: Path) -> None:
    """Writes the versions to the work directory, and prints a message if a run is resumed with other versions."""
    current = versions()
    if differing := _differing(folder, current):
        print(
            f'This run goes on under other versions: {_sentence(differing)}. What is made from now on may differ from what '
            'would have been made, in its last bits.',
            file=sys.stderr,
        )
    write_atomic(folder / FILE, (json.dumps(current, indent=2, sort_keys=True) + '\n').encode())


def command() -> str:
    """Returns the command line that started this process; '' if it was not dvinv's, as in a notebook."""
    program, *arguments = sys.argv or ['']
    path = Path(program)
    if path.name == 'main.py' and path.parent.name == 'dvinv':
        return shlex.join(['python', '-m', 'dvinv.main', *arguments])
    return shlex.join(['dvinv', *arguments]) if path.stem == 'dvinv' else ''


def packages() -> str:
    """Returns the versions of dvinv, Python and the packages that the results depend on."""
    found = versions()
    return ', '.join([*(f'{name} {found[name]}' for name in ('dvinv', *PACKAGES)), f'Python {platform.python_version()}'])


def _differing(folder: Path, current: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Returns {name: (recorded value, current value)} of the values in `current` that differ from those a run recorded."""
    try:
        recorded = dict(json.loads((folder / FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {name: (recorded[name], new) for name, new in current.items() if recorded.get(name, new) != new}


def _sentence(differing: dict[str, tuple[str, str]]) -> str:
    return listed([f'{name} {old or "none"} there, {new or "none"} here' for name, (old, new) in differing.items()], 8)
