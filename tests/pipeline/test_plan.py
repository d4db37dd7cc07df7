"""`--plan`: figures before the spend, and nothing written."""

import re
from runpy import run_path

import numpy as np
import pytest
from smoke import ROOT, smoke_config
from tiny import saved

import dvinv.pipeline.plan
from dvinv import DvinvError
from dvinv.pipeline.plan import Plan, StagePlan, SynthesisPlan, TrainingPlan, plan


@pytest.fixture(autouse=True)
def no_longer_than_needed(monkeypatch):
    monkeypatch.setattr(dvinv.pipeline.plan, 'TIMED_SECONDS', 0.0)


def test_the_plan_multiplies_out():
    stages = StagePlan(16, 100, 2.0, 0.5, 10_000_000), StagePlan(32, 50, 8.0, 2.0, 40_000_000)
    synthesis = SynthesisPlan('gpu', 4, 10 * 84, 10, 4, stages, 1_500_000, pools=2.0)
    assert synthesis.seconds_per_batch == (100 * 0.5 + 50 * 2.0) / 4
    assert synthesis.seconds == 3 * 150  # the last two batches take as long as four
    assert synthesis.pflop == pytest.approx((100 * 2 + 50 * 8) / 4 * 10 / 1e6)
    training = TrainingPlan('student', 3, 1000, 64, 20.0, 0.1, 7.0)
    made = Plan(synthesis, (training,), '4 gpu devices')
    assert made.compile_seconds == 7
    assert made.seconds == 2 * 450 + 3 * 1000 * 0.1
    assert made.pflop == pytest.approx(2 * synthesis.pflop + 3 * 1000 * 20 / 1e6)
    text = str(made)
    assert text.startswith('840 images in 10 batches, 4 side by side; 4 gpu devices\n')
    assert re.search(r'^ +32 +50 +8\.0 +2\.0000 +4 +40$', text, re.M)
    assert 'the pool: 0.12 h (7 min 30 s), 0.0015 PFLOP, 1.5 MB' in text
    assert re.search(r'^ +student +3 +1,000 +64 +20\.0 +0\.1000 +200 +0\.06 +0\.08$', text, re.M)
    assert 'all tasks: 0.33 h (20 min 00 s), 0.063 PFLOP' in text


@pytest.mark.slow
def test_figures_of_a_config():
    made = plan(smoke_config(devices=2))
    synthesis = made.synthesis
    assert (synthesis.images, synthesis.batches, synthesis.side_by_side, synthesis.devices) == (40, 2, 2, 2)
    assert synthesis.pools == 2  # one more without the feature term
    (stage,) = synthesis.stages
    assert (stage.resolution, stage.iterations) == (8, 5)
    assert stage.seconds > 0
    assert stage.memory > 8 * 8 * 4 * 20
    assert synthesis.pool_bytes == 40 * (64 + 4 * 10)
    found = [(one.name, one.networks, one.updates) for one in made.trainings]
    assert found == [('teacher', 1, 20), ('verifier', 1, 20), ('student', 4, 20)]
    assert all(one.seconds > 0 and one.gflops > 0 for one in made.trainings)


@pytest.mark.slow
def test_images_of_a_network_with_attention_are_planned():
    config = run_path(str(ROOT / 'configs' / 'digits_vit.py'))['get_config']('smoke')
    config.update(tasks=('synthesis',), verifier={'network': ''})
    config.teacher.update(factory='factories:attentive', moments_images=0)
    config.synthesis.weights.update(feature=0.0, patch_similarity=0.1)
    made = plan(config)
    assert made.synthesis.stages[0].seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'task', 'expected'),
    [
        ('digits_prune', 'pruning', ('pruned', 3, 40)),
        ('digits_continual', 'continual', ('continual', 6, 20)),
        ('digits_quantize', 'quantization', ('quantized', 1, 20)),
    ],
)
def test_every_task_that_trains_is_planned(name, task, expected):
    config = run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']('smoke')
    config.update(tasks=(task,), pool='')
    config.synthesis.method = 'noise'
    (training,) = plan(config).trainings
    assert (training.name, training.networks, training.updates) == expected


@pytest.mark.slow
def test_the_competitor_counts():
    config = smoke_config(devices=1, synthesis__batches_per_round=1, distillation__updates_per_round=5)
    config.tasks = ('synthesis',)
    config.synthesis.weights.competition = 1.0
    alone = plan(config).synthesis.stages[0].gflops
    config.synthesis.method = 'adaptive'
    made = plan(config)
    assert alone < made.synthesis.stages[0].gflops < 2 * alone
    assert [(training.name, training.networks) for training in made.trainings] == [('student', 1)]  # which learns meanwhile


@pytest.mark.slow
def test_given_networks_need_no_training_images(tmp_path):
    weights = saved(tmp_path / 'teacher.safetensors', 'small_convnet', 10, (8, 8, 1))
    np.savez(tmp_path / 'test.npz', x=np.zeros((20, 8, 8, 1), np.uint8), y=np.arange(20) % 10)
    config = smoke_config(
        teacher__network='small_convnet',
        teacher__weights=weights,
        teacher__width=0.125,
        teacher__mean=(),
        teacher__std=(),
        verifier__network='',
        data__name='npz',
        data__path=str(tmp_path / 'test.npz'),
        tasks=('teacher', 'distillation'),
        synthesis__method='noise',
        distillation__controls=(),
    )
    assert [training.name for training in plan(config).trainings] == ['student']


@pytest.mark.slow
def test_without_images_to_optimize_the_trainings_are_planned():
    made = plan(smoke_config(synthesis__method='noise', distillation__controls=()))
    assert made.synthesis is None
    assert [one.name for one in made.trainings] == ['teacher', 'verifier', 'student']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'synthesis__method': 'noise', 'tasks': ('synthesis',)},
            "synthesis.method is 'noise' and no task trains a network",
        ),
        ({'synthesis__images': 41}, 'synthesis.images is 41'),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, words):
    with pytest.raises(DvinvError, match=words):
        plan(smoke_config(**changes))


@pytest.mark.slow
def test_the_command_writes_nothing(command, tmp_path):
    status, out, err = command('--plan', '--workdir', tmp_path / 'run', "--config.tasks=('synthesis', 'distillation')")
    assert (status, err.count('\n')) == (0, 1), err  # a line of versions
    assert out.startswith('40 images in 2 batches, 2 side by side; 2 cpu devices\n')
    assert 'trainings on 1 cpu device\n' in out
    assert not (tmp_path / 'run').exists()
