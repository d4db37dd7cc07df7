"""Stages: found in the programs of many networks, recorded, replaced, and matched between two networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import IMAGE_SHAPE, MEAN, STD, tiny_teacher, trained_variables

from dvinv import DvinvError, from_linen, from_nnx
from dvinv.graph.stages import (
    Stage,
    find_stages,
    graft,
    initial_projections,
    match_stages,
    record,
    relative_error,
    to_student,
    to_teacher,
)
from dvinv.inversion.linen_modules import features_in_training
from dvinv.networks import create, shapes_of
from dvinv.networks.registry import NETWORKS, image_shape

RNGS = {'dropout': jax.random.key(0)}
X = np.random.default_rng(0).normal(size=(4, *IMAGE_SHAPE)).astype(np.float32)
RESOLUTIONS = [(8, 8), (4, 4)]

HALVED = {32: [32, 16, 8], 224: [112, 56, 28, 14, 7]}
EXPECTED = {
    'cifar_vgg': [32, 16, 8],
    **{name: [32, 16, 8, 4] for name in ('cifar_resnet18', 'cifar_resnet34')},
    **{name: [32, 16, 8, 4, 2] for name in ('vgg11_bn', 'vgg16_bn')},
    # And no [B, C, 7, 7], which their dense layers take.
    **{name: [224, 112, 56, 28, 14] for name in ('imagenet_vgg11_bn', 'imagenet_vgg16_bn')},
    'inception_v3': [149, 147, 73, 71, 35, 17, 8],
    'squeezenet1_1': [111, 55, 27, 13],
    **{name: [8, 4] for name in ('small_resnet', 'small_convnet')},  # what is merely pooled to 2x2 is no stage
    'convnext_tiny': [56, 28, 14, 7],
    'small_vit': [4],  # its tokens stay in the places of an image; with a token of their own, after the patches they do not
    'cifar_vit': [8],
    'deit_tiny': [14],
}


def _in_eval_mode(module):
    return lambda variables, x: module.apply(variables, x, train=False)


def _in_train_mode(module):
    return functools.partial(features_in_training, module)


def _images(name):
    return jax.ShapeDtypeStruct((2, *image_shape(name)), jnp.float32)


@pytest.mark.parametrize('name', sorted(NETWORKS.keys() - {'vit_b_16', 'deit_small', 'resnet50_gn'}))  # of others' build
def test_every_network_has_the_stages_of_its_family(name):
    module = create(name, 10, 0.125)
    stages = find_stages(_in_eval_mode(module), shapes_of(module, image_shape(name)), _images(name))
    sides = EXPECTED.get(name, HALVED.get(image_shape(name)[0]))
    assert [stage.resolution for stage in stages] == [(side, side) for side in sides]


@pytest.mark.parametrize('name', ['resnet20', 'wrn16_1', 'vgg11_bn', 'mobilenet_v2', 'small_convnet'])
def test_a_network_has_the_same_stages_in_train_mode(name):
    module = create(name, 10, 0.125)
    variables = shapes_of(module, image_shape(name))
    stages = find_stages(_in_eval_mode(module), variables, _images(name))
    in_training = find_stages(_in_train_mode(module), variables, _images(name), RNGS)
    assert [(stage.shape, stage.operation) for stage in in_training] == [(stage.shape, stage.operation) for stage in stages]


# An own network, in pieces


class Piece(nn.Module):
    """A convolution, BatchNorm and ReLU, twice, with a shortcut; the first convolution has the stride."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.channels, (3, 3), self.stride)(x)))
        y = norm()(nn.Conv(self.channels, (3, 3))(y))
        return nn.relu(y + nn.Conv(self.channels, (1, 1), self.stride)(x))


class Own(nn.Module):
    """Two pieces, the second with half the resolution, the mean, a dense layer. `way` is how the pieces are called."""

    way: str = 'plain'

    @nn.compact
    def __call__(self, x, train: bool = False):
        calls = {'plain': Piece, 'jit': nn.jit(Piece, static_argnums=2), 'remat': nn.remat(Piece, static_argnums=(2,))}
        piece = calls.get(self.way, Piece)
        x = piece(4, name='first')(x, train)
        if self.way == 'loop':
            x, _ = jax.lax.scan(lambda carry, _: (jnp.tanh(carry), None), x, length=2)
        x = piece(6, 2, name='second')(x, train)
        return nn.Dense(3, name='head')(x.mean((1, 2)))


VARIABLES = trained_variables(Own())


def _piece(name, x, train=False):
    """What a piece of `Own` computes, with its part of `VARIABLES`."""
    variables = {group: VARIABLES[group][name] for group in VARIABLES}
    module = Piece(4) if name == 'first' else Piece(6, 2)
    return module.apply(variables, x, train, mutable=['batch_stats'])[0]


