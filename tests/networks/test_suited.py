"""Networks in the CPU backend's favourite form compute the same, with the same gradients."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_teacher

from dvinv.evaluation import logits_of
from dvinv.networks import suited
from dvinv.networks.suited import depthwise, suited_to

CHANNELS = 4


def _convolution(stride, padding, groups):
    return functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _arrays(size, groups, height, width=7):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, height, width, CHANNELS), (size, size, CHANNELS // groups, CHANNELS))
    ]


def _suited_program(fn, *arrays) -> str:
    return str(jax.make_jaxpr(suited_to('cpu', fn))(*arrays))


@pytest.mark.slow
@pytest.mark.parametrize('groups', [1, CHANNELS])
@pytest.mark.parametrize('padding', ['SAME', 'VALID', ((1, 1), (0, 2))])
@pytest.mark.parametrize(('size', 'stride'), [(1, 1), (1, 2), (2, 2), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize('height', [6, 7])
def test_values_and_gradients_are_those_of_xla(size, stride, padding, groups, height):
    _compare(_convolution(stride, padding, groups), *_arrays(size, groups, height))


@pytest.mark.parametrize('chunk_bytes', [0, 40_000])  # a chunk is one image, or two of the four
@pytest.mark.parametrize(('size', 'stride', 'padding'), [(3, 1, 'SAME'), (3, 2, ((0, 2), (1, 0))), (5, 3, 'VALID')])
def test_the_gradient_of_a_kernel_is_summed_over_chunks_of_images(monkeypatch, chunk_bytes, size, stride, padding):
    monkeypatch.setattr(suited, 'CHUNKED_BYTES', 0)
    monkeypatch.setattr(suited, 'CHUNK_BYTES', chunk_bytes)
    fn, (x, kernel) = _convolution(stride, padding, 1), _arrays(size, 1, 9)
    x, wave = np.concatenate([x, x[::-1] + 1]), lambda fn: lambda *arrays: jnp.sin(fn(*arrays)).sum()
    for trained in (False, True):
        gradient = jax.grad(wave(suited_to('cpu', fn, trained)), (0, 1))
        assert ('scan' in str(jax.make_jaxpr(gradient)(x, kernel))) == trained
        for got, wanted in zip(gradient(x, kernel), jax.grad(wave(fn), (0, 1))(x, kernel), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_few_images_keep_the_gradient_of_xla():
    fn, (x, kernel) = _convolution(1, 'SAME', 1), _arrays(3, 1, 32, 32)
    many = np.zeros((4096, 32, 32, CHANNELS), np.float32)
    gradient = jax.grad(lambda k, x: suited_to('cpu', fn, trained=True)(x, k).sum())
    assert ['scan' in str(jax.make_jaxpr(gradient)(kernel, images)) for images in (x, many)] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize('padding', ['SAME', ((2, 1), (1, 2))])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('height', 'width'), [(1, 1), (2, 2), (7, 1), (2, 7)])
def test_images_smaller_than_the_kernel(stride, padding, height, width):
    fn, arrays = _convolution(stride, padding, 1), _arrays(3, 1, height, width)
    assert 'conv_general_dilated' not in _suited_program(fn, *arrays)
    _compare(fn, *arrays)


@pytest.mark.slow
@pytest.mark.parametrize('padding', ['SAME', 'VALID', ((1, 1), (1, 1))])
@pytest.mark.parametrize(('size', 'stride'), [(2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize('height', [6, 7])
def test_max_pooling(size, stride, padding, height):
    fn = functools.partial(nn.max_pool, window_shape=(size, size), strides=(stride, stride), padding=padding)
    x, _ = _arrays(1, 1, height)
    assert 'reduce_window_max' not in _suited_program(fn, x)
    _compare(fn, x)
    _compare(fn, np.maximum(np.round(x), 0))  # with equal ones: the gradient is the first's
    x[1, 2, 2, 1] = np.nan
    np.testing.assert_array_equal(suited_to('cpu', fn)(x), fn(x))


@pytest.mark.parametrize(
    'fn',
    [
        lambda x: nn.max_pool(x.astype(int), (2, 2)),
        lambda x: nn.max_pool(x, (2, 2, 2)),  # over channels too
        lambda x: jax.lax.reduce_window_max_p.bind(  # over pixels two apart
            x,
            window_dimensions=(1, 2, 2, 1),
            window_strides=(1, 1, 1, 1),
            padding=((0, 0),) * 4,
            base_dilation=(1, 1, 1, 1),
            window_dilation=(1, 2, 2, 1),
        ),
    ],
)
def test_other_maxima_are_left_alone(fn):
    x, _ = _arrays(1, 1, 6)
    assert 'reduce_window_max' in _suited_program(fn, x)


def _compare(fn, *arrays):
    """Values, and gradients with respect to all the arrays, with and without the rules."""
    weights = np.random.default_rng(1).normal(size=jax.eval_shape(fn, *arrays).shape)

    def both(fn):
        loss = jax.value_and_grad(lambda *arrays: (fn(*arrays) * weights).sum(), range(len(arrays)))
        return jax.tree.leaves(jax.jit(lambda *arrays: (fn(*arrays), loss(*arrays)))(*arrays))

    for got, wanted in zip(both(suited_to('cpu', fn)), both(fn), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('dtype', [None, np.float32])
@pytest.mark.parametrize(('size', 'groups'), [(3, CHANNELS), (1, 1)])
def test_sums_and_result_are_of_the_asked_dtype(size, groups, dtype):
    fn = functools.partial(_convolution(1, 'SAME' if size > 1 else 'VALID', groups), preferred_element_type=dtype)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in _arrays(size, groups, 6)]
    got, wanted = suited_to('cpu', fn)(*arrays), fn(*arrays)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got.astype(float), wanted.astype(float), atol=1e-5 if dtype else 0.1)


@pytest.mark.parametrize(('size', 'groups'), [(3, CHANNELS), (1, 1)])
def test_slow_ones_are_replaced_on_cpu_alone(size, groups):
    fn, arrays = _convolution(2, 'VALID', groups), _arrays(size, groups, 7)
    assert 'conv_general_dilated' not in _suited_program(fn, *arrays)
    assert suited_to('gpu', fn) is fn


@pytest.mark.parametrize(
    'fn',
    [
        _convolution(1, 'SAME', 1),  # the fast path already
        _convolution(1, 'SAME', 2),  # groups, but not one a channel
        functools.partial(_convolution(1, 'SAME', CHANNELS), rhs_dilation=(2, 2)),
        functools.partial(_convolution(1, 'VALID', CHANNELS), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
        functools.partial(_convolution(1, 'SAME', CHANNELS), padding=((-1, 1), (1, 1))),
    ],
)
def test_others_are_left_alone(fn):
    arrays = _arrays(3, fn.keywords['feature_group_count'], 7)
    assert _suited_program(fn, *arrays).count('conv_general_dilated') == 1


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, jitted by a user or not."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(CHANNELS, (3, 3), feature_group_count=CHANNELS)(x)
        return nn.Conv(6, (1, 1))(nn.relu6(x))


def _linen(jitted):
    module = (nn.jit(Separable) if jitted else Separable)()
    variables = module.init(jax.random.key(0), np.zeros((1, 7, 7, CHANNELS)))
    return lambda x: module.apply(variables, x)


def _nnx():
    depthwise = nnx.Conv(CHANNELS, CHANNELS, (3, 3), feature_group_count=CHANNELS, rngs=nnx.Rngs(0))
    return nnx.jit(lambda x: depthwise(x))


@pytest.mark.slow
@pytest.mark.parametrize('make', [lambda: _linen(False), lambda: _linen(True), _nnx], ids=['linen', 'nn.jit', 'nnx'])
def test_networks_of_users_are_reached_unmodified(make):
    fn, (x, _) = make(), _arrays(3, 1, 7)
    assert 'conv_general_dilated' not in _suited_program(fn, x)
    np.testing.assert_allclose(suited_to('cpu', fn)(x), fn(x), rtol=1e-5, atol=1e-6)


def test_scores_are_taken_in_that_form(monkeypatch):
    parameters = []
    monkeypatch.setattr(suited, '_convolution', lambda trained, params: parameters.append(params))
    network = tiny_teacher()
    logits_of(network, np.zeros((2, *network.image_shape), np.uint8))
    assert len(parameters) == 2


def test_pixels_of_a_stride_are_interleaved_in_order():
    # A 1x1 depthwise kernel hands each gradient to the very pixel that it came from.
    x = np.zeros((1, 5, 4, 2), np.float32)
    kernel = np.ones((1, 1, 1, 2), np.float32)
    _, pull = jax.vjp(lambda x: depthwise(x, kernel, (2, 3), ((0, 0), (0, 0))), x)
    gradient = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 2, 2)
    expected = np.zeros_like(x)
    for i, j in itertools.product(range(3), range(2)):
        expected[0, 2 * i, 3 * j] = gradient[0, i, j]
    np.testing.assert_array_equal(pull(gradient)[0], expected)
