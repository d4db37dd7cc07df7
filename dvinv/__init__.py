"""dvinv: DeepInversion in JAX and Flax. From a trained network alone: images, and with them smaller networks."""

from typing import TYPE_CHECKING

__version__ = '0.1.0'

if TYPE_CHECKING:  # what `__getattr__` gives, for those who read types without running anything
    from dvinv.configuration import base_config as base_config
    from dvinv.errors import DvinvError as DvinvError
    from dvinv.inversion import PRESETS as PRESETS
    from dvinv.inversion import InversionConfig as InversionConfig
    from dvinv.inversion import Moments as Moments
    from dvinv.inversion import Stage as Stage
    from dvinv.inversion import Teacher as Teacher
    from dvinv.inversion import Weights as Weights
    from dvinv.inversion import balanced_labels as balanced_labels
    from dvinv.inversion import feature_loss as feature_loss
    from dvinv.inversion import from_linen as from_linen
    from dvinv.inversion import from_nnx as from_nnx
    from dvinv.inversion import invert as invert
    from dvinv.inversion import record_moments as record_moments
    from dvinv.loading import load as load
    from dvinv.pipeline import run as run

_EXPORTS = {
    'DvinvError': 'dvinv.errors',
    'InversionConfig': 'dvinv.inversion',
    'Moments': 'dvinv.inversion',
    'PRESETS': 'dvinv.inversion',
    'Stage': 'dvinv.inversion',
    'Teacher': 'dvinv.inversion',
    'Weights': 'dvinv.inversion',
    'base_config': 'dvinv.configuration',
    'balanced_labels': 'dvinv.inversion',
    'feature_loss': 'dvinv.inversion',
    'from_linen': 'dvinv.inversion',
    'from_nnx': 'dvinv.inversion',
    'invert': 'dvinv.inversion',
    'load': 'dvinv.loading',
    'record_moments': 'dvinv.inversion',
    'run': 'dvinv.pipeline',
}
__all__ = list(_EXPORTS)


def __dir__() -> list[str]:
    """List the names that are imported on first use too, for tab completion."""
    return sorted({*globals(), *__all__} - {'TYPE_CHECKING'})


def __getattr__(name: str):
    """Import on first use: `python -m dvinv.main` must be able to set up JAX, and answer a typing error, first."""
    if name not in _EXPORTS:
        raise AttributeError(f'module dvinv has no attribute {name!r}')
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
