"""The contract between a user's network and dvinv: what breaks it is refused in a sentence, what keeps it is taken."""

import dataclasses
import gc
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, tiny_teacher, trained, trained_variables

from dvinv import DvinvError, from_linen, from_nnx, invert
from dvinv.config import InversionConfig, Stage, TrainingSettings, Weights
from dvinv.inversion.augmentation import Augmentation
from dvinv.inversion.step import InversionState, initial_parameters, make_decode, make_step
from dvinv.inversion.teacher import check_answers
from dvinv.networks import save_network
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.classifier import Classifier, check_finite, flatten, unflatten
from dvinv.networks.files import load_network
from dvinv.networks.pruned import PrunedModule
from dvinv.runtime.devices import make_mesh
from dvinv.teacher.task import supervised
from dvinv.training.step import Rounds, TrainJob, initial_state, make_train_step

PICTURES = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}


def _teacher(module, variables=None, **options):
    variables = trained_variables(module) if variables is None else variables
    return from_linen(module, variables, **{**PICTURES, **options})


def _images(batch=3):
    return np.random.default_rng(0).normal(size=(batch, *IMAGE_SHAPE)).astype(np.float32)


ONE = InversionConfig((Stage(1, 0.1),), Weights(total_variation=0))


# What the network answers


class Ending(nn.Module):
    """A small network with something before and after its layers."""

    last: Any = lambda z: z
    first: Any = lambda x: x
    dtype: Any = None
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4, dtype=self.dtype)(self.first(x))))
        return self.last(nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2))))


class BatchMoments(nn.Module):
    """A normalization by the moments of the batch, in eval mode too."""

    detached: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        if self.detached:
            mean, var = jax.lax.stop_gradient((mean, var))
        return nn.Dense(3)(nn.relu(nn.Dense(4)((x - mean) / jnp.sqrt(var + 1e-5))).mean((1, 2)))


@jax.custom_vjp
def _without_gradient(x):
    return jnp.tanh(x)


_without_gradient.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (jnp.zeros_like(g),))


def _callback(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def _standardised(x):
    """Each image by its own moments, as some networks begin."""
    return (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)


def _masked(z):
    return jnp.where(jnp.arange(z.shape[-1]) == 1, -jnp.inf, z)


NO_GRADIENT = 'have no gradient with respect to the pixels.*stop_gradient, argmax, rounding'
PROBABILITIES = 'Ending returns probabilities: .*Return the logits: leave out the '


@pytest.mark.parametrize(
    ('module', 'sentence'),
    [
        (Ending(nn.softmax), PROBABILITIES + 'softmax at its end, or take the log of it'),
        (Ending(nn.softmax, dtype=jnp.bfloat16), PROBABILITIES),
        (Ending(lambda z: 100 * nn.softmax(_masked(z))), PROBABILITIES),
        (Ending(lambda z: nn.sigmoid(9 * z)), PROBABILITIES + 'sigmoid'),
        (Ending(lambda z: nn.sigmoid(0.1 * jnp.tanh(z))[:, :2]), PROBABILITIES + 'sigmoid'),
        (Ending(classes=1), r'Ending returns 1 logit per image.*must return two, \[0, z\]'),
        (Ending(lambda z: nn.sigmoid(z)[:, 0]), r'Ending must return logits \[B, K\]'),
        (Ending(lambda z: (z, z)), r'Ending must return logits \[B, K\].*logits=lambda out: out\[0\], for instance'),
        (Ending(lambda z: {'logits': z}), r"Ending must return logits \[B, K\].*logits=lambda out: out\['logits'\]"),
        (Ending(lambda z: (9 * z).astype(jnp.int8)), 'Ending returns int8 numbers; logits must be floating'),
        (Ending(jax.lax.stop_gradient), NO_GRADIENT),
        (Ending(jnp.round), NO_GRADIENT),
        (Ending(lambda z: nn.one_hot(z.argmax(-1), 3)), NO_GRADIENT),
        (Ending(first=lambda x: (10 * x).astype(jnp.int32) / 10), NO_GRADIENT),
        (Ending(first=_without_gradient), NO_GRADIENT),
        (Ending(first=_callback), 'Ending cannot be differentiated with respect to its images: ValueError'),
        (Ending(lambda z: z + jnp.nan), 'Ending returns logits that are NaN or infinite'),
        (Ending(lambda z: z - z.mean(0)), 'depend on the other images of the batch'),
        (Ending(lambda z: z + jnp.arange(len(z))[:, None]), 'depend on the other images of the batch'),
        (Ending(jnp.squeeze), r'for one image it gives \(3,\) instead of \(1, 3\)\. Is there a squeeze'),
        (Ending(lambda z: z.reshape(2, -1, 3).mean(1)), r'for one image it gives TypeError.* instead of \(1, 3\)'),
        (BatchMoments(), 'depend on the other images of the batch: .*BatchMoments .*running statistics'),
        (BatchMoments(detached=True), 'depend on the other images of the batch'),
        (Ending(lambda z: (z - z.mean(0)).at[:, 1].set(-1e9)), 'depend on the other images of the batch'),
    ],
    ids=range(24),
)
def test_a_network_that_does_not_answer_as_a_classifier_is_refused(module, sentence):
    with pytest.raises(DvinvError, match=sentence):
        _teacher(module)


@pytest.mark.parametrize(
    'module',
    [
        Ending(nn.log_softmax),
        Ending(dtype=jnp.bfloat16),
        Ending(dtype=jnp.float16),
        Ending(_masked),
        Ending(lambda z: nn.log_softmax(_masked(z))),
        Ending(lambda z: z + 1000),
        Ending(lambda z: 0.3 + 1e-4 * z),
        Ending(nn.relu),
        Ending(first=_standardised),
        Ending(first=lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)),
        Ending(lambda z: jnp.concatenate([0 * z[:, :1], z[:, :1]], 1)),
        Ending(lambda z: jnp.stack([z[:, 0], 1 - z[:, 0]], 1)),
    ],
    ids=range(12),
)
def test_what_answers_as_a_classifier_is_taken(module):
    assert _teacher(module).num_classes > 1


