"""The task `continual`: its losses by hand, its tasks and what they refuse, no old image read again, resumed to the bit."""

import contextlib
import dataclasses
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smoke import ROOT, lasting
from tiny import drawn_inverter, saved, trained, trained_variables

import dvinv
import dvinv.synthesis.synthesizer
import dvinv.training
from dvinv import DvinvError
from dvinv.config import ContinualSettings, DataSettings, TrainingSettings
from dvinv.continual import losses, stream
from dvinv.continual import task as driver
from dvinv.continual.task import network_of
from dvinv.data.dataset import Joined, Split
from dvinv.data.pool import ImagePool
from dvinv.data.real import read_digits
from dvinv.inversion.linen_modules import features_in_training
from dvinv.networks import create, load_classifier
from dvinv.networks.naming import grown, head_of
from dvinv.pipeline import tasks as pipeline
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.step import Rounds, TrainJob, chosen_images

# Losses


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def answers():
    """(logits [6, 5], the old network's [6, 3], labels [6]): three new images, then three old ones."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 5)), rng.normal(size=(6, 3)), np.array([3, 4, 4, 0, 1, 2])


@pytest.mark.slow
def test_the_papers_loss_is_its_equation(answers):
    logits, old, labels = answers
    terms = losses.deepinversion_terms(jnp.asarray(logits), jnp.asarray(old), labels, 2.0)
    p, q = softmax(old[3:] / 2), softmax(logits[3:] / 2)
    np.testing.assert_allclose(terms['old_images'], 4 * (p * np.log(p / q[:, :3])).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(terms['new_images'], -np.log(softmax(logits)[range(3), labels[:3]]).mean(), rtol=1e-5)
    p, q = softmax(old[:3] / 2), softmax(logits[:3, :3] / 2)
    np.testing.assert_allclose(terms['old_answers'], 4 * (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
    assert float(losses.total(terms, {'old_images': 0.0, 'old_answers': 0.0})) == float(terms['new_images'])


def test_old_images_that_look_new_are_punished(answers):
    """p_old is 0 for the new classes: an image of an old class must not become one of a new class."""
    _, old, labels = answers
    same = np.concatenate([old, np.full((6, 2), -30.0)], 1)
    likely = np.concatenate([old, np.full((6, 2), 5.0)], 1)
    kept, lost = (losses.deepinversion_terms(jnp.asarray(z), old, labels, 1.0) for z in (same, likely))
    assert abs(float(kept['old_images'])) < 1e-6 < 1 < float(lost['old_images'])
    assert abs(float(lost['old_answers'])) < 1e-6  # among the old classes nothing has changed


def test_always_be_dreaming_is_its_equations(answers):
    logits, old, labels = answers
    rng = np.random.default_rng(1)
    f, kernel, bias = rng.normal(size=(6, 4)), rng.normal(size=(4, 3)), rng.normal(size=3)
    head = {'kernel': kernel, 'bias': bias}
    terms = losses.always_be_dreaming_terms(logits, 2 * logits, f, old, labels, head)
    local = -np.log(softmax(logits[:3, 3:])[range(3), labels[:3] - 3]).mean()
    np.testing.assert_allclose(terms['new_images'], local, rtol=1e-5)
    each = -np.log(softmax(2 * logits)[range(6), labels])
    np.testing.assert_allclose(terms['head'], 2 / 5 * each[:3].mean() + 3 / 5 * each[3:].mean(), rtol=1e-5)
    np.testing.assert_allclose(terms['features'], np.square(f @ kernel + bias - old).mean(), rtol=1e-4)


def test_lwf_mc_is_a_sum_of_binary_cross_entropies(answers):
    logits, old, labels = answers
    labels = np.maximum(labels, 3)
    terms = losses.lwf_mc_terms(logits, old, labels)
    p = 1 / (1 + np.exp(-logits))
    targets = np.concatenate([1 / (1 + np.exp(-old)), np.eye(2)[labels - 3]], 1)
    each = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    np.testing.assert_allclose(terms['old_answers'] + terms['new_images'], each.sum(-1).mean(), rtol=1e-5)


# The head


@pytest.mark.slow
def test_a_grown_network_answers_as_before_for_its_old_classes():
    few, many = (create('resnet20', classes, 0.25) for classes in (3, 5))
    old, new = (trained_variables(module, (32, 32, 3), seed) for seed, module in enumerate((few, many)))
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    answers = many.apply(grown(new, old), x)
    np.testing.assert_allclose(answers[:, :3], few.apply(old, x), rtol=1e-5, atol=1e-6)
    for leaf, drawn in zip(grown(new, old)['params']['linear'].values(), new['params']['linear'].values(), strict=True):
        np.testing.assert_array_equal(leaf[..., 3:], drawn[..., 3:])


@pytest.mark.parametrize('widths', [(0.125, 0.25), (0.25, 0.125)])
def test_a_network_of_another_width_is_refused(widths):
    old, new = (trained_variables(create('small_convnet', 3, width), (8, 8, 1)) for width in widths)
    with pytest.raises(DvinvError, match=r'batch_stats/BatchNorm_0/mean, .* differ\. Is it another width'):
        grown(new, old)


@pytest.mark.slow
def test_detached_answers_move_the_head_alone():
    module = create('small_convnet', 3, 0.125)
    head = head_of(lambda classes: create('small_convnet', classes, 0.125), (8, 8, 1))
    variables = trained_variables(module, (8, 8, 1))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)

    def heard(params):
        return features_in_training(module, {**variables, 'params': params}, x, {'dropout': jax.random.key(1)}, head)

    logits, features, _ = heard(variables['params'])
    ((inputs, detached),) = features[head]
    np.testing.assert_allclose(detached, logits, rtol=1e-5)
    kernel, bias = (variables['params'][head][name] for name in ('kernel', 'bias'))
    np.testing.assert_allclose(inputs @ kernel + bias, logits, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda params: jnp.square(heard(params)[1][head][0][1]).sum())(variables['params'])
    moved = {layer for layer, leaves in gradient.items() if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))}
    assert moved == {head}


# Batches of two sets


def test_half_of_a_batch_is_of_each_set():
    job = TrainJob(TrainingSettings(9, 6, 0.1), lambda *_: 0.0, Rounds(5), second_rounds=Rounds(9))
    shown = np.stack([job.rows(3, update) for update in range(15)])
    assert shown[:, :3].max() < 5 <= shown[:, 3:].min()
    assert sorted(shown[:5, :3].ravel()) == sorted([*range(5)] * 3)
    assert sorted(shown[:3, 3:].ravel()) == [*range(5, 14)]
    assert job.available_at(0) == 14
    first, second = np.arange(5), np.arange(5, 14)
    np.testing.assert_array_equal(Joined(first, second)[shown[7]], shown[7])


# Tasks


def config_of(folder, **changes):
    """A narrow convolutional network that reads 0 and 1 and was trained elsewhere; in two tasks it learns 2, and 3."""
    config = runpy.run_path(str(ROOT / 'configs' / 'digits_continual.py'))['get_config']('smoke')
    for number, split in enumerate(parts()):
        for name, part in zip(('train', 'test'), split, strict=True):
            path = folder / f'{name}{number}.npz'
            if not path.exists():
                np.savez(path, x=part.images, y=part.labels)
    config.tasks = ('teacher', 'continual')
    config.data.update(name='npz', path=str(folder / 'test0.npz'), classes=())
    config.teacher.update(network='small_convnet', width=0.125, mean=(), std=())
    config.teacher.weights = saved(folder / 'teacher.safetensors', num_classes=2, image_shape=(8, 8, 1))
    config.continual.steps = tuple(
        {'name': 'npz', 'path': str(folder / f'test{number}.npz'), 'train_path': str(folder / f'train{number}.npz')}
        for number in (1, 2)
    )
    config.continual.update(controls=(), updates=6, batch_size=8, warmup=0)
    config.synthesis.update(method='noise', images=12, batch_size=6)  # spares compiling an inversion a task
    config.logging.update(every=2, checkpoint_every=4)
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return config


def parts():
    data = read_digits(DataSettings('digits'))
    return [
        [Split(*(array[:60] for array in (split.of_classes(classes).images, split.of_classes(classes).labels)))
         for split in (data.train, data.test)]
        for classes in ((0, 1), (2,), (3,))
    ]  # fmt: skip


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    return workdir, pipeline.run(config_of(data), workdir)


def test_the_network_knows_all_classes_and_the_figures_are_those_of_its_answers(undisturbed, data):
    workdir, results = undisturbed
    found = results['continual']
    apply_fn, variables = dvinv.load(workdir, 'continual')
    tests = [np.load(data / f'test{number}.npz') for number in range(3)]
    images = np.concatenate([test['x'] for test in tests]) / 255
    labels = np.concatenate([test['y'] + first for test, first in zip(tests, (0, 2, 3), strict=True)])
    logits = apply_fn(variables, ((images - 0.5) / 0.5).astype(np.float32))
    assert logits.shape[1] == 4
    right = np.asarray(logits).argmax(1) == labels
    assert found['test_accuracy'] == pytest.approx(right.mean())
    assert found['old_test_accuracy'] == pytest.approx(right[labels < 3].mean())
    assert found['new_test_accuracy'] == pytest.approx(right[labels == 3].mean())
    assert found['finetune_test_accuracy'] is found['replay_test_accuracy'] is None
    assert [len(row) for row in found['accuracy_matrix']['continual']] == [1, 2, 3]
    notes = ImagePool(workdir / 'pools' / '2').sidecar(1)
    assert notes['teacher'] == load_classifier(workdir / 'networks' / 'continual_1.safetensors').digest()
    shard = np.load(workdir / 'pools' / '2' / 'shard-000001.npz')
    assert sorted(shard['labels']) == [0, 0, 1, 1, 2, 2]
    assert shard['logits'].shape == (6, 3)


def test_killed_and_without_old_images_it_ends_with_the_same_bits(undisturbed, tmp_path, monkeypatch):
    """Killed inside tasks and between them. Of the teacher's classes there never was an image to train on; those of a task
    are gone as soon as a network has learned it."""
    folder, run, learned, original = tmp_path / 'data', tmp_path / 'run', [], dvinv.training.trainer.save_network
    folder.mkdir()
    config = config_of(folder)
    (folder / 'train0.npz').unlink()

    def save(path, *args):
        original(path, *args)
        learned.append(path.stem)
        (folder / f'train{len(learned)}.npz').unlink()

    def run_for(updates):
        left = iter(range(2 * updates))  # two sets a batch

        def chosen(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return chosen_images(*args)

        monkeypatch.setattr(dvinv.training.step, 'chosen_images', chosen)
        return pipeline.run(config, run)

    monkeypatch.setattr(dvinv.training.trainer, 'save_network', save)
    for updates, networks in ((5, []), (2, ['continual_1']), (5, ['continual_1'])):  # a checkpoint after 4, a task has 6
        with pytest.raises(KeyboardInterrupt):
            run_for(updates)
        assert learned == networks
    assert run_for(99)['continual']['tasks'] == 3
    assert learned == ['continual_1', 'continual']
    assert not [*folder.glob('train*')]
    expected, resumed = lasting(undisturbed[0]), lasting(run)
    assert {*resumed} == {*expected}
    assert [name for name in expected if resumed[name] != expected[name]] == []
    assert run_for(0)['continual']['tasks'] == 3  # what is finished wants no images


@pytest.mark.slow
def test_moments_of_networks_that_follow_a_recorded_one_are_those_of_what_they_learned_from(data, tmp_path):
    config = config_of(data, data__train_path=str(data / 'train0.npz'), teacher__moments_images=8)
    pipeline.run(config, tmp_path / 'run')
    networks = tmp_path / 'run' / 'networks'
    assert sorted(path.stem for path in networks.glob('moments*')) == ['moments', 'moments_continual_1']
    first, second = (dvinv.Moments.load(networks / f'{name}.safetensors') for name in ('moments', 'moments_continual_1'))
    assert second.digest == load_classifier(networks / 'continual_1.safetensors').digest()
    assert second.images == 8
    assert tuple(second.layers) == tuple(first.layers)
    made_of = [ImagePool(tmp_path / 'run' / 'pools' / number).sidecar(0)['teacher'] for number in '12']
    assert not {*made_of} & {first.digest, second.digest}  # of the network with its moments
    (networks / 'moments_continual_1.safetensors').unlink()
    (networks / 'continual.safetensors').unlink()
    pipeline.run(config, tmp_path / 'run')
    again = dvinv.Moments.load(networks / 'moments_continual_1.safetensors')
    for place, pair in second.layers.items():
        np.testing.assert_array_equal(pair, again.layers[place])


@pytest.mark.slow
def test_an_adaptive_pool_competes_with_a_student_of_the_network_as_it_is(data, tmp_path, monkeypatch):
    """Killed while it learns, and in the round after, it ends with the same bits; the student is thrown away."""
    rounds = {'synthesis__method': 'adaptive', 'synthesis__batches_per_round': 1, 'synthesis__weights__competition': 10.0}
    student = {'student__network': 'small_convnet', 'student__width': 0.125, 'distillation__updates_per_round': 4}
    config = config_of(data, devices=1, distillation__batch_size=4, **rounds, **student)
    run = pipeline.validated(config)
    like = network_of(run, run.planned_teacher, 3)
    current = dataclasses.replace(like, variables=trained(like.variables))
    fill, seen = Synthesizer.fill, []

    def pool_of(name, chain='continual'):
        run = pipeline.validated(config, tmp_path / name)
        with contextlib.closing(run.open_workdir()) as workdir:
            driver.pool_of(run, chain, 2, current)
        return {path.name: path.read_bytes() for path in (workdir.path / 'pools' / '2').iterdir()}

    def fill_and_tell(self, numbers, student, **notes):
        seen.append((numbers, notes, student['params']['Dense_0']['kernel']))
        fill(self, numbers, student, **notes)

    monkeypatch.setattr(dvinv.synthesis.synthesizer, 'make_inverter', drawn_inverter)
    monkeypatch.setattr(Synthesizer, 'fill', fill_and_tell)
    undisturbed = pool_of('run')
    assert [told[:2] for told in seen] == [([i], {'round': i, 'student_updates': 4 * i}) for i in range(2)]
    first, second = (kernel for *_, kernel in seen)
    assert first.shape == second.shape == (16, 3)
    assert not np.array_equal(first, second)

    def killed_while_it_learns(seed, update, *args):
        if update == 2:
            raise KeyboardInterrupt
        return chosen_images(seed, update, *args)

    def killed_in_a_round(self, numbers, *args, **notes):
        if notes['round']:
            raise KeyboardInterrupt
        fill(self, numbers, *args, **notes)

    for owner, name, killed in (
        (dvinv.training.step, 'chosen_images', killed_while_it_learns),
        (Synthesizer, 'fill', killed_in_a_round),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                pool_of('killed')
    assert (tmp_path / 'killed' / 'checkpoints' / 'student_2').exists()
    assert pool_of('killed') == undisturbed
    metrics = [(tmp_path / run / 'metrics.jsonl').read_text() for run in ('run', 'killed')]
    assert metrics[0] == metrics[1] != ''
    assert not [*tmp_path.glob('*/checkpoints/student*')]


def test_the_report_shows_what_each_task_left_of_the_others(undisturbed, data):
    workdir, results = undisturbed
    pipeline.run(config_of(data, tasks=('report',)), workdir)
    page = (workdir / 'report.html').read_text()
    cells = re.findall(r'<title>(after task \d, task \d): ([\d.]+)%</title>', page)
    matrix = results['continual']['accuracy_matrix']['continual']
    expected = [(row, column, share) for row, shares in enumerate(matrix) for column, share in enumerate(shares)]
    assert cells == [(f'after task {row}, task {column}', f'{100 * share:.1f}') for row, column, share in expected]
    assert 'In 3 tasks a network learned ever more classes' in page
    assert page.count('Synthesized before task') == 2 * 2  # a picture a task, and its alternative text


# What is refused


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'continual__steps': ()}, ['continual.steps is empty']),
        ({'continual__steps': ({'classes': (1, 2)},)}, ['data and continual.steps[0] overlap', 'the classes 1, 2;']),
        (
            {'continual__steps': ({'classes': (4, 5)}, {'classes': (6, 5)})},
            ['continual.steps[0] and continual.steps[1] overlap', 'the classes 5;'],
        ),
        ({'continual__steps': ({},)}, ['overlap', 'all classes of one data set']),
        ({'continual__steps': ({'classes': (4, 12)},)}, ['(4, 12)', '0 to 9']),
        (
            {'continual__steps': ({'class': 4},)},
            ["no field 'continual.steps[0].class'; did you mean 'continual.steps[0].classes'"],
        ),
        ({'continual__steps': ({'classes': 4},)}, ['continual.steps[0].classes is 4', 'must be a tuple']),
        ({'continual__steps': (4,)}, ['continual.steps[0] is 4', 'must be a dict']),
        (
            {'continual__steps': ({'name': 'npz', 'path': '{}/test1.npz'},)},
            ['steps[0] has no training images', 'train_path'],
        ),
        (
            {'continual__steps': ({'name': 'npz', 'path': '{}/test1.npz', 'train_path': '{}/gap.npz'},)},
            ['steps[0] has the label 2', 'of 1 classes'],
        ),
        ({'continual__steps': ({'name': 'npz', 'path': '{}/gap.npz'},)}, ['steps[0] has no image of class 1', 'leave']),
        ({'continual__steps': ({'name': 'npz', 'path': '{}/large.npz'},)}, ['steps[0] has images of 9x9x1', 'takes 8x8x1']),
        ({'data__classes': (0, 1, 2)}, ["teacher's head has 4 classes, but data has 3", 'data.classes']),
        ({'teacher__width': 0.5}, ['teacher.width is 0.5, but', 'write teacher.width=0.125']),
        ({'teacher__width': 1.0}, ['not the small_convnet of width 1.0', 'cannot grow a head']),
        ({'continual__loss': 'ewc'}, ["continual.loss is 'ewc'", 'deepinversion, always_be_dreaming']),
        ({'continual__controls': ('deepinversion',)}, ["controls names 'deepinversion', which is already the loss"]),
        (
            {
                'data__name': 'npz',
                'data__path': '{}/four.npz',
                'data__classes': (),
                'continual__steps': ({'name': 'digits', 'classes': (4,)},),
            },
            ['controls names joint', 'there are none', 'data.train_path'],
        ),
        ({'continual__batch_size': 7}, ['continual.batch_size is 7', 'a multiple of 2']),
        ({'continual__features': -1.0}, ['continual.features is -1.0', 'at least 0']),
        ({'continual__temperature': 0.0}, ['continual.temperature is 0.0', 'above 0']),
        ({'continual__learning_rate': 0.0}, ['continual.learning_rate is 0.0']),
        ({'continual__mixup': 0.5}, ['continual.mixup is 0.5']),
        ({'synthesis__classes': (1,)}, ['synthesis.classes is set']),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(tmp_path, changes, words):
    config = runpy.run_path(str(ROOT / 'configs' / 'digits_continual.py'))['get_config']('smoke')
    np.savez(tmp_path / 'gap.npz', x=np.zeros((2, 8, 8, 1), np.uint8), y=[0, 2])
    np.savez(tmp_path / 'four.npz', x=np.zeros((4, 8, 8, 1), np.uint8), y=range(4))
    np.savez(tmp_path / 'large.npz', x=np.zeros((1, 9, 9, 1), np.uint8), y=[0])
    np.savez(tmp_path / 'test1.npz', x=np.zeros((2, 8, 8, 1), np.uint8), y=[0, 0])
    config.teacher.update(network='small_convnet', width=0.125, mean=(), std=())
    config.teacher.weights = saved(tmp_path / 'teacher.safetensors', num_classes=4, image_shape=(8, 8, 1))
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    config.data.path = config.data.path.format(tmp_path)
    config.continual.steps = tuple(
        {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in step.items()}
        if isinstance(step, dict)
        else step
        for step in config.continual.steps
    )
    with pytest.raises(DvinvError) as caught:
        pipeline.run(config, tmp_path / 'run')
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert re.search(r'[^.]\.$', message)
    assert '\n' not in message
    assert not (tmp_path / 'run').exists()


# Figures


def test_forgetting_is_what_was_best_less_what_is_left():
    matrix = [[0.9], [0.95, 0.8], [0.5, 0.7, 1.0]]
    assert stream.forgetting(matrix) == pytest.approx((0.45 + 0.1) / 2)
    assert stream.forgetting([None, None, [0.5, 0.7, 1.0]]) is None
    assert ContinualSettings().weights.keys() == {'old_images', 'old_answers', 'head', 'features'}
