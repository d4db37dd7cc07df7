"""The training loop: resumed to the bit, every image once an epoch, schedules, statistics, devices, losses that blow up."""

import dataclasses
import signal
import types
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, pixels_only

import dvinv.training
from dvinv import DvinvError
from dvinv.config import TrainingSettings
from dvinv.data.dataset import HostBatches, Joined, ResidentBatches, fits_on_devices
from dvinv.runtime import preemption
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.workdir import Workdir
from dvinv.training.step import (
    Rounds,
    TrainJob,
    TrainStep,
    chosen_images,
    initial_state,
    initial_variables,
    make_reestimate,
    make_train_step,
)
from dvinv.training.trainer import Records, Training

CLASSIFIER = pixels_only(IMAGE_SHAPE, 3, MEAN, STD)
LOGGING = types.SimpleNamespace(every=2, checkpoint_every=4)
RECIPE = TrainingSettings(
    updates=8, batch_size=8, learning_rate=0.05, warmup=2, weight_decay=1e-3, shift=1, flip=True, noise=0.1
)

SHORT = dataclasses.replace(RECIPE, updates=3, optimizer='sgd', warmup=0)


def _loss(logits, features, x, labels, frozen, progress):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _data(count=20):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *IMAGE_SHAPE), dtype=np.uint8), (np.arange(count) % 3).astype(np.int32)


def _fit(folder, recipe=RECIPE, devices=1, loss=_loss, seed=3, stops=(), **snapshots):
    """(variables, metrics) of a training that stops and goes on at the updates `stops`."""
    images, labels = _data()
    workdir, job = Workdir(folder, {}), TrainJob(recipe, loss, Rounds(len(labels)))
    try:
        mesh = make_mesh(devices)
        records = Records(workdir, 'teacher', 'teacher', LOGGING, **snapshots)
        with Training(TinyNet(), job, CLASSIFIER, seed, mesh, records) as training:
            for stop in stops:
                training.advance(images, labels, stop)
            variables = training.finish(images, labels)
    finally:
        workdir.close()
    return variables, [*workdir.metrics.lines('teacher', 'teacher')]


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    return _fit(tmp_path_factory.mktemp('undisturbed'))


def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(undisturbed, tmp_path, monkeypatch):
    def killed_at(update):
        def chosen(seed, number, *args):
            if number == update:
                raise KeyboardInterrupt
            calls.append(number)
            return chosen_images(seed, number, *args)

        calls = []
        monkeypatch.setattr(dvinv.training.step, 'chosen_images', chosen)
        return calls

    for update, first in ((5, 0), (7, 4)):  # after the checkpoint of update 4, and once more, resumed from it
        calls = killed_at(update)
        with pytest.raises(KeyboardInterrupt):
            _fit(tmp_path)
        assert calls == list(range(first, update))
    calls = killed_at(None)
    variables, metrics = _fit(tmp_path)
    assert calls == [4, 5, 6, 7]
    _same(variables, undisturbed[0])
    assert metrics == undisturbed[1]


def test_sigterm_keeps_a_checkpoint_of_any_update(undisturbed, tmp_path, monkeypatch, capsys):
    """Also between two lines of metrics, whose mean is that of an undisturbed training."""
    for update in (0, 3, 5):
        with monkeypatch.context() as patch:

            def chosen(seed, number, *args, patch=patch, update=update):
                if number == update + 1:  # which is read while the one before is made
                    patch.setattr(preemption, '_received', signal.SIGTERM)
                return chosen_images(seed, number, *args)

            patch.setattr(dvinv.training.step, 'chosen_images', chosen)
            with pytest.raises(SystemExit) as ended:
                _fit(tmp_path)
        assert ended.value.code == 143
        assert (tmp_path / 'checkpoints' / 'teacher' / f'{update:09d}.json').exists() == bool(update)
        said = f'{update} of 8 updates of the teacher are saved' if update else 'no update of the teacher was made'
        assert f'SIGTERM: {said}' in capsys.readouterr().err
    variables, metrics = _fit(tmp_path)
    _same(variables, undisturbed[0])
    assert metrics == undisturbed[1]


def test_a_training_in_stretches_is_the_same_training_and_each_stop_is_a_checkpoint(undisturbed, tmp_path):
    variables, metrics = _fit(tmp_path, stops=(3, 6))
    _same(variables, undisturbed[0])
    assert [line['step'] for line in metrics] == [2, 3, 4, 6, 8]
    assert [path.name for path in (tmp_path / 'checkpoints' / 'teacher').glob('*.json')] == ['000000006.json']


