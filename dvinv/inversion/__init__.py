"""The heart: pixels are optimised until a frozen teacher is sure of them and finds their statistics familiar.

Pure functions, no files (but of moments) and no flags. Read in the order settings, teacher, tap, nnx_tap, moments,
recording, augmentation, losses, priors, objective, execution, canvas, step, programs, invert.
"""

from dvinv.inversion.invert import (
    Inversion,
    attention_of,
    balanced_labels,
    check_labels,
    check_resolutions,
    check_statistics,
    feature_loss,
    invert,
    make_feature_loss,
    make_inverter,
    takes_resolutions,
)
from dvinv.inversion.moments import Moments
from dvinv.inversion.presets import PRESETS, preset_for
from dvinv.inversion.recording import record_moments
from dvinv.inversion.settings import InversionConfig, Stage, Weights
from dvinv.inversion.teacher import Teacher, from_linen, from_nnx

__all__ = [
    'PRESETS',
    'Inversion',
    'InversionConfig',
    'Moments',
    'Stage',
    'Teacher',
    'Weights',
    'attention_of',
    'balanced_labels',
    'check_labels',
    'check_resolutions',
    'check_statistics',
    'feature_loss',
    'from_linen',
    'from_nnx',
    'invert',
    'make_feature_loss',
    'make_inverter',
    'preset_for',
    'record_moments',
    'takes_resolutions',
]