def test_a_network_that_is_yet_to_be_trained_is_not_run():
    shapes = jax.eval_shape(TinyNet().init, jax.random.key(0), _images())
    assert _teacher(TinyNet(), shapes).num_classes == 3


def test_the_check_of_answers_takes_any_classifier():
    teacher = tiny_teacher()
    fields = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(Classifier)}
    fields['apply_fn'] = lambda variables, x: nn.softmax(teacher.apply_fn(variables, x))
    with pytest.raises(DvinvError, match='it returns probabilities'):
        check_answers(Classifier(**fields), 'it')


# What layers are called with


class Calls(nn.Module):
    """A BatchNorm that is called in some way."""

    call: Any
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.call(self.norm(use_running_average=True), x).mean((1, 2)))


class Weighted(nn.BatchNorm):
    """A subclass with arguments of its own."""

    def __call__(self, inputs, weights=None, flag=False, name='a'):
        return super().__call__(inputs)


class OwnNorm(nn.Module):
    """A normalization with other arguments than Flax's: weights are taken for a scale."""

    use_running_average: bool = True

    @nn.compact
    def __call__(self, x, weights=None, train=False):
        mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1:])
        var = self.variable('batch_stats', 'var', jnp.ones, x.shape[-1:])
        scale = 1 if weights is None or weights.ndim == 3 else weights.reshape(-1, *[1] * (x.ndim - 2), weights.shape[-1])
        return (x - mean.value) / jnp.sqrt(var.value) * scale


def _inside(x):
    """A mask that cuts the border of images."""
    return jnp.zeros((*x.shape[:3], 1), bool).at[:, 2:6, 1:7].set(True)


class Positional(nnx.BatchNorm):
    """A subclass that takes a mask by its position."""

    def __call__(self, x, flag, mask):
        mean, var = self.mean[...], self.var[...]
        return jnp.where(mask, (x - mean) / jnp.sqrt(var), 0)


class MaskedNnx(nnx.Module):
    def __init__(self, rngs, positional=False):
        self.norm, self.head = (Positional if positional else nnx.BatchNorm)(2, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        arguments = (True, _inside(x)) if isinstance(self.norm, Positional) else ()
        return self.head(self.norm(x, *arguments, **({} if arguments else {'mask': _inside(x)})).mean((1, 2)))


def _nnx_model(make, **fields):
    graph, noise, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **fields)), nnx.RngState, ...)
    noise = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), noise)
    return nnx.merge(graph, noise, jax.tree.map(jnp.asarray, nnx.State(trained(nnx.to_pure_dict(state)))))


