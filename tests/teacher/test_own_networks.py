"""Networks of a user's own: whatever says that they train, they are taught, saved, pruned and grown as dvinv's are."""

import contextlib
import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from smoke import smoke_config, smoke_run
from tiny import IMAGE_SHAPE, TinyNet, tiny_teacher, trained

from dvinv import DvinvError, from_linen, from_nnx, load
from dvinv.config import TrainingSettings
from dvinv.continual.task import head_path, network_of
from dvinv.distillation.student import (
    choose_hints,
    distillation_loss,
    hints_of,
    staged_forward,
    student_of,
    validate_student,
)
from dvinv.inversion.linen_modules import features_in_training, trainable, validate_trainable, with_classes
from dvinv.networks import module_of, save_network, shapes_of
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.classifier import flatten
from dvinv.networks.pruned import PrunedModule
from dvinv.pipeline import tasks as pipeline
from dvinv.pruning import task as pruning
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.workdir import Workdir
from dvinv.teacher import networks
from dvinv.teacher import task as teacher
from dvinv.training.step import Rounds, TrainJob
from dvinv.training.trainer import Records, Training

KEY = jax.random.key(0)


class ByArgument(nn.Module):
    """A network whose dropout and BatchNorm are switched by an argument of another name."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        x = nn.Conv(4, (3, 3))(x)
        self.sow('intermediates', 'convolved', x)
        x = nn.relu(nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=deterministic)(x.mean((1, 2))))


class ByField(nn.Module):
    """The same, switched by a field."""

    training: bool = True
    num_classes: int = 3

    @nn.compact
    def __call__(self, x):
        return ByArgument.__call__(self, x, not self.training)


class Nnx(nnx.Module):
    """The same as an NNX model."""

    def __init__(self, num_classes, rngs):
        self.conv, self.norm = nnx.Conv(IMAGE_SHAPE[-1], 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, num_classes, rngs=rngs)
        self.train = False  # hides the method

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


class NeverTrained(nn.Module):
    """A network that nothing switches."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x).mean((1, 2)))


class WithConstants(TinyNet):
    """A network with variables of a collection of its own."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        scale = self.variable('constants', 'scale', jnp.ones, ())
        return super().__call__(x * scale.value, train)


class Pair(TinyNet):
    """A network that returns more than logits."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        logits = super().__call__(x, train)
        return logits, logits


def own(source=Nnx, classes=3):
    """The network of a class as `student.factory` would give it."""
    return networks.network_of(source, classes, 'it')


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).normal(size=(6, *IMAGE_SHAPE)).astype(np.float32)


def variables_of(module):
    return trained(shapes_of(module, IMAGE_SHAPE))


each_kind = pytest.mark.parametrize('source', [ByArgument, ByField, Nnx])


@each_kind
def test_whatever_says_so_a_network_is_trained_and_heard(source, images):
    module = own(source)
    validate_trainable(module, IMAGE_SHAPE, 3, 'it')
    variables = variables_of(module)
    assert variables.keys() == {'params', 'batch_stats'}
    (layer,) = variables['batch_stats']

    def run(key):
        return features_in_training(module, variables, images, {'dropout': key})

    logits, features, statistics = run(KEY)
    np.testing.assert_array_equal(logits, run(KEY)[0])
    assert not np.allclose(logits, run(jax.random.key(1))[0])  # dropout
    (x,) = features[layer]
    mean = 0.9 * variables['batch_stats'][layer]['mean'] + 0.1 * np.mean(x, (0, 1, 2))
    np.testing.assert_allclose(statistics[layer]['mean'], mean, rtol=1e-4, atol=1e-6)
    answers = module.apply(variables, images, train=False)
    np.testing.assert_array_equal(answers, module.apply(variables, images, train=False))
    assert not np.allclose(answers, logits)


def test_an_nnx_network_answers_as_the_model_itself_and_leaves_it_alone(images):
    model = Nnx(3, nnx.Rngs(0))
    module = trainable(model)
    variables = module.init(KEY, None)
    assert not variables['params'].keys() - {'conv', 'norm', 'head'}
    answers = module.apply(variables, images)
    model.eval()
    np.testing.assert_allclose(answers, model(images), rtol=1e-6)
    # A function that takes rngs gives other weights for another seed, a model its own.
    kernels = [own().init(jax.random.key(seed), None)['params']['head']['kernel'] for seed in (0, 1)]
    assert not np.allclose(*kernels)


