"""Pruning: importance at the very start, targets that are reached or told to be out of reach, the task from end to end."""

import contextlib
import json
import runpy
import shutil

import jax
import numpy as np
import pytest
from smoke import ROOT, lasting, smoke_config
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, saved, trained_variables

import dvinv
import dvinv.training
from dvinv import DvinvError, pipeline
from dvinv.data.pool import ImagePool
from dvinv.inversion import from_linen
from dvinv.networks import create
from dvinv.networks.channels import cost, find_channels
from dvinv.pruning import driver
from dvinv.pruning.competition import config_of_step
from dvinv.pruning.importance import Importance
from dvinv.pruning.latency import predicted
from dvinv.pruning.removal import Removal, least_reachable, without_lowest
from dvinv.rounds import chosen_images
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.workdir import Workdir
from dvinv.synthesizer import Synthesizer, fill_pool
from dvinv.teacher import load


@pytest.fixture(scope='module')
def measured():
    """(channels, variables, images, the `Importance`) of a tiny network."""
    module, variables = TinyNet(), trained_variables(TinyNet())
    teacher = from_linen(module, variables, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    channels = find_channels(module, IMAGE_SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (2, 6, *IMAGE_SHAPE), np.uint8)
    return channels, variables, images, Importance(module, teacher, channels)


def test_importances_of_an_unpruned_network_are_not_about_zero(measured):
    """Its KL to the teacher, itself, has none."""
    _, variables, images, importance = measured
    told, untold = (importance.taylor(variables, images, equal=equal) for equal in (True, False))
    assert told.min() > 1e-12
    assert untold.max() < 1e-9 * told.max()


def test_importance_is_the_square_of_what_the_loss_loses_a_gate(measured):
    """Against a difference quotient: gates nearly closed, for each unit."""
    channels, variables, images, importance = measured
    alive = np.arange(channels.count) != 0  # so that KL to the teacher says something
    variables = channels.restored(alive, channels.sliced(alive, variables))
    told = importance.taylor(variables, images[:1], equal=False)
    assert told[0] == 0
    x = (images[0] / 255 - np.array(MEAN)) / np.array(STD)
    with jax.enable_x64():
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained_variables(TinyNet()))

        def loss(variables):
            logs = (jax.nn.log_softmax(TinyNet().apply(v, x)) for v in (whole, variables))
            target, answer = logs
            return float((np.exp(target) * (target - answer)).sum(-1).mean())

        for unit in range(1, channels.count):
            nearly = jax.tree.map(np.copy, double)
            for layer in ('BatchNorm_0', 'BatchNorm_1'):
                mine = channels.axes[f'params/{layer}/scale'][0] == unit
                for name in ('scale', 'bias'):
                    nearly['params'][layer][name][mine] *= 1 - 1e-6
            slope = (loss(double) - loss(nearly)) / 1e-6
            np.testing.assert_allclose(told[unit], slope**2, rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize('measure', ['filters', 'flops', 'parameters'])
def test_a_target_is_reached_and_no_more_removed_than_it_takes(measure):
    channels = find_channels(create('resnet20', 10, 0.5), (32, 32, 3))
    price, alive = getattr(cost, measure)(channels), np.ones(channels.count, bool)
    scores = np.random.default_rng(0).random(channels.count)
    left = without_lowest(channels, alive, scores, price, 0.5 * price.of(alive), least=2)
    assert price.of(left) <= 0.5 * price.of(alive)
    last = max(np.flatnonzero(~left), key=scores.__getitem__)
    left[last] = True
    assert price.of(left) > 0.5 * price.of(alive)
    assert min(channels.there(units, left).sum() for units in channels.layers.values()) >= 2
    np.testing.assert_allclose(  # what each removal would save, told at once
        price.savings(left)[[3, 77]], [price.of(left) - price.of(left & (np.arange(len(left)) != unit)) for unit in (3, 77)]
    )


def test_eta_lets_costly_units_go_first():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    price, alive, even = cost.flops(channels), np.ones(channels.count, bool), np.ones(channels.count)
    scores = Removal(eta=1.0, cost='flops').scores(even, price, alive)
    assert scores.argmin() == price.savings(alive).argmax()
    np.testing.assert_allclose(Removal().scores(even, None, alive), 1 / channels.count)


def test_latency_is_read_off_the_table_between_its_widths():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    widths = [[1, 2, 4], [1, 2, 5]]
    rows = [
        {'widths': widths[:1], 'seconds': [2, 3, 5]},
        {'widths': widths, 'seconds': [1 + 10 * i * o for i in widths[0] for o in widths[1]]},
        {'widths': widths[1:], 'seconds': [1, 1, 1]},
    ]
    price, alive = predicted(channels, {'call': 1.0, 'layers': rows}), np.ones(channels.count, bool)
    assert price.of(alive) == pytest.approx(1 + 4 + 10 * 4 * 5 + 0)
    first = channels.layers['Conv_0'][0]
    alive[first] = False
    assert price.of(alive) == pytest.approx(1 + 3 + 10 * 3 * 5)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'left': 0.0001}, ['pruning.left is 0.0001', 'at least 0.']),
        ({'left': 1.5}, ['pruning.left is 1.5', 'between 0 and 1']),
        ({'protected': ('Conv_9',)}, ["pruning.protected names 'Conv_9'", 'Conv_0']),
        ({'eta': -1.0}, ['pruning.eta is -1.0', 'at least 0']),
        ({'measure': 'watts'}, ["pruning.measure is 'watts'", 'flops']),
        ({'importance': 'hope'}, ["pruning.importance is 'hope'", 'taylor']),
        ({'warmup': 10}, ['pruning.warmup is 10', 'a step has only 10 updates']),
        ({'temperature': 0.0}, ['pruning.temperature is 0.0', 'above 0']),
        ({'latency_batch': 0}, ['pruning.latency_batch is 0', 'at least 1']),
        ({'steps': 0}, ['pruning.steps is 0', 'at least 1']),
        ({'controls': ('luck',)}, ["pruning.controls names 'luck'", 'untuned']),
        ({'adaptive_batches': -1}, ['pruning.adaptive_batches is -1', 'at least 0']),
        ({'adaptive_batches': 2}, ['pruning.adaptive_batches is 2', 'synthesis.weights.competition is 0']),
    ],
)
def test_what_cannot_be_pruned_as_asked_is_refused(tmp_path, changes, words):
    config = smoke_config(tasks=('teacher', 'synthesis', 'pruning'))
    config.pruning.update(changes)
    with pytest.raises(DvinvError) as caught:
        pipeline.run(config, tmp_path / 'run')
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / 'run').exists()