@pytest.mark.parametrize('kind', ['linen', 'nnx', 'positional'])
def test_a_masked_batch_norm_has_the_moments_that_flax_would_update_with(kind):
    x = 3 * _images() + np.float32([5, -2])
    if kind == 'linen':
        teacher = _teacher(Calls(lambda norm, x: norm(x, mask=_inside(x))))
    else:
        teacher = from_nnx(_nnx_model(MaskedNnx, positional=kind == 'positional'), **PICTURES)
    (moments,) = jax.jit(teacher.tap)(teacher.variables, x)[1].values()
    norm, blank = nn.BatchNorm(use_running_average=False, momentum=0), {'mean': np.zeros(2), 'var': np.ones(2)}
    variables = {'params': {'scale': np.ones(2), 'bias': np.zeros(2)}, 'batch_stats': blank}
    _, updated = jax.jit(lambda v, x: norm.apply(v, x, mask=_inside(x), mutable='batch_stats'))(variables, x)
    for moment, name in zip(moments, ('mean', 'var'), strict=True):
        np.testing.assert_allclose(moment, updated['batch_stats'][name], rtol=1e-4)


def test_masked_moments_of_a_split_batch_are_those_of_the_whole():
    """Also where the devices' shares of the mask are unlike."""
    teacher = _teacher(Calls(lambda norm, x: norm(x, mask=x[..., :1] > 0)))
    x = _images(4) + np.float32([[-1], [0], [0], [1]])[:, :, None, None]
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
    (whole,) = jax.jit(teacher.tap)(teacher.variables, x)[1].values()
    split = jax.shard_map(lambda v, x: teacher.tap(v, x, 'data')[1], mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
    for moment, expected in zip(*jax.jit(split)(teacher.variables, x).values(), whole, strict=True):
        np.testing.assert_allclose(moment, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('norm', 'call'),
    [
        (OwnNorm, lambda norm, x: norm(x, jnp.ones(x.shape[:3]))),
        (OwnNorm, lambda norm, x: norm(weights=jnp.ones(x.shape[:3]), x=x)),
    ],
)
def test_an_array_that_a_norm_is_called_with_is_named(norm, call):
    with pytest.raises(DvinvError, match=r'An? OwnNorm, .* is called with the array weights, .* only x and mask'):
        _teacher(Calls(call, norm))


@pytest.mark.parametrize(
    ('norm', 'call'),
    [
        (Weighted, lambda norm, x: norm(x, jnp.ones(3), True, name='b')),
        (OwnNorm, lambda norm, x: norm(x, None, False)),
        (OwnNorm, lambda norm, x: norm(x, jnp.ones(2))),
        (OwnNorm, lambda norm, x: norm(x, x.mean((1, 2)))),
        (OwnNorm, lambda norm, x: norm(x, weights=x.mean((1, 2), keepdims=True))),
        (nn.BatchNorm, lambda norm, x: norm(x, None)),
    ],
)
def test_flags_and_what_a_subclass_keeps_to_itself_are_no_arguments(norm, call):
    assert _teacher(Calls(call, norm)).num_classes == 3


# Where running statistics are kept


class Named(nn.Module):
    """A normalization with statistics under other names, or in another collection."""

    collection: str = 'batch_stats'
    names: tuple = ('running_mean', 'running_var')
    shape: tuple = ()

    @nn.compact
    def __call__(self, x):
        mean, var = (
            self.variable(self.collection, name, fill, (*self.shape, x.shape[-1])).value
            for name, fill in zip(self.names, (jnp.zeros, jnp.ones), strict=True)
        )
        return (x - mean) / jnp.sqrt(var)


class TwoNorms(nn.Module):
    """One with Flax's statistics, and `second`."""

    second: Any

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(self.second(nn.Dense(4)(x)).mean((1, 2)))


@pytest.mark.parametrize(
    'second',
    [
        Named(),
        Named(names=('moving_mean', 'moving_variance')),
        Named(names=('mean_ema', 'var_ema')),
        Named('constants', ('mean', 'var')),
        Named('params', ('running_mean', 'running_var')),
    ],
    ids=str,
)
def test_running_statistics_are_found_under_other_names_and_in_other_collections(second, capsys):
    module = TwoNorms(second)
    teacher = _teacher(module, jax.tree.map(np.abs, trained_variables(module)))
    assert teacher.tap.layers == ('BatchNorm_0', 'second') == tuple(teacher.statistics(teacher.variables))
    _, moments = jax.eval_shape(teacher.tap, teacher.variables, _images())
    assert [moment.shape for moment in moments['second']] == [(4,), (4,)]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ('second', 'left_out'),
    [
        (Named(names=('running_mean', 'running_std')), 'batch_stats/second/running_mean'),
        (Named('constants', shape=(1, 1, 1)), 'constants/second/running_mean, constants/second/running_var'),
    ],
    ids=str,
)
def test_what_may_be_statistics_and_is_left_out_is_named(second, left_out, capsys):
    module = TwoNorms(second)
    teacher = _teacher(module, jax.tree.map(np.abs, trained_variables(module)))
    assert teacher.tap.layers == ('BatchNorm_0',)
    assert f'dvinv: TwoNorms has {left_out}, named as running statistics' in capsys.readouterr().err


