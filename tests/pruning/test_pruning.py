"""Pruning: importance at the very start, targets that are reached or told to be out of reach, the task from end to end."""

import json
import runpy
import shutil

import jax
import numpy as np
import pytest
from smoke import ROOT, lasting, smoke_config
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, drawn_inverter, trained_variables

import dvinv
import dvinv.synthesis.synthesizer
import dvinv.training
from dvinv import DvinvError
from dvinv.config import InversionConfig, PruningSettings, Stage, Weights
from dvinv.data.pool import ImagePool
from dvinv.inversion import from_linen, make_inverter
from dvinv.networks import channel_groups, create, load_network
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.pruned import PrunedModule
from dvinv.pipeline import tasks as pipeline
from dvinv.pruning import task as driver
from dvinv.pruning.selection import Importance, least_reachable, predicted_latency, removal_scores, without_lowest
from dvinv.runtime.devices import make_mesh
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.step import chosen_images


@pytest.fixture(scope='module')
def measured():
    """(channels, variables, images, the `Importance`) of a tiny network."""
    module, variables = TinyNet(), trained_variables(TinyNet())
    teacher = from_linen(module, variables, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    channels = find_channels(module, IMAGE_SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (2, 6, *IMAGE_SHAPE), np.uint8)
    return channels, variables, images, Importance(module, teacher, channels)


@pytest.mark.slow
def test_importances_of_an_unpruned_network_are_not_about_zero(measured):
    """Its KL to the teacher, itself, has none."""
    _, variables, images, importance = measured
    told, untold = (importance.taylor(variables, images, equal=equal) for equal in (True, False))
    assert told.min() > 1e-12
    assert untold.max() < 1e-9 * told.max()


@pytest.mark.slow
def test_importance_is_the_square_of_what_the_loss_loses_a_gate(measured):
    """Against a difference quotient: gates nearly closed, for each group."""
    channels, variables, images, importance = measured
    keep = np.arange(channels.count) != 0  # so that KL to the teacher says something
    variables = channels.restored(keep, channels.sliced(keep, variables))
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

        for group in range(1, channels.count):
            nearly = jax.tree.map(np.copy, double)
            for layer in ('BatchNorm_0', 'BatchNorm_1'):
                mine = channels.axes[f'params/{layer}/scale'][0] == group
                for name in ('scale', 'bias'):
                    nearly['params'][layer][name][mine] *= 1 - 1e-6
            slope = (loss(double) - loss(nearly)) / 1e-6
            np.testing.assert_allclose(told[group], slope**2, rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize('measure', ['filters', 'flops', 'parameters'])
def test_a_target_is_reached_and_no_more_removed_than_it_takes(measure):
    channels = find_channels(create('resnet20', 10, 0.5), (32, 32, 3))
    price, keep = getattr(channel_groups, measure)(channels), np.ones(channels.count, bool)
    scores = np.random.default_rng(0).random(channels.count)
    left = without_lowest(channels, keep, scores, price, 0.5 * price.total(keep), PruningSettings(min_channels=2))
    assert price.total(left) <= 0.5 * price.total(keep)
    last = max(np.flatnonzero(~left), key=scores.__getitem__)
    left[last] = True
    assert price.total(left) > 0.5 * price.total(keep)
    assert min(channels.remaining(groups, left).sum() for groups in channels.layers.values()) >= 2
    np.testing.assert_allclose(  # what each removal would save, told at once
        price.savings(left)[[3, 77]],
        [price.total(left) - price.total(left & (np.arange(len(left)) != group)) for group in (3, 77)],
    )


def test_widths_stay_multiples():
    channels = find_channels(create('resnet20', 10), (32, 32, 3))
    price, keep = channel_groups.flops(channels), np.ones(channels.count, bool)
    scores = np.random.default_rng(0).random(channels.count)
    left = without_lowest(channels, keep, scores, price, 0.6 * price.total(keep), PruningSettings(round_to=8))
    widths = [channels.remaining(groups, left).sum() for groups in channels.layers.values()]
    assert price.total(left) <= 0.6 * price.total(keep)
    assert not np.mod(widths, 8).any()
    assert min(widths) == 8


def test_a_width_that_is_no_multiple_becomes_one_first():
    channels = find_channels(create('resnet20', 10), (32, 32, 3))
    groups = channels.layers['layer1_0/conv1']
    price, keep, scores = channel_groups.flops(channels), np.ones(channels.count, bool), np.ones(channels.count)
    keep[groups[:3]], scores[groups] = False, 0
    left = without_lowest(channels, keep, scores, price, price.total(keep) - 1, PruningSettings(round_to=8))
    assert keep.sum() - left.sum() == 5
    assert channels.remaining(groups, left).sum() == 8


def test_eta_lets_costly_units_go_first():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    price, keep, even = channel_groups.flops(channels), np.ones(channels.count, bool), np.ones(channels.count)
    scores = removal_scores(PruningSettings(eta=1.0, cost='flops'), even, price, keep)
    assert scores.argmin() == price.savings(keep).argmax()
    np.testing.assert_allclose(removal_scores(PruningSettings(), even, None, keep), 1 / channels.count)


def test_latency_is_read_off_the_table_between_its_widths():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    widths = [[1, 2, 4], [1, 2, 5]]
    rows = [
        {'widths': widths[:1], 'seconds': [2, 3, 5]},
        {'widths': widths, 'seconds': [1 + 10 * i * o for i in widths[0] for o in widths[1]]},
        {'widths': widths[1:], 'seconds': [1, 1, 1]},
    ]
    price, keep = predicted_latency(channels, {'call': 1.0, 'layers': rows}), np.ones(channels.count, bool)
    assert price.total(keep) == pytest.approx(1 + 4 + 10 * 4 * 5 + 0)
    first = channels.layers['Conv_0'][0]
    keep[first] = False
    assert price.total(keep) == pytest.approx(1 + 3 + 10 * 3 * 5)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'target_ratio': 0.0001}, ['pruning.target_ratio is 0.0001', 'at least 0.']),
        ({'target_ratio': 1.5}, ['pruning.target_ratio is 1.5', 'between 0 and 1']),
        ({'ignored_layers': ('Conv_9',)}, ["pruning.ignored_layers names 'Conv_9'", 'Conv_0']),
        ({'eta': -1.0}, ['pruning.eta is -1.0', 'at least 0']),
        ({'measure': 'watts'}, ["pruning.measure is 'watts'", 'flops']),
        ({'importance': 'hope'}, ["pruning.importance is 'hope'", 'taylor']),
        ({'warmup': 10}, ['pruning.warmup is 10', 'a step has only 10 updates']),
        ({'temperature': 0.0}, ['pruning.temperature is 0.0', 'above 0']),
        ({'latency_batch': 0}, ['pruning.latency_batch is 0', 'at least 1']),
        ({'steps': 0}, ['pruning.steps is 0', 'at least 1']),
        ({'round_to': 0}, ['pruning.round_to is 0', 'at least 1']),
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


