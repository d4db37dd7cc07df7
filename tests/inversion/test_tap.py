"""The BatchNorm tap: moments by their definition, however the network is built, or a sentence why not."""

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, trained_variables

from dvinv import DvinvError, from_linen


class ForeignNorm(nn.Module):
    """Somebody's own normalisation, with running statistics where Flax keeps them."""

    use_running_average: bool

    @nn.compact
    def __call__(self, x):
        mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1:])
        var = self.variable('batch_stats', 'var', jnp.ones, x.shape[-1:])
        assert self.use_running_average
        return (x - mean.value) / jnp.sqrt(var.value + 1e-3)


class Doubled(nn.BatchNorm):
    """A subclass whose call goes on to BatchNorm's own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Block(nn.Module):
    """A linear layer and a normalisation of its output, which is kept as the intermediate 'seen'."""

    norm: Any = nn.BatchNorm
    dense: bool = False
    keyword: bool = False
    axis: int = -1
    calls: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _=None):
        linear = nn.Dense(3, dtype=self.dtype) if self.dense else nn.Conv(3, (3, 3), dtype=self.dtype)
        norm = self.norm(use_running_average=True, **({} if self.axis == -1 else {'axis': self.axis}))
        for _ in range(self.calls):
            x = jnp.moveaxis(linear(x), -1, self.axis)
            self.sow('intermediates', 'seen', x)
            x = nn.relu(jnp.moveaxis(norm(x=x) if self.keyword else norm(x), self.axis, -1))
        return x, None


class Net(nn.Module):
    """A stem of three channels, `Block`s in the named arrangement, and logits of two classes."""

    arrangement: str = 'plain'
    block: dict = None

    def setup(self):
        lift = {'variable_axes': {'params': 0, 'batch_stats': 0, 'intermediates': 0}, 'split_rngs': {'params': True}}
        arrange = {
            'plain': lambda block: block,
            'remat': nn.remat,
            'jit': nn.jit,
            'scan': lambda block: nn.scan(block, length=3, **lift),
            'vmap': lambda block: nn.vmap(block, in_axes=None, out_axes=0, axis_size=3, **lift),
        }[self.arrangement]
        self.first = Block()
        self.blocks = arrange(Block)(**(self.block or {}))
        self.head = nn.Dense(2)

    def __call__(self, x):
        x, _ = self.blocks(self.first(x)[0])
        return self.head((x.mean(0) if self.arrangement == 'vmap' else x).mean((1, 2)))


def _teacher(module, image_shape=IMAGE_SHAPE, **options):
    channels = image_shape[-1]
    options = {'mean': MEAN[:1] * channels, 'std': STD[:1] * channels, **options}
    return from_linen(module, trained_variables(module, image_shape), image_shape=image_shape, **options)


def _images(batch=4, image_shape=IMAGE_SHAPE):
    return np.random.default_rng(0).normal(size=(batch, *image_shape)).astype(np.float32)


def _tap(teacher, module):
    """(moments, features, {block: the inputs that its normalisation saw}), from one program."""
    order = []

    @jax.jit
    def run(variables, x):
        tapped = teacher.tap(variables, x)
        order.extend(tapped[1])  # jit sorts the keys of what it returns
        return tapped, teacher.features(variables, x), module.apply(variables, x, mutable=['intermediates'])

    (logits, moments), (same_logits, features), (plain_logits, kept) = run(teacher.variables, _images())
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-5)
    np.testing.assert_allclose(same_logits, plain_logits, rtol=1e-5)
    seen = flax.traverse_util.flatten_dict(kept['intermediates'], sep='/')
    seen = {name.removesuffix('/seen'): values for name, values in seen.items()}
    return {layer: moments[layer] for layer in order}, features, seen


def _definition(inputs, axis, stacked):
    """(mean, biased variance) of each channel in float64; the mean over calls where there are several."""

    def one(x):
        x = np.asarray(x, np.float64)
        x = np.moveaxis(x, axis, -1).reshape(*x.shape[:stacked], -1, x.shape[axis])
        return x.mean(-2), ((x - x.mean(-2, keepdims=True)) ** 2).mean(-2)

    return [np.mean(values, 0) for values in zip(*map(one, inputs), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arrangement', 'block'),
    [
        ('plain', {}),
        ('plain', {'norm': ForeignNorm}),
        ('plain', {'norm': Doubled}),
        ('plain', {'keyword': True}),
        ('plain', {'axis': 1}),
        ('plain', {'dense': True}),
        ('plain', {'calls': 2}),
        ('plain', {'norm': Doubled, 'calls': 2}),
        ('plain', {'dtype': jnp.bfloat16}),
        ('remat', {}),
        ('jit', {}),
        ('scan', {}),
        ('scan', {'calls': 2}),
        ('vmap', {}),
    ],
    ids=str,
)
def test_moments_are_those_of_the_input_and_features_the_input_itself(arrangement, block):
    module = Net(arrangement, block)
    moments, features, seen = _tap(_teacher(module), module)
    assert [layer.split('/')[0] for layer in moments] == ['first', 'blocks']
    tolerance = 2e-3 if 'dtype' in block else 1e-5  # XLA may leave out a rounding to bfloat16 (2^-9) before the moments
    for layer, (mean, variance) in moments.items():
        name = layer.split('/')[0]
        exact = _definition(
            seen[name],
            block.get('axis', -1) if name == 'blocks' else -1,
            name == 'blocks' and arrangement in ('scan', 'vmap'),
        )
        assert mean.dtype == variance.dtype == np.float32
        np.testing.assert_allclose(mean, exact[0], rtol=1e-4, atol=tolerance)
        np.testing.assert_allclose(variance, exact[1], rtol=1e-4, atol=tolerance)
        for heard, given in zip(features[layer], seen[name], strict=True):
            np.testing.assert_allclose(
                *(np.asarray(x, np.float32) for x in (heard, given)), rtol=5 * tolerance, atol=tolerance
            )


def test_the_first_layer_is_the_first_that_runs():
    class Backwards(nn.Module):
        def setup(self):
            self.a, self.b, self.c = (nn.BatchNorm(use_running_average=True) for _ in range(3))

        def __call__(self, x):
            return self.b(self.a(self.c(x))).mean((1, 2))

    teacher = _teacher(Backwards())
    _, moments = teacher.tap(teacher.variables, _images())
    assert list(moments) == ['c', 'a', 'b']


@nn.jit
class Jitted(Block):
    """A block that nn.jit traces once for all its instances."""


class Chain(nn.Module):
    """Three jitted blocks, one after the other or as the steps of a scan."""

    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        if self.scanned:
            lift = {'variable_axes': {'params': 0, 'batch_stats': 0}, 'split_rngs': {'params': True}}
            return nn.scan(Jitted, length=3, **lift)(name='block')(x, None)[0].mean((1, 2))
        for number in range(3):
            x, _ = Jitted(name=f'block{number}')(x)
        return x.mean((1, 2))


@pytest.mark.slow
@pytest.mark.parametrize('scanned', [False, True])
def test_a_trace_that_was_heard_once_is_neither_lost_nor_mistaken(scanned):
    """nn.jit keeps what it traced: the tap must hear every layer again, and each thing that it listens for."""
    module = Chain(scanned)
    for _ in range(2):
        teacher = _teacher(module)
        names = ['block'] if scanned else ['block0', 'block1', 'block2']
        assert teacher.tap.layers == tuple(f'{name}/BatchNorm_0' for name in names)
        for _ in range(2):
            _, features = teacher.features(teacher.variables, _images())
            _, moments = teacher.tap(teacher.variables, _images())
            for layer in teacher.tap.layers:
                (x,), (mean, _) = features[layer], moments[layer]
                assert x.shape == ((3,) if scanned else ()) + (4, 8, 8, 3)
                np.testing.assert_allclose(mean, x.mean((-4, -3, -2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('arrangement', ['plain', 'jit', 'scan'])
def test_the_same_module_can_be_tapped_again(arrangement):
    module = Net(arrangement)
    first, second = _teacher(module), _teacher(module)
    assert first.tap.layers == second.tap.layers == ('first/BatchNorm_0', 'blocks/BatchNorm_0')


def test_variance_is_exact_where_the_mean_is_large():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x).mean((1, 2))

    x = 1000 + 0.01 * _images(64)
    variables = {
        'params': {'BatchNorm_0': {'scale': np.ones(2, np.float32), 'bias': np.zeros(2, np.float32)}},
        'batch_stats': {'BatchNorm_0': {'mean': np.full(2, 1000.1, np.float32), 'var': np.ones(2, np.float32)}},
    }
    teacher = from_linen(Norm(), variables, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    ((mean, variance),) = teacher.tap(variables, x)[1].values()
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-3)
    cancelled = jnp.square(x).mean((0, 1, 2)) - jnp.square(x.mean((0, 1, 2)))
    assert np.all(np.abs(cancelled / exact.var((0, 1, 2)) - 1) > 0.5)


def test_moments_have_a_gradient_with_respect_to_the_pixels():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x).mean((1, 2))

    teacher, x = _teacher(Norm()), _images()

    @jax.grad
    def gradient(x):
        ((mean, variance),) = teacher.tap(teacher.variables, x)[1].values()
        return mean.sum() + variance.sum()

    n = x[..., 0].size
    exact = 1 / n + 2 * (x - x.mean((0, 1, 2))) / n
    np.testing.assert_allclose(gradient(x), exact, rtol=1e-4, atol=1e-7)


# Refusals


class Moody(nn.Module):
    """Learns by default: BatchNorm and, if asked for, dropout."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        x = nn.BatchNorm(use_running_average=True if self.dropout else deterministic)(x)
        return nn.Dropout(self.dropout, deterministic=deterministic)(x).mean((1, 2))


