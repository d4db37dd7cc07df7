"""The heart: pixels are optimised until a frozen teacher is sure of them and finds their statistics familiar.

Pure functions, no files (but of moments) and no flags. Read in the order teacher, tap, nnx_tap, moments, recording,
augmentation, losses, priors, objective, execution, parameterization, step, programs, invert; settings are in dvinv.config.
"""

from dvinv.inversion.invert import (
    Inversion,
    attention_of,
    balanced_labels,
    feature_loss,
    invert,
    make_feature_loss,
    make_inverter,
    takes_resolutions,
    validate_labels,
    validate_resolutions,
    validate_statistics,
)
from dvinv.inversion.moments import Moments
from dvinv.inversion.recording import record_moments
from dvinv.inversion.teacher import Teacher, from_linen, from_nnx

__all__ = [
    'Inversion',
    'Moments',
    'Teacher',
    'attention_of',
    'balanced_labels',
    'feature_loss',
    'from_linen',
    'from_nnx',
    'invert',
    'make_feature_loss',
    'make_inverter',
    'record_moments',
    'takes_resolutions',
    'validate_labels',
    'validate_resolutions',
    'validate_statistics',
]