def _head(x):
    return nn.Dense(3).apply({'params': VARIABLES['params']['head']}, x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize('way', ['plain', 'jit', 'remat', 'loop'])
@pytest.mark.parametrize('train', [False, True])
def test_recorded_outputs_are_those_of_the_pieces(way, train):
    module, rngs = Own(way), (RNGS,) if train else ()
    fn = _in_train_mode(module) if train else _in_eval_mode(module)
    outputs, (first, second) = jax.jit(record(fn, RESOLUTIONS))(VARIABLES, X, *rngs)
    wanted = _piece('first', X, train)
    if way == 'loop':
        wanted = jnp.tanh(jnp.tanh(wanted))
    np.testing.assert_allclose(first, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, _piece('second', wanted, train), rtol=1e-4, atol=1e-5)
    for got, plain in zip(*map(jax.tree.leaves, (outputs, fn(VARIABLES, X, *rngs))), strict=True):
        np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('way', ['plain', 'jit', 'remat'])
def test_grafting_runs_each_piece_from_the_output_that_takes_the_place_of_the_one_before(way):
    rng = np.random.default_rng(1)
    values = [rng.normal(size=(4, 8, 8, 4)).astype(np.float32), rng.normal(size=(4, 4, 4, 6)).astype(np.float32)]
    fn = graft(_in_eval_mode(Own(way)), RESOLUTIONS, lambda index, output: values[index])
    logits, (first, second) = jax.jit(fn)(VARIABLES, X)
    np.testing.assert_allclose(first, _piece('first', X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, _piece('second', values[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, _head(values[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['plain', 'remat'])
def test_gradients_are_those_of_the_plain_network(way):
    """Also where a ReLU is given exactly 0: jax.nn.relu defines its derivative there as 0."""
    plain = _in_train_mode(Own(way))
    same = graft(plain, RESOLUTIONS, lambda index, output: output)
    x = np.concatenate([X, np.zeros_like(X)])

    def loss(fn, variables):
        outputs = fn(variables, x, RNGS)
        logits = outputs[0][0] if fn is same else outputs[0]
        return jnp.square(logits).sum()

    got, wanted = (jax.jit(jax.grad(functools.partial(loss, fn)))(VARIABLES) for fn in (same, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)


def test_what_is_recomputed_for_the_gradient_still_is():
    fn = graft(_in_eval_mode(Own('remat')), RESOLUTIONS, lambda index, output: output)
    assert str(jax.make_jaxpr(fn)(VARIABLES, X)).count('remat') == str(jax.make_jaxpr(fn.__wrapped__)(VARIABLES, X)).count(
        'remat'
    )


def test_a_replaced_value_stops_the_gradient():
    fn = graft(_in_eval_mode(Own()), RESOLUTIONS[:1], lambda index, output: jax.lax.stop_gradient(output))
    gradient = jax.grad(lambda variables: fn(variables, X)[0].sum())(VARIABLES)['params']
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient['first']))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient['head']))


def test_the_derivative_of_relu_at_zero_is_kept():
    class Zero(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(1, (1, 1), use_bias=False, kernel_init=nn.initializers.zeros)(x))
            return nn.Conv(2, (2, 2), 2, kernel_init=nn.initializers.ones)(x).mean((1, 2))

    module = Zero()
    variables = module.init(jax.random.key(0), X)
    fn = record(module.apply, [(8, 8)])
    gradient = jax.grad(lambda variables: fn(variables, X)[0].sum())(variables)
    assert not gradient['params']['Conv_0']['kernel'].any()


def test_running_statistics_are_those_of_the_replaced_values():
    values = [2 * np.ones((4, 8, 8, 4), np.float32), np.ones((4, 4, 4, 6), np.float32)]
    fn = graft(_in_train_mode(Own()), RESOLUTIONS, lambda index, output: values[index])
    (_, _, statistics), _ = jax.jit(fn)(VARIABLES, X, RNGS)
    second = {group: VARIABLES[group]['second'] for group in VARIABLES}
    _, wanted = Piece(6, 2).apply(second, values[0], True, mutable=['batch_stats'])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), statistics['second'], wanted['batch_stats']
    )


def test_a_function_that_returns_a_stage_and_uses_it_is_cut_inside():
    def kernel(side, inputs, outputs):
        return np.random.default_rng(side).normal(size=(side, side, inputs, outputs)).astype(np.float32)

    def convolve(x, kernel, stride):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    @jax.jit
    def inner(x):
        full = convolve(x, kernel(3, 2, 4), 1)
        return convolve(full, kernel(2, 4, 5), 2), full

    def network(variables, x):
        half, full = inner(x)
        return half.mean((1, 2)), full

    (logits, full), (recorded, _) = graft(network, RESOLUTIONS, lambda index, output: 0 * output)({}, X)
    np.testing.assert_allclose(recorded, inner(X)[1], rtol=1e-5)
    assert not logits.any()
    assert not full.any()


# Teachers, matching


class Model(nnx.Module):
    """Two convolutions of 8x8 and 4x4 pixels with BatchNorm."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.Conv(4, 5, (3, 3), 2, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(channels, rngs=rngs) for channels in (4, 5)])
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


@pytest.mark.slow
def test_stages_of_an_nnx_teacher_and_a_linen_student_are_matched():
    model = Model(nnx.Rngs(0))
    teacher = from_nnx(model, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    stages = find_stages(teacher.apply_fn, teacher.variables, X)
    assert [stage.shape for stage in stages] == [(8, 8, 4), (4, 4, 5)]
    _, (first, _) = record(teacher.apply_fn, RESOLUTIONS)(teacher.variables, X)
    model.eval()
    np.testing.assert_allclose(first, nnx.relu(model.norms[0](model.convs[0](X))), rtol=1e-5, atol=1e-6)
    pairs = match_stages(stages, find_stages(_in_train_mode(Own()), VARIABLES, X, RNGS), IMAGE_SHAPE)
    assert [(pair.teacher.channels, pair.student.channels, pair.projected) for pair in pairs] == [
        (4, 4, False),
        (5, 6, True),
    ]


def _stages(*sides):
    return tuple(Stage((side, side), 8, 'relu', (0,), (0,)) for side in sides)


def test_a_resolution_that_only_one_network_has_is_left_out():
    pairs = match_stages(_stages(112, 56, 28, 14, 7), _stages(224, 56, 28, 27, 7), (224, 224, 3))
    assert [pair.student.resolution[0] for pair in pairs] == [56, 28, 7]


def test_networks_without_a_common_resolution_are_refused():
    with pytest.raises(DvinvError, match=r'32x32 pixels .* teacher have 32x32, 16x16 .* student 15x15, none in common'):
        match_stages(_stages(32, 16), _stages(15), (32, 32, 3))


@pytest.mark.slow
def test_a_student_follows_the_stages_of_an_unrelated_teacher():
    """Each image enters a stage of the student as its own output or as that of the teacher, by a coin."""
    teacher = from_nnx(Model(nnx.Rngs(0)), image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    student, coins = _in_train_mode(Own()), jax.random.bernoulli(jax.random.key(1), shape=(2, 4, 1, 1, 1))
    pairs = match_stages(
        find_stages(teacher.apply_fn, teacher.variables, X), find_stages(student, VARIABLES, X, RNGS), IMAGE_SHAPE
    )
    _, outputs = record(teacher.apply_fn, RESOLUTIONS)(teacher.variables, X)

    def loss(params, projections):
        def replace(index, output):
            return jnp.where(coins[index], to_student(projections, pairs[index], outputs[index]), output)

        variables = {**VARIABLES, 'params': params}
        _, recorded = graft(student, RESOLUTIONS, replace)(variables, X, RNGS)
        projected = [to_teacher(projections, pair, output) for pair, output in zip(pairs, recorded, strict=True)]
        return sum(map(relative_error, projected, outputs))

    trained = VARIABLES['params'], initial_projections(jax.random.key(0), pairs)
    step = jax.jit(jax.value_and_grad(lambda trained: loss(*trained)))
    first, _ = step(trained)
    for _ in range(60):
        last, gradient = step(trained)
        trained = jax.tree.map(lambda leaf, slope: leaf - 0.03 * slope, trained, gradient)
    assert last < first / 2


# What cannot be cut


class Dense(nn.Module):
    """A network without a value of more than one pixel."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x.reshape(len(x), -1))))


class Hidden(nn.Module):
    """A network that computes everything inside a function with a derivative of its own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.normal(), (3, 3, 2, 3))

        @jax.custom_vjp
        def whole(x, kernel):
            return nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)).mean((1, 2))

        whole.defvjp(lambda x, kernel: (whole(x, kernel), None), lambda _, gradient: (X, kernel))
        return whole(x, kernel)


NHWC = ('NHWC', 'HWIO', 'NHWC')


def test_a_network_without_stages_is_refused():
    variables = Dense().init(jax.random.key(0), X)
    with pytest.raises(DvinvError, match=r"^Dense has no stage .* no value .*; set distillation.hints='none'"):
        find_stages(Dense().apply, variables, X, name='Dense')


def test_the_operation_that_hides_the_stages_is_named():
    variables = Hidden().init(jax.random.key(0), X)
    with pytest.raises(DvinvError, match='no stage to compare: the operation whole in Hidden hides'):
        find_stages(Hidden().apply, variables, X)


def test_images_are_no_stage():
    teacher = tiny_teacher()

    def normalised(variables, x):
        return teacher.apply_fn(variables, (jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) - 0.5)[:, 1:9, 1:9])

    assert [stage.channels for stage in find_stages(normalised, teacher.variables, X)] == [5]


def test_a_resolution_that_the_network_does_not_have_is_refused():
    with pytest.raises(DvinvError, match='no stage of 5x5 pixels; it has 8x8, 4x4'):
        record(_in_eval_mode(Own()), [(5, 5)])(VARIABLES, X)


def test_a_replacement_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r'stage 0 has the shape \(4, 8, 8, 4\), its replacement \(4, 8, 8\)'):
        graft(_in_eval_mode(Own()), RESOLUTIONS, lambda index, output: output[..., index])(VARIABLES, X)


def test_no_resolutions_leave_the_function_as_it_is():
    teacher = from_linen(Own(), VARIABLES, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    logits, recorded = record(teacher.apply_fn, [])(VARIABLES, X)
    np.testing.assert_array_equal(logits, teacher.apply_fn(VARIABLES, X))
    assert recorded == []
