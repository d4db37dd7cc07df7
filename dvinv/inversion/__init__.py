"""The heart: pixels are optimised until a frozen teacher is sure of them and finds their statistics familiar.

Pure functions, no files and no flags. Read in the order teacher, tap, nnx_tap, augmentation, losses,
objective, execution, parameterization, step, programs, invert; the settings are those of dvinv.config.
"""

from dvinv.inversion.invert import (
    Inversion,
    balanced_labels,
    feature_loss,
    invert,
    make_feature_loss,
    make_inverter,
    takes_resolutions,
    validate_labels,
    validate_resolutions,
)
from dvinv.inversion.teacher import Teacher, from_linen, from_nnx

__all__ = [
    'Inversion',
    'Teacher',
    'balanced_labels',
    'feature_loss',
    'from_linen',
    'from_nnx',
    'invert',
    'make_feature_loss',
    'make_inverter',
    'takes_resolutions',
    'validate_labels',
    'validate_resolutions',
]