class Pixels(nn.Module):
    """A network that normalises its pixels by constants of its own."""

    names: tuple = ('mean', 'var')

    @nn.compact
    def __call__(self, x):
        mean, var = (self.variable('constants', name, jnp.ones, x.shape[-1:]).value for name in self.names)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)((255 * x - mean) / var).mean((1, 2)))


@pytest.mark.parametrize('names', [('mean', 'var'), ('mean', 'std')])
def test_constants_that_normalise_pixels_are_no_running_statistics(names, capsys):
    assert _teacher(Pixels(names)).tap.layers == ('BatchNorm_0',)
    assert not capsys.readouterr().err


class NamedNnx(nnx.Module):
    """A normalization with statistics under other names, as variables of any type or plain arrays."""

    def __init__(self, kind):
        self.running_mean, self.running_var = kind(jnp.zeros(2)), kind(jnp.ones(2))

    def __call__(self, x):
        return (x - self.running_mean[...]) / jnp.sqrt(self.running_var[...])


class TwoNormsNnx(nnx.Module):
    def __init__(self, rngs, kind):
        self.first, self.second, self.head = nnx.BatchNorm(2, rngs=rngs), NamedNnx(kind), nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(self.first(x)).mean((1, 2)))


@pytest.mark.parametrize('kind', [nnx.BatchStat, nnx.Variable, nnx.data])
def test_running_statistics_of_nnx_are_found_under_other_names_and_types(kind):
    teacher = from_nnx(TwoNormsNnx(nnx.Rngs(0), kind), **PICTURES)
    assert list(teacher.tap.layers) == list(teacher.statistics(teacher.variables)) == ['first', 'second']


class Auxiliary(nn.Module):
    """A network with layers that training alone calls."""

    jitted: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = nn.BatchNorm(use_running_average=not train, name='always')
        x = nn.jit(lambda norm, x: norm(x))(norm, x) if self.jitted else norm(x)
        if train or self.is_initializing():
            nn.BatchNorm(use_running_average=not train, name='adversarial')(x)
        return nn.Dense(3)(x.mean((1, 2)))


class AuxiliaryNnx(nnx.Module):
    def __init__(self, rngs):
        self.always, self.adversarial = nnx.BatchNorm(2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.always(x).mean((1, 2)))


@pytest.mark.parametrize('kind', ['plain', 'jitted', 'nnx'])
def test_layers_that_training_alone_calls_are_left_out_and_named(kind, capsys):
    teacher = from_nnx(AuxiliaryNnx(nnx.Rngs(0)), **PICTURES) if kind == 'nnx' else _teacher(Auxiliary(kind == 'jitted'))
    assert teacher.tap.layers == ('always',)
    name = 'AuxiliaryNnx' if kind == 'nnx' else 'Auxiliary'
    assert f'dvinv: {name} does not use adversarial in eval mode' in capsys.readouterr().err


# Weights


def _changed(path, change, module=None):
    """Variables of a TinyNet, one of them changed."""
    flat = flatten(trained_variables(module or TinyNet()))
    return unflatten({**flat, path: change(np.array(flat[path]))})


