"""The presets carry the published settings; one is chosen by the images' size where none is named."""

import pytest
from smoke import smoke_config

from dvinv import PRESETS
from dvinv.config import Stage, default_config, parse, preset_for
from dvinv.pipeline import tasks as pipeline

# The published settings: (iterations, resolution, jitter) a stage, then betas, bounds of the learning rate, and so on.
IMAGENET = {
    'betas': (0.5, 0.9),
    'rate': (0.2, 0.25),
    'warmup': 100,
    'schedule': 'cosine',
    'clip': True,
    'flip': True,
    'feature': 0.01,
    'first': 10,
    'tv': 1e-4,
    'l2': 1e-5,
    'norm': 'image',
    'competition': 0.2,
}
TABLE = {
    'imagenet_multires': {**IMAGENET, 'stages': [(2000, 112, 15), (1000, 224, 30)]},
    'imagenet_2k': {**IMAGENET, 'stages': [(2000, 0, 30)]},
    'imagenet_20k': {
        'stages': [(20000, 0, 30)],
        'betas': (0.9, 0.999),
        'rate': (0.05, 0.05),
        'warmup': 0,
        'schedule': 'constant',
        'clip': False,
        'flip': True,
        'feature': 0.01,
        'first': 1,
        'tv': 1e-4,
        'l2': 0,
        'norm': 'image',
        'competition': 0.2,
    },
    'cifar10_paper': {
        'stages': [(2000, 0, 2)],
        'betas': (0.9, 0.999),
        'rate': (0.05, 0.05),
        'warmup': 0,
        'schedule': 'constant',
        'clip': False,
        'flip': False,
        'feature': 10,
        'first': 1,
        'tv': 2.5e-5,
        'l2': 3e-8,
        'norm': 'batch',
        'competition': 10,
    },
    'cifar10_better': {
        'stages': [(2000, 0, 2)],
        'betas': (0.9, 0.999),
        'rate': (0.1, 0.1),
        'warmup': 0,
        'schedule': 'constant',
        'clip': False,
        'flip': False,
        'feature': 10,
        'first': 1,
        'tv': 1e-3,
        'l2': 0,
        'norm': 'batch',
        'competition': 0,
    },
}


@pytest.mark.parametrize('name', TABLE)
def test_presets_are_the_published_settings(name):
    preset, row = PRESETS[name], TABLE[name]
    preset.validate_for((224, 224, 3) if name.startswith('imagenet') else (32, 32, 3))
    assert [(stage.iterations, stage.resolution, stage.jitter) for stage in preset.stages] == row['stages']
    for stage in preset.stages:
        assert (stage.beta1, stage.beta2) == row['betas']
        assert row['rate'][0] <= stage.learning_rate <= row['rate'][1]
        assert (stage.warmup, stage.schedule, stage.clip, stage.flip) == tuple(
            row[field] for field in ('warmup', 'schedule', 'clip', 'flip')
        )
        assert stage.augmentation == 'roll'
    weights = preset.weights
    assert (
        weights.main,
        weights.feature,
        weights.first_bn_multiplier,
        weights.total_variation,
        weights.l2,
        weights.competition,
    ) == (1, *(row[field] for field in ('feature', 'first', 'tv', 'l2', 'competition')))
    assert (preset.total_variation, preset.l2, preset.prior_on) == ('l2', row['norm'], 'view')


@pytest.mark.parametrize(
    ('shape', 'name'),
    [
        ((4, 4, 1), '8px'),
        ((8, 8, 1), '8px'),
        ((28, 28, 1), '32px'),
        ((64, 48, 13), '32px_color'),
        ((32, 32, 2), '32px'),
        ((128, 8, 3), '8px'),
        ((96, 160, 3), '128px'),
        ((224, 224, 3), '224px'),
        ((600, 400, 3), '224px'),
    ],
)
def test_a_preset_is_chosen_by_the_shorter_side(shape, name):
    assert preset_for(shape) == name
    PRESETS[name].validate_for(shape)


def test_a_config_without_a_preset_is_filled_by_image_size_and_what_is_set_stays():
    config = default_config()
    config.synthesis.weights.feature = 3.0
    config.synthesis.precision = 'bfloat16'
    assert parse(config).synthesis.is_open
    settings = parse(config).with_preset(PRESETS['32px']).inversion_config()
    assert settings.stages == PRESETS['32px'].stages
    assert (settings.weights.feature, settings.weights.total_variation, settings.precision) == (3.0, 2e-3, 'bfloat16')
    config = default_config()
    config.synthesis.stages = ({'iterations': 5, 'learning_rate': 0.1},)
    settings = parse(config).with_preset(PRESETS['8px']).inversion_config()
    assert settings.weights == PRESETS['8px'].weights
    assert settings.stages == (Stage(5, 0.1),)


def test_a_named_preset_is_not_touched():
    config = default_config('cifar10_crop')
    assert not parse(config).synthesis.is_open
    assert parse(config).inversion_config() == PRESETS['cifar10_crop']


def test_a_run_asks_the_teacher_for_the_size():
    config = smoke_config(teacher__factory='factories:own', verifier__network='', distillation__controls=())
    config.synthesis.update(
        {name: value for name, value in default_config().synthesis.items() if name in ('stages', 'parameterization')}
    )
    assert pipeline.validated(config).settings.inversion_config().stages == PRESETS['8px'].stages