@pytest.mark.parametrize(
    ('source', 'classes', 'words'),
    [
        (NeverTrained, 3, 'nothing tells them that it trains'),
        (WithConstants, 3, "keeps variables in constants, and a network that is trained here has those of 'params'"),
        (Pair, 3, 'must return logits [B, 3]'),
        (TinyNet(num_classes=3), 5, 'must return logits [B, 5]'),
        (nn.Dense(3), 3, 'must return logits [B, 3]'),
    ],
)
def test_what_cannot_be_trained_is_refused(source, classes, words):
    with pytest.raises(DvinvError) as caught:
        validate_trainable(own(source, classes), IMAGE_SHAPE, classes, 'The student')
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('factories:missing', 'cannot be imported'),
        ('factories:no_teacher', 'returned a dict; it must return a dvinv.Teacher'),
        ('factories:needs_more', "takes the argument 'depth'"),
        ('factories:own', 'returned a dvinv.Teacher; return the Flax module itself'),
    ],
)
def test_functions_that_give_no_network_are_refused(name, words):
    with pytest.raises(DvinvError) as caught:
        networks.student_of_factory(name, 10)
    assert words in str(caught.value)


# A student


@pytest.mark.slow
def test_a_killed_student_of_ones_own_ends_with_the_bits_of_an_undisturbed_one(images, tmp_path):
    like, module = tiny_teacher(), own()
    recipe = TrainingSettings(updates=4, batch_size=2, learning_rate=0.1, warmup=0)
    job = TrainJob(recipe, distillation_loss(like, 3.0), Rounds(6), like.variables)
    logging = SimpleNamespace(every=2, checkpoint_every=2)
    pixels, labels = like.to_uint8(images), np.zeros(6, np.int32)

    workdirs = {name: Workdir(tmp_path / name, {}) for name in ('whole', 'killed')}

    def begin(name):
        return Training(module, job, like, 0, make_mesh(1), Records(workdirs[name], 'distillation', 'student', logging))

    whole = begin('whole').finish(pixels, labels)
    begin('killed').advance(pixels, labels, 2)
    resumed = begin('killed')
    assert resumed.step == 2
    for mine, undisturbed in zip(jax.tree.leaves(resumed.finish(pixels, labels)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, undisturbed)
    for workdir in workdirs.values():
        workdir.close()


@each_kind
def test_stages_of_ones_own_student_are_found_and_grafted(source, images):
    like, module = tiny_teacher(channels=(4,)), own(source)
    pairs = choose_hints('stages', module, like).pairs
    assert [pair.student.channels for pair in pairs] == [4]
    forward = staged_forward(module, like, pairs, 0.5)
    arguments = shapes_of(module, IMAGE_SHAPE), {}, images, {'dropout': KEY}, like.variables, 0.5
    logits, features, statistics = jax.eval_shape(forward, *arguments)
    assert (logits.shape, features['stage_errors'].shape) == ((6, 3), (1,))
    assert statistics.keys() == shapes_of(module, IMAGE_SHAPE)['batch_stats'].keys()


def test_a_factory_is_the_students_and_a_larger_one_is_said(capsys):
    run = smoke_run(student__factory='factories:module', distillation__hint=1.0)
    run.planned_teacher = like = tiny_teacher(num_classes=10)
    assert hints_of(run, like).kind == 'layers'
    target = student_of(run, like)
    assert (target.about['network'], target.module.label) == ('', 'TinyNet')
    validate_student(run)
    assert capsys.readouterr().err == ''
    run = smoke_run(student__factory='factories:module')
    run.planned_teacher = tiny_teacher(num_classes=10, channels=(2,))
    validate_student(run)
    assert 'The student has 330 parameters, more than the teacher (70)' in capsys.readouterr().err


@pytest.mark.parametrize('classes', [3, 5])
@each_kind
def test_a_file_is_loaded_with_the_module_given(source, classes, images, tmp_path):
    module = with_classes(own(source), IMAGE_SHAPE, classes)
    variables = variables_of(module)
    about = {'network': '', 'width': 1.0, 'num_classes': classes, 'image_shape': IMAGE_SHAPE, 'mean': (0, 0), 'std': (1, 1)}
    save_network(tmp_path / 'networks' / 'student.safetensors', variables, about)
    with pytest.raises(DvinvError, match='holds the weights of a network of your own'):
        load(tmp_path, 'distillation')
    with pytest.raises(DvinvError, match=r'other weights than this module has: params/\S+ and \d+ more|differ'):
        load(tmp_path, 'distillation', module=TinyNet(channels=(2,)))
    given = Nnx(3, nnx.Rngs(0)) if source is Nnx else source()  # of any number of classes
    apply_fn, loaded = load(tmp_path, 'distillation', module=given)
    np.testing.assert_allclose(apply_fn(loaded, images), module.apply(variables, images), rtol=1e-6)


# Pruned, with more classes


@each_kind
def test_channels_of_ones_own_network_can_be_removed(source, images):
    module = own(source)
    channels = find_channels(module, IMAGE_SHAPE)
    assert [*channels.layers] == [{Nnx: 'conv'}.get(source, 'Conv_0')]
    alive = np.array([True, False, True, True])
    variables, narrow = variables_of(module), PrunedModule(module, channels.kept(alive))
    small = channels.sliced(alive, variables)
    answers = module.apply(channels.masked(alive, variables), images)
    np.testing.assert_allclose(narrow.apply(small, images, train=False), answers, rtol=1e-4, atol=1e-5)
    # It learns and is heard as it is.
    _, features, statistics = jax.eval_shape(lambda v: features_in_training(narrow, v, images, {'dropout': KEY}), small)
    (norm,) = variables['batch_stats']
    assert features[norm][0].shape[-1] == statistics[norm]['mean'].shape[0] == 3
    assert flatten(shapes_of(narrow, IMAGE_SHAPE)).keys() == flatten(variables).keys()


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_a_teacher_keeps_its_module(kind):
    pictures = {'image_shape': IMAGE_SHAPE, 'mean': 0.5, 'std': 0.5}
    module = own(ByArgument)
    linen = from_linen(ByArgument(), variables_of(module), **pictures)
    like = linen if kind == 'linen' else from_nnx(Nnx(3, nnx.Rngs(0)), **pictures)
    run = smoke_run(teacher__factory='factories:own', tasks=('pruning',))
    run.planned_teacher = like
    pruning.validate(run)
    grown = network_of(run, like, 5)
    assert (grown.num_classes, head_path(run, like)) == (5, {'linen': 'Dense_0', 'nnx': 'head'}[kind])
    assert grown.tap.layers == like.tap.layers
    assert network_of(run, grown, 7).num_classes == 7
    target = pruning.TrainTarget('pruning', 'pruned', run.settings.teacher, like, 5, user_module=like.module, kept={})
    assert module_of(target.about, target.user_module) is like.module
    run.planned_teacher = dataclasses.replace(like, module=None)
    with pytest.raises(DvinvError, match=r'The network of teacher\.factory .* is unknown'):
        pruning.validate(run)


def test_a_head_that_other_layers_share_is_not_grown():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(x).mean((1, 2))
            return nn.Dense(3)(x) + self.param('shift', nn.initializers.zeros, (3,))

    with pytest.raises(DvinvError, match='The head of Shared, which is to grow from 3 to 5 classes, is not found'):
        with_classes(own(Shared), IMAGE_SHAPE, 5)


def test_new_classes_are_learned_by_a_factorys_network():
    config = smoke_config(
        teacher__factory='factories:five_classes',
        tasks=('continual',),
        data__classes=(0, 1, 2, 3, 4),
        continual__steps=({'classes': (5, 6)},),
        continual__controls=(),
    )
    assert pipeline.validated(config).planned_teacher.num_classes == 5


# An untrained teacher


def test_a_factorys_module_is_trained_on_the_data(tmp_path):
    own = {'teacher__factory': 'factories:module', 'verifier__network': '', 'teacher__mean': (), 'teacher__std': ()}
    run = smoke_run(tmp_path / 'run', **own)
    like = run.planned_teacher
    assert (like.image_shape, like.num_classes) == ((8, 8, 1), 10)
    assert (like.mean, like.std) == ((0.3054,), (0.376,))  # of the pixels of the digits
    assert [one.name for one in teacher.planned_trainings(run)] == ['teacher']
    with contextlib.closing(run.open_workdir()) as workdir:
        assert not run.has_teacher
    about = {
        'network': '',
        'width': 1.0,
        **{name: getattr(like, name) for name in ('num_classes', 'image_shape', 'mean', 'std')},
    }
    variables = trained(like.variables)
    save_network(workdir.network('teacher'), variables, about)
    assert run.has_teacher
    assert run.teacher.module is like.module
    given = {**own, 'teacher__weights': str(workdir.network('teacher'))}
    assert smoke_run(**given).teacher.digest() == run.teacher.digest()
    save_network(workdir.network('teacher'), {**variables, 'batch_stats': {}}, about)
    with pytest.raises(DvinvError, match=r'other weights than the network of teacher\.factory'):
        _ = smoke_run(**given).teacher


def test_a_module_that_is_to_be_trained_needs_data():
    with pytest.raises(DvinvError, match=r"The teacher is to be trained, but data\.name is ''"):
        _ = smoke_run(teacher__factory='factories:ten_classes', data__name='', verifier__network='').planned_teacher
    with pytest.raises(DvinvError, match='takes num_classes, which is that of the data'):
        _ = smoke_run(teacher__factory='factories:module', data__name='', verifier__network='').planned_teacher


def test_a_teacher_of_more_than_logits_is_trained_on_by_these_alone():
    pictures = {'image_shape': IMAGE_SHAPE, 'mean': 0.5, 'std': 0.5}
    like = from_linen(Pair(), variables_of(own(Pair)), logits=lambda out: out[0], **pictures)
    validate_trainable(like.module, IMAGE_SHAPE, 3, 'it')
    assert [*find_channels(like.module, IMAGE_SHAPE).layers] == ['Conv_0', 'Conv_1']
