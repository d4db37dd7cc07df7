"""Adaptive DeepInversion: images are made against the student of their round, which learns from them meanwhile."""

import contextlib
import itertools
import shutil

import numpy as np
import pytest
from smoke import lasting, smoke_config

from dvinv.config import parse
from dvinv.data.pool import ImagePool
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.trainer import Training

ROUNDS, EVERY = 4, 4


def adaptive_config(finished, **changes):
    """Four rounds of one batch; teacher and verifier are the finished run's."""
    weights = {f'{role}__weights': str(finished / 'networks' / f'{role}.safetensors') for role in ('teacher', 'verifier')}
    fields = {
        'synthesis__method': 'adaptive',
        'synthesis__images': 20 * ROUNDS,
        'synthesis__batches_per_round': 1,
        'synthesis__weights__competition': 10.0,
        'distillation__updates_per_round': EVERY,
        'distillation__controls': (),
        'tasks': ('teacher', 'synthesis', 'distillation'),
        'devices': 1,
    }
    return smoke_config(**{**fields, **weights, **changes})


@pytest.fixture(scope='module')
def adaptive(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('adaptive') / 'run'
    return workdir, pipeline.run(adaptive_config(finished), workdir)


def shards(workdir):
    return ImagePool(workdir / 'pool', '').numbers()


def test_figures_tell_rounds_and_batches(adaptive):
    _, figures = adaptive
    made = figures['synthesis']
    assert (made['images'], made['batches'], made['rounds']) == (20 * ROUNDS, ROUNDS, ROUNDS)
    assert figures['distillation']['updates'] == 20


def test_each_batch_competes_with_the_student_of_its_round(adaptive, finished, monkeypatch, tmp_path):
    """Sidecars tell the student's age; what reaches the synthesizer are its variables at that age."""
    seen = []
    original = Synthesizer.fill

    def fill(self, numbers, student_variables=None, **notes):
        seen.append((numbers, notes, student_variables))
        original(self, numbers, student_variables, **notes)

    monkeypatch.setattr(Synthesizer, 'fill', fill)
    pipeline.run(adaptive_config(finished, tasks=('teacher', 'synthesis')), tmp_path / 'run')
    assert [(numbers, notes) for numbers, notes, _ in seen] == [
        ([number], {'round': number, 'student_updates': EVERY * number}) for number in range(ROUNDS)
    ]
    kernels = [variables['params']['Conv_0']['kernel'] for *_, variables in seen]
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(kernels))
    pool, other = (sorted((path / 'pool').iterdir()) for path in (adaptive[0], tmp_path / 'run'))
    assert [path.read_bytes() for path in pool] == [path.read_bytes() for path in other]


def test_the_methods_differ_by_one_field(adaptive, finished, tmp_path):
    """Plain DeepInversion with the same rounds: the images differ, the student's start and schedule do not."""
    figures = pipeline.run(
        adaptive_config(finished, synthesis__method='deepinversion', tasks=('teacher', 'synthesis')), tmp_path / 'run'
    )
    assert figures['synthesis']['rounds'] == ROUNDS
    with (
        np.load(tmp_path / 'run' / 'pool' / 'shard-000001.npz') as plain,
        np.load(adaptive[0] / 'pool' / 'shard-000001.npz') as competing,
    ):
        np.testing.assert_array_equal(plain['labels'], competing['labels'])
        assert (plain['images'] != competing['images']).mean() > 0.01