def test_fewer_channels_never_cost_more_however_noisy_the_table():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    widths, noise = [[1, 2, 4], [1, 2, 5]], np.random.default_rng(0)
    rows = [{'widths': w, 'seconds': noise.random(3 ** len(w)).tolist()} for w in (widths[:1], widths, widths[1:])]
    price = predicted_latency(channels, {'call': 0.0, 'layers': rows})
    for _ in range(20):
        assert price.savings(noise.random(channels.count) < 0.8).min() >= 0


def test_a_target_in_latency_is_told_where_it_is_out_of_reach():
    channels = find_channels(TinyNet(), IMAGE_SHAPE)
    rows = [{'widths': [[1, 4]], 'seconds': [9, 9]}, {'widths': [[1, 4], [1, 5]], 'seconds': [9, 9, 9, 9]}]
    table = {'call': 0.0, 'layers': [*rows, {'widths': [[1, 5]], 'seconds': [9, 9]}]}
    assert least_reachable(channels, predicted_latency(channels, table), PruningSettings(min_channels=1)) == 1.0


@pytest.mark.slow
def test_a_pruned_network_competes_with_the_whole_one():
    """R_compete is 1 at most, where the two agree."""
    module, variables = TinyNet(), trained_variables(TinyNet())
    teacher = from_linen(module, variables, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    channels = find_channels(module, IMAGE_SHAPE)
    keep = np.arange(channels.count) % 2 == 0
    narrow, left = PrunedModule(module, channels.kept(keep)), channels.sliced(keep, variables)
    config = InversionConfig((Stage(3, 0.1),), Weights(competition=10.0))
    invert = make_inverter(teacher, config, make_mesh(1), lambda variables, x: narrow.apply(variables, x, train=False))
    told = invert(jax.random.split(jax.random.key(0), 1), np.array([[0, 1, 2, 0]]), left).metrics['competition']
    assert np.all((told > 0.1) & (told < 0.9999))


def test_a_pruning_from_its_pool_to_its_report_and_again(finished, tmp_path, monkeypatch):
    """Killed in its last step's batch and while it learns from it, it ends with the same bits; what it leaves can be loaded,
    and is smaller. In each step images are made in competition."""
    train, measure, fill, rivals = driver.train_network, driver.Pruner._choose, Synthesizer.fill, []
    counts = {'measured': [], 'learned': []}

    def train_and_tell(run, target, job, images, labels):
        counts['learned'].append((target.name, len(images), len(labels), job.rounds.images))
        return train(run, target, job, images, labels)

    def measure_and_tell(self, keep, variables, images, *args):
        counts['measured'].append(len(images))
        return measure(self, keep, variables, images, *args)

    def fill_and_tell(self, numbers, rival, **notes):
        rivals.append((self._method, notes['step'], rival))
        fill(self, numbers, rival, **notes)

    monkeypatch.setattr(dvinv.synthesis.synthesizer, 'make_inverter', drawn_inverter)
    monkeypatch.setattr(driver, 'train_network', train_and_tell)
    monkeypatch.setattr(driver.Pruner, '_choose', measure_and_tell)
    monkeypatch.setattr(Synthesizer, 'fill', fill_and_tell)
    config = runpy.run_path(str(ROOT / 'configs' / 'digits_prune.py'))['get_config']('smoke')
    config.update(tasks=('pruning', 'report'), pool=str(finished / 'pool'))
    for role in ('teacher', 'verifier'):
        config[role].weights = str(finished / 'networks' / f'{role}.safetensors')
    config.pruning.update(hint=1.0, controls=('untuned',), eta=0.1, adaptive_batches=1)
    config.synthesis.weights.competition = 10.0
    run, again = tmp_path / 'run', tmp_path / 'again'
    figures = pipeline.run(config, run)['pruning']
    assert counts['learned'] == [('pruned_1', 60, 60, 60), ('pruned', 80, 80, 80)]
    assert counts['measured'] == [40, 60, 40, 40]  # the last two: of the control, which has the pool alone
    assert (figures['images'], figures['adaptive_images']) == (80, 40)
    assert [rival[:2] for rival in rivals] == [('adaptive', 1), ('adaptive', 2)]
    assert jax.tree.map(np.shape, rivals[-1][-1]) == jax.tree.map(
        np.shape, load_network(run / 'networks' / 'pruned.safetensors')[0]
    )
    first, second = (ImagePool(run / 'pools' / f'pruned_{step}').sidecar(0)['config'] for step in (1, 2))
    assert first['seed'] != second['seed']  # noise of their own to start from
    assert figures['flops_ratio'] <= 0.5
    assert figures['latency_ratio'] > 0
    assert 0 < figures['predicted_latency_ratio'] <= 1
    assert figures['untuned_test_accuracy'] is not None is figures['real_test_accuracy']
    apply_fn, variables = dvinv.load(run, 'pruning')
    assert apply_fn(variables, np.zeros((1, 8, 8, 1), np.float32)).shape == (1, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == figures['parameters']
    page = (run / 'report.html').read_text()
    assert all(
        words in page for words in ('Accuracy after each step', 'Channels that layers make', '40 more made in competition')
    )
    assert json.loads((run / 'pruning.json').read_text())['steps'][0]['flops_ratio'] == 1

    config.teacher.weights = str(run / 'networks' / 'pruned.safetensors')
    with pytest.raises(DvinvError, match='a network that is pruned already'):
        pipeline.validated(config)
    config.teacher.weights = str(finished / 'networks' / 'teacher.safetensors')

    shutil.copytree(run, again)
    (again / 'networks' / 'pruned.safetensors').unlink()  # and so the task is not complete
    shutil.rmtree(again / 'checkpoints' / 'pruned', ignore_errors=True)
    shutil.rmtree(again / 'pools' / 'pruned_2')

    def killed_in_a_batch(self, numbers, *args, **notes):
        fill(self, numbers, *args, **notes)
        (again / 'pools' / 'pruned_2' / 'shard-000000.json').unlink()  # killed before the batch was there
        raise KeyboardInterrupt

    def killed_while_it_learns(seed, update, *args):
        if update == 15:  # of 30; a checkpoint after 10
            raise KeyboardInterrupt
        return chosen_images(seed, update, *args)

    for owner, name, killed in (
        (Synthesizer, 'fill', killed_in_a_batch),
        (dvinv.training.step, 'chosen_images', killed_while_it_learns),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(config, again)
    repeated = pipeline.run(config, again)['pruning']
    expected, resumed = lasting(run), lasting(again)
    assert expected.keys() == resumed.keys()
    assert [name for name in expected.keys() - {'results.json'} if resumed[name] != expected[name]] == []
    times = {'latency_ratio', 'wall_seconds'}
    assert {k: v for k, v in repeated.items() if k not in times} == {k: v for k, v in figures.items() if k not in times}
