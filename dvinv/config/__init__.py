"""Every setting of a run, once: frozen dataclasses that validate themselves, and the ConfigDict that config files change."""

from dvinv.config.inversion import InversionConfig, Stage, Weights
from dvinv.config.parsing import RENAMED, current_name, default_config, parse, parse_group
from dvinv.config.presets import PRESETS, preset_for
from dvinv.config.settings import (
    CONTROLLED,
    DATA_FREE_CONTROLS,
    TASKS,
    DataSettings,
    LoggingSettings,
    MoreVerifierSettings,
    Settings,
    StudentSettings,
    SynthesisSettings,
    TeacherSettings,
    VerifierSettings,
    nested,
)
from dvinv.config.smoke import shrink
from dvinv.config.tasks import (
    BITS,
    CONTINUAL_LOSSES,
    ContinualSettings,
    DistillationSettings,
    PruningSettings,
    QuantizationSettings,
    bits_of,
)
from dvinv.config.training import LabelTrainingSettings, TrainingSettings, validate_devices

__all__ = [
    'BITS',
    'CONTINUAL_LOSSES',
    'CONTROLLED',
    'DATA_FREE_CONTROLS',
    'PRESETS',
    'RENAMED',
    'TASKS',
    'ContinualSettings',
    'DataSettings',
    'DistillationSettings',
    'InversionConfig',
    'LabelTrainingSettings',
    'LoggingSettings',
    'MoreVerifierSettings',
    'PruningSettings',
    'QuantizationSettings',
    'Settings',
    'Stage',
    'StudentSettings',
    'SynthesisSettings',
    'TeacherSettings',
    'TrainingSettings',
    'VerifierSettings',
    'Weights',
    'bits_of',
    'current_name',
    'default_config',
    'nested',
    'parse',
    'parse_group',
    'preset_for',
    'shrink',
    'validate_devices',
]
