"""Which packages make the images, under which settings. Others make other bits.

A run may go on under other packages, which is said, and differs in last bits. Settings of JAX that change random numbers or
precision would make images of two kinds in one pool: under others than its own a run does not go on.
"""

import enum
import importlib.metadata
import json
import os
import sys
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
    """{package: its version here}, dvinv's among them, and {setting: its value here}."""
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
    """Refuse to go on with a run under other settings of JAX than it had.

    Raises:
      DvinvError: names the settings, and how to set them as they were.
    """
    there, here = _recorded(folder), versions()
    differing = [name for name in SETTINGS if name in there and name in here and there[name] != here[name]]
    if differing:
        assigned = ' '.join(_assigned(name, there) for name in differing)
        raise DvinvError(
            f'{folder} holds a run under other settings of JAX: {differing_from(folder, differing)}. Its images would be of '
            f'two kinds; set them as they were ({assigned} in the environment), or choose another --workdir.'
        )


def _assigned(name: str, values: dict) -> str:
    """Returns what to do in the environment, that a setting of JAX has its value."""
    return f'no {name.upper()}' if values[name] == 'None' else f'{name.upper()}={values[name]}'


def record(folder: Path) -> None:
    """Leave the versions in the work directory, and tell where a run goes on under others than it had."""
    if differing := differing_from(folder):
        print(
            f'This run goes on under other versions: {differing}. What is made from now on may differ from what would have '
            'been made, in its last bits.',
            file=sys.stderr,
        )
    write_atomic(folder / FILE, (json.dumps(versions(), indent=2, sort_keys=True) + '\n').encode())


def differing_from(folder: Path, names: list[str] | None = None) -> str:
    """'jax 0.10.2 there, 0.12.0 here' and so on, against the versions that the run left there; '' where nothing differs.

    Args:
      names: of the packages and settings to look at; None: all. Settings that are not recorded are passed over.
    """
    there, here = _recorded(folder), versions()
    if not there:
        return ''
    names = [name for name in here if name in there or name in ('dvinv', *PACKAGES)] if names is None else names
    return listed(
        [
            f'{name} {there.get(name) or "none"} there, {here[name] or "none"} here'
            for name in names
            if there.get(name) != here[name]
        ],
        8,
    )


def _recorded(folder: Path) -> dict:
    """Returns what the run left last; {} where there is nothing that can be read."""
    try:
        return dict(json.loads((folder / FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