def test_snapshots_are_the_network_at_their_updates_and_survive_kills(undisturbed, tmp_path):
    taken: list = []

    def save(update, variables):
        if not taken:
            taken.append(None)
            raise KeyboardInterrupt  # killed when the checkpoint of update 3 is written and the snapshot is not
        taken.append((update, variables))

    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / 'run', snapshots=(3, 6), save_snapshot=save)
    variables, _ = _fit(tmp_path / 'run', snapshots=(3, 6), save_snapshot=save)
    _same(variables, undisturbed[0])
    assert [update for update, _ in taken[1:]] == [3, 6]
    assert not np.array_equal(*(snapshot['params']['Dense_0']['kernel'] for _, snapshot in taken[1:]))


def test_metrics_tell_the_mean_loss_every_so_many_updates(undisturbed):
    _, metrics = undisturbed
    assert [line['step'] for line in metrics] == [2, 4, 6, 8]
    assert all(0 < line['loss'] < 10 for line in metrics)


def test_the_seed_decides(undisturbed, tmp_path):
    variables, _ = _fit(tmp_path, seed=4)
    assert not np.array_equal(variables['params']['Dense_0']['kernel'], undisturbed[0]['params']['Dense_0']['kernel'])


# Which images


@pytest.mark.parametrize(('batch_size', 'count'), [(4, 20), (7, 20), (20, 20), (33, 20), (1, 3)])
def test_every_image_is_shown_once_an_epoch(batch_size, count):
    updates = 3 * count
    shown = np.concatenate([chosen_images(5, update, batch_size, Rounds(count)) for update in range(updates)])
    assert shown.shape == (updates * batch_size,)
    epochs = shown[: updates * batch_size // count * count].reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(count), epochs.shape))
    assert count < 20 or len({epoch.tobytes() for epoch in epochs}) == len(epochs)


def test_the_images_of_an_update_depend_on_seed_and_number_alone():
    rounds = Rounds(20)
    late, again = chosen_images(1, 9, 8, rounds), [chosen_images(1, update, 8, rounds) for update in (9, 0, 9)]
    np.testing.assert_array_equal(again[0], late)
    np.testing.assert_array_equal(again[2], late)
    assert not np.array_equal(chosen_images(2, 9, 8, rounds), late)


def test_a_round_begins_with_its_new_images_and_goes_on_with_all_that_have_come():
    rounds = Rounds(images=6, count=3, updates=4)
    assert [rounds.round_of(update) for update in (0, 3, 4, 8, 99)] == [0, 0, 1, 2, 2]
    for number in range(3):
        first, known = rounds.first_update(number), 6 * (number + 1)
        shown = np.concatenate([chosen_images(5, update, 3, rounds) for update in range(first, first + 8)])
        if number < 2:
            assert rounds.round_of(first + 4) == number + 1
            shown = shown[:12]
        assert sorted(shown[:6]) == [*range(known - 6, known)]  # the new ones, each once, at once
        assert shown[6:].max() < known
        assert len({*shown[6:]}) == len(shown[6:])  # no image twice in an epoch
    assert {*np.concatenate([chosen_images(5, update, 3, rounds) for update in range(10, 16)])} == {*range(18)}


# Several updates a dispatch, images on the devices, bfloat16


@pytest.mark.parametrize(('updates', 'resident'), [(2, False), (3, True)])
def test_several_updates_a_dispatch_give_the_bits_of_single_ones(undisturbed, tmp_path, monkeypatch, updates, resident):
    """Also from images that lie on the devices; of a limit of 3 the dispatch takes 2, which divides the line of metrics."""
    monkeypatch.setattr(dvinv.training.step, 'fits_on_devices', lambda mesh, size: resident)
    recipe = dataclasses.replace(RECIPE, updates_per_dispatch=updates)
    variables, metrics = _fit(tmp_path, recipe, stops=(3,))
    _same(variables, undisturbed[0])
    assert [line['step'] for line in metrics] == [2, 3, 4, 6, 8]


def _updates(of_a_dispatch, devices=1):
    """(state, losses) after 4 updates by the program that accelerators run."""
    images, labels = _data()
    job, key = TrainJob(SHORT, _loss, Rounds(len(labels))), jax.random.key(3)
    step = TrainStep(TinyNet(), job, CLASSIFIER, make_mesh(devices), of_a_dispatch)
    step.batches.load(images, labels)
    state, losses = step.place(step.initial_state(key)), []
    rows = np.stack([job.rows(3, number) for number in range(4)])
    several = of_a_dispatch > 1
    for chosen in step.batches.each(rows.reshape(-1, of_a_dispatch, 8) if several else rows):
        state, loss = step.programs[several](state, step.batches.arrays, chosen, None, key)
        losses.extend(np.ravel(loss))
    return state, losses


@pytest.mark.slow
def test_the_scan_that_accelerators_run_makes_the_same_updates_within_rounding():
    single = _updates(1)
    for scanned in (_updates(4), _updates(4, devices=2)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), scanned, single)