def test_a_run_killed_three_times_ends_with_the_bits_of_an_undisturbed_one(adaptive, finished, tmp_path, monkeypatch):
    config, run = adaptive_config(finished), tmp_path / 'run'
    fill, advance = Synthesizer.fill, Training.advance

    def killed_in_a_round(self, numbers, *args, **notes):
        fill(self, numbers, *args, **notes)
        if notes['round'] == 1:
            (run / 'pool' / 'shard-000001.json').unlink()  # killed before the batch was there
            raise KeyboardInterrupt

    def killed_between_rounds(self, images, labels, until):
        advance(self, images, labels, until)
        if until == 2 * EVERY:
            raise KeyboardInterrupt

    def killed_after_the_last_round(self, images, labels, until):
        if until == 20:
            advance(self, images, labels, 15)  # beyond the last round's start
            raise KeyboardInterrupt
        advance(self, images, labels, until)

    for owner, name, killed in (
        (Synthesizer, 'fill', killed_in_a_round),
        (Training, 'advance', killed_between_rounds),
        (Training, 'advance', killed_after_the_last_round),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(config, run)
    pipeline.run(config, run)
    undisturbed, resumed = lasting(adaptive[0]), lasting(run)
    # The third kill stopped the student at update 15, which left a line of metrics there.
    assert {name for name in {*undisturbed, *resumed} if undisturbed.get(name) != resumed.get(name)} <= {'metrics.jsonl'}


def test_a_lost_batch_of_an_earlier_round_is_told(adaptive, finished, tmp_path):
    run = shutil.copytree(adaptive[0], tmp_path / 'run')
    (run / 'pool' / 'shard-000001.json').unlink()
    with pytest.raises(
        DvinvError, match=r'Batch 1 is missing.*against the student at update 4, which has since been'
    ) as told:
        pipeline.run(adaptive_config(finished), run)
    student = run / 'networks' / 'student.safetensors'
    assert f'delete {run / "checkpoints" / "student"} and {student}' in str(told.value)
    shutil.rmtree(run / 'checkpoints' / 'student')
    student.unlink()
    pipeline.run(adaptive_config(finished), run)
    expected, remade = lasting(adaptive[0]), lasting(run)
    assert sorted(remade.pop('metrics.jsonl').splitlines()) == sorted(expected.pop('metrics.jsonl').splitlines())
    assert remade == expected


def test_a_student_is_not_taught_from_a_pool_with_gaps(adaptive, finished, tmp_path):
    run = shutil.copytree(adaptive[0], tmp_path / 'run')
    (run / 'pool' / 'shard-000001.json').unlink()
    (run / 'networks' / 'student.safetensors').unlink()
    with pytest.raises(DvinvError, match=r'Batch 1 is missing from .*; run the task synthesis first'):
        pipeline.run(adaptive_config(finished, tasks=('distillation',)), run)


def test_a_curve_of_students_by_image_count(adaptive, finished, tmp_path):
    """`counts`: students of the first images of the pool; the last of all of them."""
    config = adaptive_config(finished, pool=str(adaptive[0] / 'pool'), distillation__counts=(20, 80))
    figures = pipeline.run(config, tmp_path / 'run')['distillation']
    assert figures['test_accuracy_of_80_images'] == figures['test_accuracy']  # an existing pool is there from the start
    with contextlib.closing(Workdir(tmp_path / 'run', parse(config))) as workdir:
        few, many = (workdir.network(f'student_of_{count}').read_bytes() for count in (20, 80))
        assert few != many == workdir.network('student').read_bytes()


def test_a_curve_of_accuracy_by_images_seen(adaptive, finished, tmp_path):
    """`curve_points`: the same student is also scored on the way, in the rounds of the synthesis too."""
    tasks = ('teacher', 'synthesis', 'distillation', 'report')
    config = adaptive_config(finished, distillation__curve_points=4, distillation__controls=('noise',), tasks=tasks)
    figures = pipeline.run(config, tmp_path / 'run')['distillation']
    assert figures['test_accuracy'] == adaptive[1]['distillation']['test_accuracy']
    updates = config.distillation.updates
    scores = {name: score for name, score in figures.items() if '_after_' in name}
    names = {f'test_accuracy_after_{updates * point // 4}_updates' for point in (1, 2, 3)}
    assert scores.keys() == names | {f'noise_{name}' for name in names}
    assert all(0 <= score <= 1 for score in scores.values())
    assert 'Student accuracy against images seen' in (tmp_path / 'run' / 'report.html').read_text()
    networks = tmp_path / 'run' / 'networks'
    for lost in (
        networks / 'student_after_5.safetensors',
        networks / 'noise.safetensors',
        tmp_path / 'run' / 'results.json',
    ):
        lost.unlink()
    with pytest.raises(
        DvinvError, match=r'student_after_5.safetensors is missing, a point of the curve .* delete .*student'
    ):
        pipeline.run(config, tmp_path / 'run')
    assert not (networks / 'noise.safetensors').exists()  # the error is raised before any control is trained
