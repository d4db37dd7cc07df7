"""Programs run again: with operations replaced, wherever they hide, and in stretches that are computed twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dvinv.graph.rewriting import recomputed, rewritten
from dvinv.runtime.devices import AXIS, make_mesh

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
    seen = []

    def rule(params):
        seen.append((params['dimension_numbers'], [aval.shape for aval in params['avals']]))

    np.testing.assert_array_equal(rewritten(jnp.dot, {'dot_general': rule})(X, X.T), X @ X.T)
    assert seen == [((((1,), (0,)), ((), ())), [(2, 3), (3, 2)])]


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


# Stretches


def _deep(weights, x):
    for weight in weights:
        x = nn.relu(jnp.sin(x @ weight) * x)
    return {'x': x, 'sum': x.sum()}


WEIGHTS = np.random.default_rng(0).normal(size=(8, 3, 3)).astype(np.float32)


def _kept(fn) -> int:
    """Numbers that are kept for the gradient."""
    _, pull = jax.eval_shape(lambda x: jax.vjp(lambda x: fn(WEIGHTS, x)['sum'], x), X)
    return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape == X.shape)


@pytest.mark.parametrize('stretches', [1, 3, 1000])
def test_stretches_give_the_same_values_and_gradients(stretches):
    run = recomputed(_deep, stretches)
    for got, wanted in zip(*(jax.tree.leaves(fn(WEIGHTS, X)) for fn in (run, _deep)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    gradients = [jax.grad(lambda w, x, fn=fn: fn(w, x)['sum'], (0, 1))(WEIGHTS, X) for fn in (run, _deep)]
    for got, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_few_stretches_keep_less():
    assert _kept(recomputed(_deep, 3)) < _kept(_deep) / 2
