"""Programs: which functions every analysis follows, and evaluation with operations replaced or in recomputed segments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import closed_call_p
from jax.sharding import PartitionSpec as P

from dvinv.evaluation import flops
from dvinv.graph.program import recomputed, rewritten
from dvinv.graph.stages import record
from dvinv.networks import Classifier, apply_fn_of
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.pruned import PrunedModule
from dvinv.networks.quantized_layers import find_layers
from dvinv.networks.suited import suited_to
from dvinv.runtime.devices import AXIS, make_mesh
from dvinv.runtime.errors import DvinvError

X = np.linspace(0.2, 1.0, 6, dtype=np.float32).reshape(2, 3)


def _plain(x):
    return jnp.sin(x)


def _scanned(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(carry), None), x, length=2)[0]


@jax.custom_jvp
def _own_derivative(x):
    return jnp.sin(x)


_own_derivative.defjvp(lambda x, dx: (jnp.sin(x[0]), 7.0 * dx[0]))

WAYS = {
    'plain': _plain,
    'jit': jax.jit(_plain),
    'jit in jit': jax.jit(lambda x: jax.jit(_plain)(x) + 1),
    'checkpoint': jax.checkpoint(_plain),
}


def _twice(params):
    return lambda x: 2 * x


@pytest.mark.parametrize('way', WAYS)
def test_an_operation_is_replaced_wherever_it_hides(way):
    fn = WAYS[way]
    run = rewritten(lambda x: {'a': fn(x), 'b': [x]}, {'sin': _twice})
    result = jax.jit(run)(X)
    np.testing.assert_allclose(result['a'], fn(X) - np.sin(X) + 2 * X, rtol=1e-6)
    np.testing.assert_array_equal(result['b'][0], X)
    np.testing.assert_allclose(jax.grad(lambda x: run(x)['a'].sum())(X), np.full_like(X, 2), rtol=1e-6)


@pytest.mark.parametrize('fn', [_scanned, _own_derivative])
def test_what_cannot_be_looked_into_runs_as_it_is(fn):
    run = rewritten(fn, {'sin': _twice})
    np.testing.assert_array_equal(run(X), fn(X))
    for got, wanted in zip(*(jax.jvp(f, (X,), (np.ones_like(X),)) for f in (run, fn)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_rule_sees_parameters_and_shapes_and_may_decline():
    operations = []

    def rule(params):
        operations.append((params['dimension_numbers'], [aval.shape for aval in params['avals']]))

    np.testing.assert_array_equal(rewritten(jnp.dot, {'dot_general': rule})(X, X.T), X @ X.T)
    assert operations == [((((1,), (0,)), ((), ())), [(2, 3), (3, 2)])]


@pytest.mark.parametrize('rewrite', [lambda fn: rewritten(fn, {'sin': lambda params: None}), lambda fn: recomputed(fn, 2)])
def test_sums_over_a_mesh_are_kept(rewrite):
    def moments(x):
        return jax.lax.pmean(jnp.sin(x).mean(0), AXIS)

    def loss(fn):
        return jax.shard_map(
            jax.value_and_grad(lambda x: fn(x).sum()), mesh=make_mesh(2), in_specs=P(AXIS), out_specs=(P(), P(AXIS))
        )

    for got, wanted in zip(loss(rewrite(moments))(X), loss(moments)(X), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


# Calls: the same are followed by every analysis


def _closed_call(fn):
    def run(*args):
        closed = jax.make_jaxpr(fn)(*args)
        (result,) = closed_call_p.bind(*args, **closed_call_p.get_bind_params({'call_jaxpr': closed}))
        return result

    return run


def _custom_jvp(fn):
    run = jax.custom_jvp(fn)
    run.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return run


def _custom_vjp(fn):
    run = jax.custom_vjp(fn)
    run.defvjp(lambda *args: jax.vjp(fn, *args), lambda pull, gradient: pull(gradient))
    return run


CALLS = {
    'plain': lambda fn: fn,
    'jit': jax.jit,
    'checkpoint': jax.checkpoint,
    'closed_call': _closed_call,
    'jit in checkpoint': lambda fn: jax.checkpoint(jax.jit(fn)),
    'custom_jvp': _custom_jvp,
    'custom_vjp': _custom_vjp,
}
CUSTOM = ('custom_jvp', 'custom_vjp')


class Halved(nn.Module):
    """A 1x1 convolution with stride 2 and tanh, in a function that is called in one of the ways in `CALLS`."""

    call: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (1, 1, x.shape[-1], 6))

        def halved(kernel, x):
            return jnp.tanh(
                jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
            )

        return CALLS[self.call](halved)(kernel, x)


class Called(nn.Module):
    """A convolution, `Halved`, and a dense layer."""

    call: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Halved(self.call, name='second')(nn.relu(nn.Conv(4, (3, 3), name='first')(x)))
        return nn.Dense(3, name='head')(x.mean((1, 2)))


IMAGES = np.random.default_rng(3).normal(size=(4, 8, 8, 2)).astype(np.float32)
VARIABLES = jax.jit(Called('plain').init)(jax.random.key(0), IMAGES)


@pytest.mark.parametrize('call', CALLS)
def test_flops_of_all_calls_count(call):
    network = Classifier(apply_fn_of(Called(call)), VARIABLES, (8, 8, 2), 3, (0, 0), (1, 1))
    assert flops(network) == 2 * (64 * 9 * 2 * 4 + 16 * 4 * 6 + 6 * 3)


@pytest.mark.parametrize('call', CALLS)
def test_stages_are_found_across_all_calls(call):
    outputs = [record(apply_fn_of(Called(name)), [(8, 8), (4, 4)])(VARIABLES, IMAGES) for name in (call, 'plain')]
    for got, wanted in zip(*map(jax.tree.leaves, outputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('call', CALLS)
def test_forms_for_cpus_and_segments_keep_values_and_gradients_of_all_calls(call):
    fn, plain = apply_fn_of(Called(call)), apply_fn_of(Called('plain'))
    for run in (suited_to('cpu', fn), recomputed(fn, 3)):
        results = (jax.value_and_grad(lambda variables, f=f: f(variables, IMAGES).sum())(VARIABLES) for f in (run, plain))
        for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    program = str(jax.make_jaxpr(suited_to('cpu', fn))(VARIABLES, IMAGES))
    # The 1x1 convolution becomes a matrix product, but not inside a custom derivative, which stays as it is.
    assert program.count('= conv_general_dilated[') == (2 if call in CUSTOM else 1)


@pytest.mark.parametrize('call', CALLS)
def test_channels_are_followed_through_all_calls_but_custom_derivatives(call):
    module = Called(call)
    if call in CUSTOM:  # the derivative of the function is that for all channels
        with pytest.raises(DvinvError, match=f'{call}_call in Called/second'):
            find_channels(module, (8, 8, 2))
        return
    channels = find_channels(module, (8, 8, 2))
    assert {layer: len(groups) for layer, groups in channels.layers.items()} == {'first': 4, 'second': 6}
    keep = np.arange(channels.count) % 3 > 0
    pruned = PrunedModule(module, channels.kept(keep)).apply(channels.sliced(keep, VARIABLES), IMAGES)
    np.testing.assert_allclose(pruned, module.apply(channels.masked(keep, VARIABLES), IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('call', CALLS)
def test_layers_to_quantize_are_found_in_all_calls_and_refused_in_custom_derivatives(call):
    network = apply_fn_of(Called(call)), VARIABLES, (8, 8, 2)
    if call in CUSTOM:
        with pytest.raises(DvinvError, match=f'the operation {call}_call with weights that cannot be quantized'):
            find_layers(*network)
    else:
        layers = find_layers(*network)
        assert layers == find_layers(apply_fn_of(Called('plain')), VARIABLES, (8, 8, 2))
        assert [(layer.name, layer.feeds) for layer in layers] == [('first', 1), ('second', None), ('head', None)]


@pytest.mark.parametrize('call', CALLS)
def test_an_activation_between_two_layers_is_followed_in_all_calls(call):
    def apply(variables, x):
        x = nn.Dense(4).apply({'params': variables['first']}, x)
        return nn.Dense(3).apply({'params': variables['second']}, CALLS[call](lambda x: jnp.maximum(x, 0))(x)).mean((1, 2))

    shapes = {
        name: {'kernel': jax.ShapeDtypeStruct(shape, np.float32), 'bias': jax.ShapeDtypeStruct(shape[1:], np.float32)}
        for name, shape in (('first', (2, 4)), ('second', (4, 3)))
    }
    layers = find_layers(apply, shapes, (8, 8, 2))
    assert [(layer.name, layer.bias, layer.feeds) for layer in layers] == [
        ('first', 'first/bias', 1),
        ('second', 'second/bias', None),
    ]


# Segments


def _deep(weights, x):
    for weight in weights:
        x = nn.relu(jnp.sin(x @ weight) * x)
    return {'x': x, 'sum': x.sum()}


WEIGHTS = np.random.default_rng(0).normal(size=(8, 3, 3)).astype(np.float32)


def _kept(fn) -> int:
    """Numbers that are kept for the gradient."""
    _, pull = jax.eval_shape(lambda x: jax.vjp(lambda x: fn(WEIGHTS, x)['sum'], x), X)
    return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape == X.shape)


@pytest.mark.slow
@pytest.mark.parametrize('segments', [1, 3, 1000])
def test_segments_give_the_same_values_and_gradients(segments):
    run = recomputed(_deep, segments)
    for got, wanted in zip(*(jax.tree.leaves(fn(WEIGHTS, X)) for fn in (run, _deep)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    gradients = [jax.grad(lambda w, x, fn=fn: fn(w, x)['sum'], (0, 1))(WEIGHTS, X) for fn in (run, _deep)]
    for got, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_few_segments_keep_less():
    assert _kept(recomputed(_deep, 3)) < _kept(_deep) / 2
