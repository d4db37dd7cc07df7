"""dvinv: DeepInversion in JAX and Flax. From a trained network alone: images, and with them smaller networks."""

__version__ = '0.1.0'

_EXPORTS = {
    'DvinvError': 'dvinv.errors',
    'InversionConfig': 'dvinv.inversion',
    'PRESETS': 'dvinv.inversion',
    'Stage': 'dvinv.inversion',
    'Teacher': 'dvinv.inversion',
    'Weights': 'dvinv.inversion',
    'balanced_labels': 'dvinv.inversion',
    'feature_loss': 'dvinv.inversion',
    'from_linen': 'dvinv.inversion',
    'from_nnx': 'dvinv.inversion',
    'invert': 'dvinv.inversion',
    'load': 'dvinv.loading',
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    """Import on first use: `python -m dvinv.main` must be able to set up JAX, and answer a typing error, first."""
    if name not in _EXPORTS:
        raise AttributeError(f'module dvinv has no attribute {name!r}')
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
