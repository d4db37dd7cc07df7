"""`--plan`: figures before the spend, and nothing written."""

import re

import pytest
from smoke import smoke_config

from dvinv import DvinvError
from dvinv.plan import Plan, StagePlan, plan


def test_the_plan_multiplies_out():
    stages = StagePlan(16, 100, 2.0, 0.5, 10_000_000), StagePlan(32, 50, 8.0, 2.0, 40_000_000)
    made = Plan('gpu', 4, 10 * 84, 10, 4, stages, 7.0, 1_500_000)
    assert made.seconds_per_batch == (100 * 0.5 + 50 * 2.0) / 4
    assert made.seconds == 3 * 150  # the last two batches take as long as four
    text = str(made)
    assert '840 images in 10 batches, 4 side by side; 4 gpu devices' in text
    assert re.search(r'^ +32 +50 +8\.0 +2\.0000 +4 +40$', text, re.M)
    assert 'the whole pool: 0.12 h (7 min 30 s), 1.5 MB' in text


@pytest.mark.parametrize('method', ['deepinversion', 'adaptive'])
def test_figures_of_a_config(method):
    config = smoke_config(devices=2, synthesis__batches_per_round=1, distillation__updates_per_round=5)
    config.synthesis.update(method=method)
    config.synthesis.weights.competition = 1.0
    made = plan(config)
    assert (made.images, made.batches, made.devices) == (40, 2, 1 if method == 'adaptive' else 2)
    (stage,) = made.stages
    assert (stage.resolution, stage.iterations) == (8, 5)
    assert stage.seconds > 0
    assert stage.memory > 8 * 8 * 4 * 20
    assert made.pool_bytes == 40 * (64 + 4 * 10)


def test_the_competitor_counts():
    config = smoke_config(devices=1, synthesis__batches_per_round=1, distillation__updates_per_round=5)
    config.synthesis.weights.competition = 1.0
    alone = plan(config).stages[0].gflops
    config.synthesis.method = 'adaptive'
    assert alone < plan(config).stages[0].gflops < 2 * alone


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'synthesis__method': 'noise'}, "synthesis.method is 'noise': no image is optimised"),
        ({'synthesis__images': 41}, 'synthesis.images is 41'),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, words):
    with pytest.raises(DvinvError, match=words):
        plan(smoke_config(**changes))


def test_the_command_writes_nothing(command, tmp_path):
    status, out, err = command('--plan', '--workdir', tmp_path / 'run')
    assert (status, err) == (0, '')
    assert out.startswith('40 images in 2 batches, 2 side by side; 2 cpu devices\n')
    assert not (tmp_path / 'run').exists()