def test_images_that_come_in_rounds_join_those_on_the_devices():
    images, labels = _data(6)
    batches = ResidentBatches(make_mesh(2), 6, IMAGE_SHAPE)
    for count in (4, 4, 6):
        batches.load(images[:count], labels[:count])
        (chosen,) = batches.each([np.array([count - 1, 0], np.int32)])
        picked, _ = batches.pick(batches.arrays, chosen)
        np.testing.assert_array_equal(picked, images[[count - 1, 0]])
    np.testing.assert_array_equal(batches.arrays[1], labels)


def test_images_of_two_sets_lie_on_the_devices_as_many_as_are_used():
    images, labels = _data(9)
    batches = ResidentBatches(make_mesh(2), 6, IMAGE_SHAPE)
    batches.load(Joined(images[:4], images[4:]), Joined(labels[:4], labels[4:]))
    np.testing.assert_array_equal(batches.arrays[0], images[:6])
    np.testing.assert_array_equal(batches.arrays[1], labels[:6])


def test_batches_from_the_host_are_read_in_order_and_their_errors_reach_the_training():
    images, labels = _data(6)
    batches = HostBatches(make_mesh(1))
    batches.load(images, labels)
    read = batches.each([np.array(rows, np.int32) for rows in ([0, 1], [5, 2], [9, 9])])
    for rows in ([0, 1], [5, 2]):
        chosen = next(read)
        np.testing.assert_array_equal(chosen[0], images[rows])
    with pytest.raises(IndexError):
        next(read)


@pytest.mark.parametrize(('size', 'updates'), [(2**28, 50), (2**20, 5), (1, 1)])
def test_a_dispatch_from_the_host_is_of_so_many_bytes_at_most(monkeypatch, size, updates):
    monkeypatch.setattr(dvinv.training.step, 'STREAMED_BYTES', size)
    recipe = dataclasses.replace(RECIPE, batch_size=2**20 // 5 // 128)
    assert TrainStep(TinyNet(), TrainJob(recipe, _loss, Rounds(20)), CLASSIFIER, make_mesh(1), 50).updates == updates


def test_images_lie_on_the_devices_where_a_quarter_of_the_free_memory_holds_them():
    def mesh(platform, **stats):
        device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
        return mock.Mock(jax.sharding.Mesh, devices=np.array([device]), local_devices=[device])

    gpu = mesh('gpu', bytes_limit=1000, bytes_in_use=200)
    assert fits_on_devices(gpu, 200)
    assert not fits_on_devices(gpu, 201)
    assert not fits_on_devices(mesh('gpu'), 1)
    assert not fits_on_devices(mesh('cpu', bytes_limit=1000, bytes_in_use=0), 1)


@pytest.mark.slow
def test_in_bfloat16_the_loss_is_nearly_the_same_and_all_that_is_kept_is_float32():
    images, labels = _data()
    losses = []
    for precision in ('float32', 'bfloat16'):
        recipe = dataclasses.replace(RECIPE, precision=precision)
        step = TrainStep(TinyNet(), TrainJob(recipe, _loss, Rounds(20)), CLASSIFIER, make_mesh(1))
        state, loss = step(step.initial_state(jax.random.key(0)), (images[:8], labels[:8]), jax.random.key(1))
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state) if np.issubdtype(leaf.dtype, np.floating))
        assert loss.dtype == np.float32
        losses.append(float(loss))
        equations = _equations(step, state, images[:8], labels[:8])
        convolutions = [e for e in equations if e.primitive.name == 'conv_general_dilated']
        assert {v.aval.dtype.name for e in convolutions for v in e.invars} == {precision}
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def _equations(step, state, images, labels):
    """The operations of one train step, those of sub-programs too."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in equation.params.values():
                if hasattr(value, 'jaxpr'):
                    yield from inside(getattr(value.jaxpr, 'jaxpr', value.jaxpr))

    closed = jax.make_jaxpr(step.function(several=False))(state, (), (images, labels), None, jax.random.key(1))
    return [*inside(closed.jaxpr)]


# Schedules


def _rates(recipe):
    """The learning rate of each update, from the steps that Nesterov's momentum takes on a constant gradient of 1."""
    optimizer = recipe.make_optimizer()
    state, momentum, rates = optimizer.init(np.float32(0)), 0.0, []
    for _ in range(recipe.updates):
        step, state = optimizer.update(np.float32(1), state, np.float32(0))
        momentum = 1 + 0.9 * momentum
        rates.append(-float(step) / (1 + 0.9 * momentum))
    return rates