def test_a_factorys_network_is_refused(tmp_path):
    config = smoke_config(tasks=('pruning',), teacher__factory='factories:own', verifier__network='')
    with pytest.raises(DvinvError, match=r"teacher\.factory is 'factories:own'.*the module is not known"):
        pipeline.run(config, tmp_path / 'run')


def test_fewer_channels_never_cost_more_however_noisy_the_table():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    widths, noise = [[1, 2, 4], [1, 2, 5]], np.random.default_rng(0)
    rows = [{'widths': w, 'seconds': noise.random(3 ** len(w)).tolist()} for w in (widths[:1], widths, widths[1:])]
    price = predicted(channels, {'call': 0.0, 'layers': rows})
    for _ in range(20):
        assert price.savings(noise.random(channels.count) < 0.8).min() >= 0


def test_a_target_in_latency_is_told_where_it_is_out_of_reach():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    rows = [{'widths': [[1, 4]], 'seconds': [9, 9]}, {'widths': [[1, 4], [1, 5]], 'seconds': [9, 9, 9, 9]}]
    table = {'call': 0.0, 'layers': [*rows, {'widths': [[1, 5]], 'seconds': [9, 9]}]}
    assert least_reachable(channels, predicted(channels, table), least=1) == 1.0


def test_a_pruning_from_its_pool_to_its_report_and_again(finished, tmp_path):
    """Resumed before its last step, it ends with the same bits; what it leaves can be loaded, and is smaller."""
    config = runpy.run_path(str(ROOT / 'configs' / 'digits_prune.py'))['get_config']('smoke')
    config.update(tasks=('pruning', 'report'), pool=str(finished / 'pool'))
    for role in ('teacher', 'verifier'):
        config[role].weights = str(finished / 'networks' / f'{role}.safetensors')
    config.pruning.update(hint=1.0, controls=('untuned',), eta=0.1)
    run, again = tmp_path / 'run', tmp_path / 'again'
    figures = pipeline.run(config, run)['pruning']
    assert figures['flops_ratio'] <= 0.5
    assert figures['latency_ratio'] > 0
    assert 0 < figures['predicted_latency_ratio'] <= 1
    assert figures['untuned_test_accuracy'] is not None is figures['real_test_accuracy']
    apply_fn, variables = dvinv.load(run, 'pruning')
    assert apply_fn(variables, np.zeros((1, 8, 8, 1), np.float32)).shape == (1, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == figures['parameters']
    page = (run / 'report.html').read_text()
    assert all(title in page for title in ('Accuracy after each step', 'Channels that layers make'))
    assert json.loads((run / 'pruning.json').read_text())['steps'][0]['flops_ratio'] == 1

    config.teacher.weights = str(run / 'networks' / 'pruned.safetensors')
    with pytest.raises(DvinvError, match='a network that has lost channels'):
        pipeline.check(config)
    config.teacher.weights = str(finished / 'networks' / 'teacher.safetensors')

    shutil.copytree(run, again)
    (again / 'networks' / 'pruned.safetensors').unlink()  # and so the task is not complete
    shutil.rmtree(again / 'checkpoints' / 'pruned', ignore_errors=True)
    repeated = pipeline.run(config, again)['pruning']
    for name in ('pruned', 'untuned'):
        assert (again / 'networks' / f'{name}.safetensors').read_bytes() == (
            run / 'networks' / f'{name}.safetensors'
        ).read_bytes()
    times = {'latency_ratio', 'wall_seconds'}
    assert {k: v for k, v in repeated.items() if k not in times} == {k: v for k, v in figures.items() if k not in times}


# Images in competition


def competing_config(folder):
    """A narrow network, noise for a pool, and a batch a step against the network just pruned."""
    config = smoke_config(
        tasks=('synthesis', 'pruning'), verifier__network='', synthesis__method='noise', devices=1, distillation__controls=()
    )
    config.teacher.update(network='small_convnet', width=0.125)
    config.teacher.weights = saved(folder / 'teacher.safetensors', num_classes=10, image_shape=(8, 8, 1))
    config.synthesis.weights.competition = 10.0
    config.pruning.update(left=0.8, controls=(), updates=10, updates_per_step=10, adaptive_batches=1)
    config.data.name = ''
    return config


@pytest.fixture(scope='module')
def competing(tmp_path_factory, keep_compiled):
    """(folder, figures, how many images there were at each measurement and for each training)."""
    folder, counts = tmp_path_factory.mktemp('competing'), {'measured': [], 'learned': []}
    learn, measure = driver.learn, driver.Pruner._next

    def noted(config, workdir, learner, lesson, images, labels):
        counts['learned'].append((len(images), len(labels), lesson.rounds.images))
        return learn(config, workdir, learner, lesson, images, labels)

    def measured(self, alive, variables, images, *args):
        counts['measured'].append(len(images))
        return measure(self, alive, variables, images, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, 'learn', noted)
        patch.setattr(driver.Pruner, '_next', measured)
        figures = pipeline.run(competing_config(folder), folder / 'run')['pruning']
    return folder, figures, counts


def test_images_of_every_step_join_those_before(competing):
    _, figures, counts = competing
    assert counts['learned'] == [(60, 60, 60), (80, 80, 80)]
    assert counts['measured'] == [40, 60]
    assert (figures['images'], figures['adaptive_images']) == (80, 40)


def test_batches_of_a_step_compete_with_the_network_just_pruned(competing, tmp_path):
    folder, *_ = competing
    config = config_of_step(competing_config(folder), driver.ROLE, 2)
    with contextlib.closing(Workdir(tmp_path, config)) as workdir:
        teacher = load(config, workdir)
        alone = ImagePool(tmp_path / 'pool', teacher.digest())
        fill_pool(config, workdir, teacher, alone, 'deepinversion', 'pruning', 'alone')
    first, second = (ImagePool(folder / 'run' / 'pools' / f'pruned_{step}') for step in (1, 2))
    assert second.notes(0)['step'] == 2
    assert second.notes(0)['config']['seed'] != first.notes(0)['config']['seed']  # other noise to start from
    np.testing.assert_array_equal(second.read(0)['labels'], alone.read(0)['labels'])
    assert (second.read(0)['images'] != alone.read(0)['images']).mean() > 0.01
    lines = [line for line in Metrics(folder / 'run' / 'metrics.jsonl').read() if line['series'] == 'images_pruned_2']
    assert lines
    assert max(line['competition'] for line in lines) < 0.999  # against the whole network itself it would be 1


def test_killed_in_a_batch_and_while_it_learns_from_it_a_pruning_ends_with_the_same_bits(competing, tmp_path, monkeypatch):
    folder, *_ = competing
    config, run, fill = competing_config(folder), tmp_path / 'run', Synthesizer.fill

    def killed_in_a_batch(self, numbers, *args, **notes):
        fill(self, numbers, *args, **notes)
        if notes.get('step') == 2:
            (run / 'pools' / 'pruned_2' / 'shard-000000.json').unlink()
            raise KeyboardInterrupt

    def killed_while_it_learns(seed, update, *args):
        if update == 15:  # of 20, in the last step; a checkpoint after 10
            raise KeyboardInterrupt
        return chosen_images(seed, update, *args)

    for owner, name, killed in (
        (Synthesizer, 'fill', killed_in_a_batch),
        (dvinv.training, 'chosen_images', killed_while_it_learns),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(config, run)
    pipeline.run(config, run)
    expected, resumed = lasting(folder / 'run'), lasting(run)
    for results in (expected['results.json'], resumed['results.json']):
        del results['pruning']['latency_ratio']
    assert resumed == expected