@pytest.mark.parametrize(
    ('path', 'change', 'problem'),
    [
        ('params/Conv_0/kernel', lambda a: a * np.nan, 'NaN'),
        ('params/Conv_0/kernel', lambda a: a.astype(jnp.bfloat16) * np.nan, 'NaN'),
        ('params/Dense_0/bias', lambda a: a + np.inf, 'infinite'),
        ('batch_stats/BatchNorm_1/mean', lambda a: a - np.inf, 'infinite'),
        ('batch_stats/BatchNorm_1/var', lambda a: a + np.inf, 'infinite'),
        ('batch_stats/BatchNorm_1/var', lambda a: -a, 'negative variances'),
    ],
)
def test_numbers_that_no_trained_network_has_are_refused_by_their_name(path, change, problem):
    with pytest.raises(DvinvError, match=f'The weights of TinyNet .*: {path} has {problem}'):
        _teacher(TinyNet(), _changed(path, change))


def test_numbers_of_an_nnx_model_are_refused_by_their_name():
    model = AuxiliaryNnx(nnx.Rngs(0))
    model.always.var[...] = jnp.array([1, -1.0])
    with pytest.raises(DvinvError, match=r'AuxiliaryNnx .*: batch_stats/always/var has negative variances'):
        from_nnx(model, **PICTURES)


@pytest.mark.parametrize('path', ['batch_stats/a/moving_variance', 'stats/running_var', 'others/norm/runningVar'])
def test_a_negative_variance_is_refused_whatever_its_name(path):
    with pytest.raises(DvinvError, match=f'{path} has negative variances'):
        check_finite(unflatten({path: np.float32([1, -1])}), 'it')
    check_finite({'others': {'log_var': np.float32([-1])}, 'params': {'var': np.float32([-1])}}, 'it')


@pytest.mark.slow
def test_a_class_that_is_masked_is_no_label():
    with pytest.raises(DvinvError, match=r'infinite before the first update.* -inf, as of a masked class'):
        invert(_teacher(Ending(_masked)), [0, 1], ONE, 0)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda v: v['params'], r'variables of TinyNet have BatchNorm_0, .*must be \{.params.*params alone'),
        (lambda v: jax.tree.map(np.ndarray.tolist, v), 'params/BatchNorm_0/bias of TinyNet is a list'),
    ],
)
def test_what_are_no_variables_is_refused(change, sentence):
    with pytest.raises(DvinvError, match=sentence):
        _teacher(TinyNet(), change(trained_variables(TinyNet())))


def test_variables_may_be_a_state_of_nnx():
    assert _teacher(TinyNet(), nnx.State(trained_variables(TinyNet()))).digest() == tiny_teacher().digest()


def test_a_constant_may_mask_classes():
    check_finite({'constants': {'mask': np.float32([0, -np.inf])}, 'params': {'count': np.int32([-1])}}, 'it')
    with pytest.raises(DvinvError, match=r'of it .*: constants/mask has NaN'):
        check_finite({'constants': {'mask': np.float32([0, np.nan])}}, 'it')


@pytest.mark.parametrize('dtype', [np.int8, np.int32, np.uint8, jnp.int4])
def test_quantized_parameters_are_refused_by_their_name(dtype):
    with pytest.raises(DvinvError, match=r'integer parameters.*: params/Conv_0/kernel \(u?int.*dequantized'):
        _teacher(TinyNet(), _changed('params/Conv_0/kernel', lambda a: (9 * a).astype(dtype)))


def test_weights_that_the_caller_changes_or_donates_are_the_callers_alone():
    variables = trained_variables(TinyNet())
    donated = jax.tree.map(jnp.array, variables)
    teachers = _teacher(TinyNet(), variables), _teacher(TinyNet(), donated)
    digest = teachers[0].digest()
    jax.tree.map(lambda leaf: leaf.fill(7), variables)
    jax.tree.map(lambda leaf: leaf.delete(), donated)
    assert [teacher.digest() for teacher in teachers] == [digest, digest]