def test_the_cosine_schedule_warms_up_and_falls_to_zero():
    rates = _rates(TrainingSettings(10, 8, 0.5, 'sgd', 'cosine', warmup=2))
    expected = [0, 0.25, *(0.25 * (1 + np.cos(np.pi * np.arange(8) / 8)))]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize('warmup', [0, 2])
def test_the_step_schedule_divides_by_ten_after_each_milestone(warmup):
    rates = _rates(TrainingSettings(10, 8, 0.5, 'sgd', 'step', milestones=(0.4, 0.8), warmup=warmup))
    expected = np.array([0.5] * 4 + [0.05] * 4 + [0.005] * 2)
    expected[:warmup] *= np.arange(warmup) / max(warmup, 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_weight_decay_shrinks_weights_that_have_no_gradient(optimizer):
    optimizer = TrainingSettings(10, 8, 0.1, optimizer, 'cosine', weight_decay=0.1).make_optimizer()
    step, _ = optimizer.update(np.float32(0), optimizer.init(np.float32(2)), np.float32(2))
    assert float(step) < 0


@pytest.mark.parametrize(
    ('fields', 'sentence'),
    [
        ({'updates': 0}, 'updates is 0; it must be at least 1'),
        ({'batch_size': 0}, 'batch_size is 0; it must be at least 1'),
        ({'optimizer': 'lion'}, "optimizer is 'lion'; choose one of adam, sgd"),
        ({'schedule': 'linear'}, "schedule is 'linear'; choose one of cosine, step"),
        ({'precision': 'float16'}, "precision is 'float16'; choose one of float32, bfloat16"),
        ({'updates_per_dispatch': -1}, 'updates_per_dispatch is -1; it must be at least 0'),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(fields, sentence):
    with pytest.raises(DvinvError, match=sentence):
        dataclasses.replace(RECIPE, **fields)


# Statistics, devices, losses


class Depthwise(nn.Module):
    """A depthwise convolution, for which XLA has no fast code on a CPU."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3), feature_group_count=x.shape[-1])(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize(('platform', 'kept'), [('cpu', False), ('gpu', True)])
def test_what_is_slow_on_a_cpu_is_replaced_in_network_loss_and_reestimation(monkeypatch, platform, kept):
    monkeypatch.setattr(dvinv.training.step, 'platform_of', lambda mesh: platform)
    module, like = Depthwise(), pixels_only((8, 8, 2), 3, (0.5, 0.5), (0.5, 0.5))
    variables, key = initial_variables(module, jax.random.key(0), (8, 8, 2), None), jax.random.key(1)

    def loss(logits, features, x, labels, frozen, progress):
        return ((logits - module.apply(frozen, x)) ** 2).mean()

    job, state = TrainJob(SHORT, loss, Rounds(8)), initial_state(SHORT, variables)
    images, labels = np.zeros((8, 8, 8, 2), np.uint8), np.zeros(8, np.int32)
    mesh = make_mesh(1)
    update = jax.make_jaxpr(make_train_step(module, job, like, mesh))(state, images, labels, variables, key)
    reestimate = jax.make_jaxpr(make_reestimate(module, job, like, mesh))(state, images, key)
    assert ['conv_general_dilated' in str(program) for program in (update, reestimate)] == [kept] * 2


def test_estimating_statistics_again_changes_them_and_no_weight(undisturbed, tmp_path):
    variables, metrics = _fit(tmp_path, dataclasses.replace(RECIPE, reestimate=30))
    _same(variables['params'], undisturbed[0]['params'])
    assert metrics == undisturbed[1]
    for name, layer in variables['batch_stats'].items():
        for statistic in ('mean', 'var'):
            assert not np.allclose(layer[statistic], undisturbed[0]['batch_stats'][name][statistic], rtol=1e-3)


@pytest.fixture(scope='module')
def on_one_device(tmp_path_factory):
    return _fit(tmp_path_factory.mktemp('one'), SHORT)[0]


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 8])
def test_several_devices_train_nearly_the_same_network(on_one_device, tmp_path, devices):
    several, _ = _fit(tmp_path, SHORT, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), several, on_one_device)


def test_a_batch_that_devices_do_not_divide_is_refused(tmp_path):
    with pytest.raises(DvinvError, match='A batch of 12 images cannot be split evenly over 8 devices'):
        _fit(tmp_path, dataclasses.replace(RECIPE, batch_size=12), devices=8)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_update(tmp_path):
    # The first update is made with finite weights; its learning rate spoils them for the second.
    recipe = dataclasses.replace(SHORT, learning_rate=1e38)
    with pytest.raises(DvinvError, match='The loss of the teacher is not a finite number at update 2: lower its learning'):
        _fit(tmp_path, recipe)
