"""Inversion, the core of dvinv: images are optimized until a frozen teacher is confident and their statistics match.

The package consists of pure functions. It reads no flags and no files except those with recorded moments. A good order to
read it is statistics, capture, tap, linen_modules, nnx_models, teacher, recording, augmentation, losses, step, programs,
invert. Settings are in dvinv.config.
"""

from dvinv.inversion.invert import (
    Inversion,
    attention_of,
    balanced_labels,
    feature_loss,
    invert,
    make_inverter,
    takes_resolutions,
    validate_labels,
    validate_resolutions,
    validate_statistics,
)
from dvinv.inversion.programs import make_feature_loss
from dvinv.inversion.recording import record_moments
from dvinv.inversion.statistics import Moments
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