class Hidden(nn.Module):
    """Its running statistics are used by a method that is not __call__."""

    def setup(self):
        self.open = nn.BatchNorm(use_running_average=True)
        self.secret = ByMethod()

    def __call__(self, x):
        return self.secret.normalise(self.open(x)).mean((1, 2))


class ByMethod(nn.Module):
    @nn.compact
    def normalise(self, x):
        return (x - self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1:]).value) / jnp.sqrt(
            self.variable('batch_stats', 'var', jnp.ones, x.shape[-1:]).value
        )


class SharedByAll(nn.Module):
    """A scan whose steps share one set of running statistics."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_broadcast=('params', 'batch_stats'), split_rngs={'params': False}, length=2)
        return scan()(Block()(x)[0], None)[0].mean((1, 2))


@pytest.mark.parametrize(
    ('module', 'options', 'sentence'),
    [
        (Hidden(), {}, 'Hidden keeps running statistics that the tap cannot reach: secret\\.'),
        (SharedByAll(), {}, 'SharedByAll keeps running statistics that the tap cannot reach: .*ScanBlock_0/BatchNorm_0'),
        (Moody(), {'call_kwargs': {}}, 'Moody wants to update its running statistics, .* call_kwargs, .* \\(now {}\\)'),
        (Moody(0.5), {'call_kwargs': {}}, 'Moody asks for random numbers \\(dropout\\?\\), .* \\(now {}\\)'),
        (
            TinyNet(),
            {'call_kwargs': {'tarin': 1}},
            'TinyNet cannot be applied to images of shape 8x8x2 with .*tarin.*TypeError',
        ),
        (Block(), {}, 'Block must return logits \\[B, K\\]; for images of shape 8x8x2 it returns'),
        (TinyNet(), {'mean': (0.5,)}, 'image_shape is \\(8, 8, 2\\) with 1 means'),
        (TinyNet(), {'std': (0.5, 0.0)}, 'std is \\(0.5, 0.0\\)'),
    ],
)
def test_what_cannot_be_inverted_is_refused_in_a_sentence(module, options, sentence):
    with pytest.raises(DvinvError, match=sentence):
        _teacher(module, **options)


def test_images_of_another_shape_are_refused_in_a_sentence():
    with pytest.raises(DvinvError, match='TinyNet cannot be applied to images of shape 8x8x3'):
        from_linen(TinyNet(), trained_variables(TinyNet()), image_shape=(8, 8, 3), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize('module', [Moody(), Moody(0.5), TinyNet()], ids=str)
def test_eval_mode_is_found_from_the_signature(module):
    assert _teacher(module).num_classes in (2, 3)


class Switched(TinyNet):
    """A network with an argument of eval mode that has no usual name, and answers in a tuple or a dict."""

    answer: str = ''

    @nn.compact
    def __call__(self, x, learns: bool = True, *, is_train: bool = True):
        z = TinyNet(self.num_classes, name='inner')(x, train=learns and is_train)
        return {'': z, 'tuple': (x, z), 'dict': {'features': x, 'logits': z}}[self.answer]


class Phased(nn.Module):
    """A network that must be told its mode."""

    @nn.compact
    def __call__(self, x, phase, depth=2):
        return TinyNet()(x, train=phase == 'train')


SWITCHED = trained_variables(Switched())
PICTURES = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}


def _without(variables, *path):
    """The variables without one of their dicts."""
    first, *rest = path
    return {
        k: (_without(v, *rest) if rest else None) if k == first else v for k, v in variables.items() if rest or k != first
    }


@pytest.mark.parametrize(
    ('module', 'variables', 'options', 'sentence'),
    [
        (Switched(), SWITCHED, {'call_kwargs': {}}, r"call_kwargs, for instance \{'learns': False, 'is_train': False\}"),
        (Phased(), SWITCHED, {}, r"It takes phase beside x; give the value of eval mode: call_kwargs=\{'phase': \.\.\.\}\."),
        (Switched(), _without(SWITCHED, 'batch_stats'), {}, 'incomplete: .* batch_stats/inner/BatchNorm_0/mean, '),
        (
            Switched(),
            _without(SWITCHED, 'batch_stats', 'inner', 'BatchNorm_1'),
            {},
            'incomplete: they do not have batch_stats/inner/BatchNorm_1/mean, batch_stats/inner/BatchNorm_1/var. Pass all',
        ),
        (Switched(), _without(SWITCHED, 'params', 'inner', 'Dense_0'), {}, 'do not have params/inner/Dense_0/bias, '),
        (
            Switched(answer='tuple'),
            SWITCHED,
            {},
            r'which of these are the logits: logits=lambda out: out\[1\], for instance',
        ),
        (Switched(answer='dict'), SWITCHED, {}, r"logits: logits=lambda out: out\['logits'\], for instance"),
        (Switched(answer='dict'), SWITCHED, {'logits': lambda out: out['z']}, 'cannot be applied .* KeyError'),
    ],
    ids=range(8),
)
def test_what_is_missing_is_named(module, variables, options, sentence):
    with pytest.raises(DvinvError, match=sentence):
        from_linen(module, variables, **PICTURES, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('answer', 'logits'),
    [('', None), ('tuple', lambda out: out[1]), ('dict', lambda out: out['logits'])],
    ids=('', 'tuple', 'dict'),
)
def test_logits_are_picked_from_what_a_network_returns(answer, logits):
    module = Switched(answer=answer)
    teacher = from_linen(module, SWITCHED, **PICTURES, call_kwargs={'learns': False, 'is_train': False}, logits=logits)
    x = np.random.default_rng(0).normal(size=(3, *IMAGE_SHAPE)).astype(np.float32)
    expected = TinyNet().apply({name: tree['inner'] for name, tree in SWITCHED.items()}, x)
    for answers in (teacher.apply_fn(SWITCHED, x), teacher.tap(SWITCHED, x)[0], teacher.features(SWITCHED, x)[0]):
        np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-5)
