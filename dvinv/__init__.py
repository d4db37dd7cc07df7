"""dvinv: DeepInversion in JAX and Flax. Synthesizes images from a trained network only, and smaller networks from them."""

from typing import TYPE_CHECKING

__version__ = '0.1.0'

if TYPE_CHECKING:  # the names that `__getattr__` imports, for tools that read types without running the code
    from dvinv.config import PRESETS as PRESETS
    from dvinv.config import InversionConfig as InversionConfig
    from dvinv.config import Stage as Stage
    from dvinv.config import Weights as Weights
    from dvinv.config import default_config as default_config
    from dvinv.inversion import Moments as Moments
    from dvinv.inversion import Teacher as Teacher
    from dvinv.inversion import balanced_labels as balanced_labels
    from dvinv.inversion import feature_loss as feature_loss
    from dvinv.inversion import from_linen as from_linen
    from dvinv.inversion import from_nnx as from_nnx
    from dvinv.inversion import record_moments as record_moments
    from dvinv.inversion.invert import invert as invert
    from dvinv.pipeline.tasks import run as run
    from dvinv.runtime.errors import DvinvError as DvinvError
    from dvinv.teacher.networks import load as load

_EXPORTS = {
    'DvinvError': 'dvinv.runtime.errors',
    'InversionConfig': 'dvinv.config',
    'Moments': 'dvinv.inversion',
    'PRESETS': 'dvinv.config',
    'Stage': 'dvinv.config',
    'Teacher': 'dvinv.inversion',
    'Weights': 'dvinv.config',
    'balanced_labels': 'dvinv.inversion',
    'default_config': 'dvinv.config',
    'feature_loss': 'dvinv.inversion',
    'from_linen': 'dvinv.inversion',
    'from_nnx': 'dvinv.inversion',
    'invert': 'dvinv.inversion.invert',
    'load': 'dvinv.teacher.networks',
    'record_moments': 'dvinv.inversion',
    'run': 'dvinv.pipeline.tasks',
}
__all__ = list(_EXPORTS)


def __dir__() -> list[str]:
    """Lists all names, including those that are imported on first use, for tab completion."""
    return sorted({*globals(), *__all__} - {'TYPE_CHECKING'})


def __getattr__(name: str):
    """Imports a public name on first use, since `dvinv.main` must set up JAX and report mistyped flags before that."""
    if name not in _EXPORTS:
        raise AttributeError(f'module dvinv has no attribute {name!r}')
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