class Boxed(nn.Module):
    """A network with parameters in boxes that name mesh axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, scale_init=nn.with_partitioning(nn.initializers.ones, ('model',)))(x)
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        return nn.Dense(3, kernel_init=kernel_init)(x.mean((1, 2)))


def test_parameters_are_taken_out_of_flaxs_boxes():
    variables = Boxed().init(jax.random.key(0), _images())
    teacher = _teacher(Boxed(), variables)
    plain = _teacher(Boxed(), nn.meta.unbox(variables))
    assert (teacher.digest(), teacher.parameters) == (plain.digest(), 2 + 2 + 6 + 3)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(teacher.variables))
    with jax.set_mesh(jax.make_mesh((1,), ('other',), axis_types=(AxisType.Auto,))):
        assert _teacher(Boxed(), variables).digest() == teacher.digest()


def test_sharded_weights_are_gathered_also_under_the_mesh_of_the_caller():
    mesh = jax.make_mesh((2,), ('model',), axis_types=(AxisType.Explicit,))
    variables = trained_variables(TinyNet())
    sharded = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P('model') if leaf.shape[0] % 2 == 0 else P())), variables
    )
    with jax.set_mesh(mesh):
        teacher = _teacher(TinyNet(), sharded)
        assert invert(teacher, [0, 1], ONE, 3).images.shape == (2, *IMAGE_SHAPE)
    assert teacher.digest() == tiny_teacher().digest()


def test_a_bridged_linen_module_is_refused_with_the_way_out():
    model = nnx.eval_shape(lambda: nnx.bridge.ToNNX(TinyNet(), rngs=nnx.Rngs(0)).lazy_init(_images()))
    with pytest.raises(DvinvError, match=r'The model is the Linen module TinyNet in nnx.bridge.ToNNX.*dvinv.from_linen'):
        from_nnx(model, **PICTURES)


def test_a_bridged_nnx_model_is_refused_with_the_way_out():
    with pytest.raises(DvinvError, match=r'an NNX model in a ToLinen.*dvinv.from_nnx'):
        from_linen(nnx.bridge.to_linen(AuxiliaryNnx), {}, **PICTURES)


# Mean, deviation, image shape


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'mean': (123.675, 116.28)}, r'mean is \(123.675, 116.28\), but pixels are in \[0, 1\].*: \(0.485, 0.456\)'),
        ({'mean': (103.9, 116.8), 'std': 1}, r': \(0.407451, 0.458039\), and std as well: \(0.003922, 0.003922\)'),
        ({'std': (58.395, 57.12)}, r'std is \(58.395, 57.12\), .*: \(0.229, 0.224\)'),
        ({'mean': np.float32([np.nan, 0])}, r'mean is \(nan, 0.0\); every number of it must be finite'),
        ({'std': (np.inf, 1)}, r'std is \(inf, 1.0\); every number'),
        ({'std': -0.3}, r'std is \(-0.3, -0.3\); every standard deviation must be above 0'),
        ({'mean': None}, r'mean must be given, one number per channel, for pixels in \[0, 1\]'),
        ({'mean': None, 'std': None}, 'mean and std must be given'),
        ({'image_shape': 8}, r'image_shape is 8; it must be \(height, width, channels\)'),
        ({'image_shape': (0, 8, 2)}, r'image_shape is \(0, 8, 2\)'),
    ],
)
def test_pictures_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(DvinvError, match=sentence):
        _teacher(TinyNet(), **options)


@pytest.mark.parametrize(
    ('mean', 'std'), [(0, 1 / 255), (0.485, 1 / 255), (np.float32(0.5), 0.5), ((0, 0), (1, 1)), (jnp.array([0.4, 0.6]), 0.2)]
)
def test_a_scalar_mean_or_deviation_is_of_every_channel_and_raw_pixels_are_legitimate(mean, std):
    teacher = _teacher(TinyNet(), mean=mean, std=std)
    assert len(teacher.mean) == len(teacher.std) == 2
    assert hash(teacher.mean + teacher.std)


# Names of variables


class Reparameterized(nn.Module):
    """A network with slashes in names of its modules, parameters and statistics."""

    wrapper: Any

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name='a/norm')(nn.Conv(4, (3, 3), name='50%/b')(x)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        options = {'update_stats': train} if self.wrapper is nn.SpectralNorm else {}
        return self.wrapper(nn.Dense(3))(x.mean((1, 2)), **options)


@pytest.mark.parametrize('wrapper', [nn.WeightNorm, nn.SpectralNorm])
def test_slashes_in_names_survive_files_and_pruning(wrapper, tmp_path):
    module = Reparameterized(wrapper)
    variables = trained_variables(module)
    jax.tree.map(np.testing.assert_array_equal, unflatten(flatten(variables)), variables)
    assert all(path.count('/') < 5 for path in flatten(variables))
    save_network(tmp_path / 'it.safetensors', variables, {'network': 'it'})
    read, _ = load_network(tmp_path / 'it.safetensors')
    jax.tree.map(np.testing.assert_array_equal, read, variables)
    channels = find_channels(module, IMAGE_SHAPE)
    alive = np.arange(channels.count) % 2 > 0
    narrow, small = PrunedModule(module, channels.kept(alive)), channels.sliced(alive, variables)
    teacher = _teacher(narrow, small)
    assert teacher.tap.layers == ('a%2Fnorm', 'BatchNorm_0')
    assert set(map(np.shape, flatten(small).values())) - set(map(np.shape, flatten(variables).values()))


# Settings of JAX, keys


def test_no_rank_is_promoted_implicitly_in_the_pixel_step_and_the_train_step():
    teacher = tiny_teacher(channels=(4,))
    stage = Stage(1, 0.1, augmentation='crop', jitter=1, flip=True, noise=0.1)
    recipe = TrainingSettings(
        updates=2, batch_size=4, learning_rate=0.1, shift=1, flip=True, noise=0.1, resized_crop=0.5, mixup=0.2
    )
    job = TrainJob(recipe, supervised(0.1), Rounds(4))
    with jax.numpy_rank_promotion('raise'):
        for parameterization in ('pixels', 'fourier'):
            step = make_step(teacher, InversionConfig((stage,), parameterization=parameterization), stage)
            state = InversionState(_images(), stage.make_optimizer().init(_images()), np.int32(0), jax.random.key(0))
            jax.eval_shape(step, state, np.zeros(3, np.int32), teacher.variables, None)
        train_step = make_train_step(TinyNet(channels=(4,)), job, teacher, make_mesh(1))
        batch = np.zeros((4, *IMAGE_SHAPE), np.uint8), np.zeros(4, np.int32)
        jax.eval_shape(train_step, initial_state(recipe, teacher.variables), *batch, None, jax.random.key(0))


@pytest.mark.parametrize('parameterization', ['pixels', 'fourier'])
def test_images_are_float32_also_where_jax_may_compute_in_float64(parameterization):
    teacher = tiny_teacher(channels=(4,))
    augmentation = Augmentation(shift=1, flip=True, noise=0.1, resized_crop=0.5, color_jitter=0.1, cutmix=0.5, mixup=0.2)

    def shown(key):
        blank, key = initial_parameters(key, 2, IMAGE_SHAPE)
        return augmentation(key, make_decode(parameterization, 0.6, teacher)(blank), teacher)

    with jax.enable_x64(True):
        assert jax.eval_shape(shown, jax.random.key(0)).dtype == np.float32


def test_a_user_may_forbid_promotions():
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        assert invert(_teacher(Ending()), [0, 1], ONE, 0).images.shape == (2, *IMAGE_SHAPE)


def test_the_same_inversion_is_compiled_once_and_an_integer_is_a_key():
    """Also for other weights in the same teacher, which are an argument; another config is another inversion."""
    teacher, compiled = tiny_teacher(), []
    other = dataclasses.replace(teacher, variables=jax.tree.map(lambda leaf: 1.1 * leaf, teacher.variables))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
    )
    try:
        first = invert(teacher, [0, 1], ONE, jax.random.key(3))
        assert compiled
        compiled.clear()
        keys = 3, np.int64(3), jax.random.PRNGKey(3)
        again = [invert(teacher, [0, 1], ONE, key).images for key in keys]
        changed = invert(other, [0, 1], ONE, 3)
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()
    assert all(np.array_equal(images, first.images) for images in again)
    assert not np.array_equal(changed.images, first.images)
    weights = weakref.ref(other.variables['params']['Dense_0']['kernel'])
    del other
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize('config', ['cifar10', 5, Stage(1, 0.1)], ids=range(3))
def test_what_is_no_config_is_refused(config):
    with pytest.raises(DvinvError, match=r'it must be a dvinv.InversionConfig, or the name of a preset'):
        invert(tiny_teacher(), [0, 1], config, 0)


NO_KEYS = None, 1.5, True, [1, 2], 2**64, jax.ShapeDtypeStruct((3,), np.float32), np.zeros(3, np.uint32)


@pytest.mark.parametrize('key', NO_KEYS, ids=str)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(DvinvError, match=r'key is .*; it must be one random key, .* or an integer'):
        invert(tiny_teacher(), [0, 1], ONE, key)
