"""Flax NNX models as teachers: their moments by definition, all else as of a Linen twin, and the model left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, tiny_teacher, trained

from dvinv import DvinvError, InversionConfig, Stage, Weights, from_linen, from_nnx, invert
from dvinv.evaluation import flops, logits_of
from dvinv.runtime.devices import make_mesh

PICTURES = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}


class Twin(nnx.Module):
    """`tiny.TinyNet` in NNX, with a dropout that only training feels."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs) for a, b in ((2, 4), (4, 5))])
        self.norms = nnx.List([nnx.BatchNorm(c, momentum=0.9, rngs=rngs) for c in (4, 5)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


class ForeignNorm(nnx.Module):
    """Somebody's own normalisation, with running statistics where Flax keeps them."""

    def __init__(self, features, rngs):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-3)


class ChannelsFirst(nnx.BatchNorm):
    """A subclass that hands something else on to BatchNorm's own call, where the tap hears it."""

    def __call__(self, x):
        return jnp.moveaxis(super().__call__(jnp.moveaxis(x, 1, -1)), -1, 1)


class Overridden(nnx.BatchNorm):
    """A subclass whose call is all its own."""

    def __call__(self, x):
        return ForeignNorm.__call__(self, x)


class Block(nnx.Module):
    """A linear layer and a normalisation of its output, which is kept as the intermediate 'seen'."""

    def __init__(self, rngs, norm=nnx.BatchNorm, axis=-1, keyword=False, calls=1, dtype=None):
        self.linear = nnx.Linear(2, 2, dtype=dtype, rngs=rngs)
        self.norm = norm(2, rngs=rngs, **({'axis': axis} if norm is nnx.BatchNorm else {}))
        self.axis, self.keyword, self.calls = axis, keyword, calls

    def __call__(self, x):
        for _ in range(self.calls):
            x = jnp.moveaxis(self.linear(x), -1, self.axis)
            self.sow(nnx.Intermediate, 'seen', x)
            x = nnx.relu(jnp.moveaxis(self.norm(x=x) if self.keyword else self.norm(x), self.axis, -1))
        return x


class Net(nnx.Module):
    """`Block`s in the named arrangement; logits of two classes."""

    def __init__(self, rngs, arrangement='plain', **block):
        self.first, self.head, self.arrangement = Block(rngs), nnx.Linear(2, 2, rngs=rngs), arrangement
        stacked = arrangement in ('scan', 'vmap', 'loop')
        self.blocks = nnx.vmap(lambda rngs: Block(rngs, **block))(rngs.split(3)) if stacked else Block(rngs, **block)

    def __call__(self, x):
        stacked = nnx.StateAxes({(nnx.Param, nnx.BatchStat, nnx.Intermediate): 0})
        call = {
            'plain': Block.__call__,
            'remat': nnx.remat(Block.__call__),
            'jit': nnx.jit(Block.__call__),
            'scan': nnx.scan(lambda block, x: block(x), in_axes=(stacked, nnx.Carry), out_axes=nnx.Carry),
            'vmap': lambda blocks, x: nnx.vmap(Block.__call__, in_axes=(0, None))(blocks, x).mean(0),
            'loop': lambda blocks, x: jax.tree.map(lambda a: a[0], blocks)(x),
        }[self.arrangement]
        return self.head(call(self.blocks, self.first(x)).mean((1, 2)))


def _model(make, leaves=None, **fields):
    """A trained model, in training mode as NNX makes it, without compiling its initialisation."""
    graph, noise, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **fields)), nnx.RngState, ...)
    noise = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), noise)
    state = nnx.from_flat_state(leaves) if leaves else nnx.State(trained(nnx.to_pure_dict(state)))
    return nnx.merge(graph, noise, jax.tree.map(jnp.asarray, state))


def _teacher(model, **options):
    return from_nnx(model, **{**PICTURES, **options})


def _images(batch=4):
    return np.random.default_rng(0).normal(size=(batch, *IMAGE_SHAPE)).astype(np.float32)


# Moments


def _definition(inputs, axis, stacked):
    """(mean, biased variance) of each channel in float64, of a stack of layers if `stacked`; the mean over calls."""
    x = np.moveaxis(np.asarray(inputs, np.float64), axis + (axis > 0), -1)  # the first axis counts the calls
    x = x.reshape(len(x), *x.shape[1 : 1 + stacked], -1, x.shape[-1])
    return x.mean(-2).mean(0), x.var(-2).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arrangement', 'block'),
    [
        ('plain', {'keyword': True}),
        ('plain', {'norm': ForeignNorm}),
        ('plain', {'norm': ChannelsFirst, 'axis': 1}),
        ('plain', {'norm': Overridden}),
        ('plain', {'axis': 1}),
        ('plain', {'calls': 2}),
        ('plain', {'dtype': jnp.bfloat16}),
        ('remat', {}),
        ('jit', {}),
        ('jit', {'calls': 2}),
        ('scan', {}),
        ('scan', {'calls': 2}),
        ('vmap', {}),
    ],
    ids=str,
)
def test_moments_are_those_of_the_input_and_features_the_input_itself(arrangement, block):
    model = _model(Net, arrangement=arrangement, **block)
    teacher = _teacher(model)
    model.eval()
    graph, state = nnx.split(model)

    @jax.jit
    def run(variables, state, x):
        plain = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x)
        return teacher.tap(variables, x), teacher.features(variables, x), plain

    (logits, moments), (same_logits, features), (plain_logits, kept) = run(teacher.variables, state, _images())
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-5)
    np.testing.assert_allclose(same_logits, plain_logits, rtol=1e-5)
    assert teacher.tap.layers == ('first/norm', 'blocks/norm')
    tolerance = 2e-3 if 'dtype' in block else 1e-5  # XLA may leave out a rounding to bfloat16 (2^-9) before the moments
    for name in ('first', 'blocks'):
        mean, variance = moments[f'{name}/norm']
        inner = name == 'blocks'
        seen = nnx.to_pure_dict(kept)[name]['seen']
        exact = _definition(
            seen,
            block.get('axis', -1) if inner else -1,
            inner and arrangement in ('scan', 'vmap'),
        )
        assert mean.dtype == variance.dtype == np.float32
        np.testing.assert_allclose(mean, exact[0], rtol=1e-4, atol=tolerance)
        np.testing.assert_allclose(variance, exact[1], rtol=1e-4, atol=tolerance)
        for heard, given in zip(features[f'{name}/norm'], seen, strict=True):
            if block.get('norm') is ChannelsFirst and inner:
                given = jnp.moveaxis(given, 1, -1)
            np.testing.assert_allclose(
                *(np.asarray(x, np.float32) for x in (heard, given)), rtol=5 * tolerance, atol=tolerance
            )


def test_the_first_layer_is_the_first_that_runs():
    class Backwards(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c = (nnx.BatchNorm(2, rngs=rngs) for _ in range(3))

        def __call__(self, x):
            return self.b(self.a(self.c(x))).mean((1, 2))

    assert _teacher(_model(Backwards)).tap.layers == ('c', 'a', 'b')


# The twin


@pytest.fixture(scope='module')
def twin():
    """A Teacher from a `Twin` with the weights of the fixture `teacher`."""
    names = {f'{linen}_{i}': (nnx_, i) for linen, nnx_ in (('Conv', 'convs'), ('BatchNorm', 'norms')) for i in (0, 1)}
    names['Dense_0'] = ('head',)
    leaves = {
        (*names[layer], name): value
        for group in tiny_teacher().variables.values()
        for layer, values in group.items()
        for name, value in values.items()
    }
    return _teacher(_model(Twin, leaves))


@pytest.mark.slow
def test_logits_moments_and_pixel_gradient_are_those_of_the_linen_twin(teacher, twin):
    def run(teacher):
        @jax.jit
        def loss(variables, x):
            logits, moments = teacher.tap(variables, x)
            running = teacher.statistics(variables)
            terms = [(moments[layer], running[layer]) for layer in teacher.tap.layers]
            distance = sum(jnp.square(m - r).sum() for pair in terms for m, r in zip(*pair, strict=True))
            return logits[:, 0].sum() + distance, (logits, terms)

        return jax.value_and_grad(loss, argnums=1, has_aux=True)(teacher.variables, _images())

    assert twin.tap.layers == ('norms/0', 'norms/1')
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6), run(twin), run(teacher)
    )


@pytest.mark.slow
def test_an_inversion_on_two_devices_ends_in_the_images_of_the_linen_twin_on_one(teacher, twin):
    config = InversionConfig((Stage(iterations=3, learning_rate=0.05),), Weights(feature=1.0), bn_stats='global')
    linen, ours = (
        invert(network, np.arange(8) % 3, config, jax.random.key(0), mesh=make_mesh(devices))
        for network, devices in ((teacher, 1), (twin, 2))
    )
    np.testing.assert_allclose(ours.metrics['loss'], linen.metrics['loss'], rtol=1e-5)
    # Adam divides by the size of a gradient that is rounded differently; hardly any pixel feels it.
    assert np.quantile(np.abs(ours.images - linen.images), 0.99) < 1e-4


def test_the_evaluation_takes_it_as_it_takes_the_linen_twin(teacher, twin):
    pixels = teacher.to_uint8(_images())
    np.testing.assert_allclose(logits_of(twin, pixels), logits_of(teacher, pixels), rtol=1e-5, atol=1e-6)
    assert (flops(twin), twin.parameters, twin.num_classes) == (flops(teacher), teacher.parameters, 3)


# The model and what is taken from it


def test_the_model_is_left_alone_and_the_teacher_stays_as_it_was():
    model = _model(Twin)
    before, leaves = nnx.graphdef(model), jax.tree.leaves(nnx.state(model))
    teacher = _teacher(model)
    digest = teacher.digest()
    assert nnx.graphdef(model) == before
    assert type(model.norms[0]) is nnx.BatchNorm
    assert not model.norms[0].use_running_average
    assert not model.dropout.deterministic
    assert all(old is new for old, new in zip(leaves, jax.tree.leaves(nnx.state(model)), strict=True))
    model.norms[0].mean[...] += 1  # as training goes on
    assert teacher.digest() == digest != _teacher(model).digest()


def test_weights_are_plain_arguments_and_random_streams_are_none():
    model = _model(Twin)
    teacher, other = _teacher(model), nnx.clone(model)
    other.dropout.rngs.count[...] += 7
    assert _teacher(other).digest() == teacher.digest()
    assert jax.tree.map(np.shape, teacher.variables) == {
        'params': {
            'convs': {'0': {'kernel': (3, 3, 2, 4)}, '1': {'kernel': (3, 3, 4, 5)}},
            'norms': {str(i): {'scale': (c,), 'bias': (c,)} for i, c in enumerate((4, 5))},
            'head': {'kernel': (5, 3), 'bias': (3,)},
        },
        'batch_stats': {'norms': {str(i): {'mean': (c,), 'var': (c,)} for i, c in enumerate((4, 5))}},
    }
    host = jax.device_get(teacher.variables)
    closed = jax.make_jaxpr(teacher.tap)(host, _images())
    assert sum(np.size(constant) for constant in closed.consts) == 0


def test_other_variables_are_arguments_too():
    class Scaled(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.scale = nnx.Variable(jnp.ones(2))

        def __call__(self, x):
            return self.scale * super().__call__(x)

    teacher = _teacher(_model(Scaled))
    double = {**teacher.variables, 'others': {'scale': 2 * teacher.variables['others']['scale']}}
    apply_fn = jax.jit(teacher.apply_fn)
    logits, doubled = (apply_fn(variables, _images()) for variables in (teacher.variables, double))
    np.testing.assert_allclose(doubled, 2 * logits, rtol=1e-6)


def test_what_sowing_left_in_a_model_is_not_taken():
    model = _model(Net)
    digest = _teacher(model).digest()
    model.first.seen = nnx.Intermediate((_images(),))
    assert _teacher(model).digest() == digest


class Moody(nnx.Module):
    """Learns or drops by default, whatever `eval` says."""

    def __init__(self, rngs, learns=False, drops=False):
        self.norm, self.dropout, self.moods = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), (learns, drops)

    def __call__(self, x, train: bool = True):
        learns, drops = (train and mood for mood in self.moods)
        x = nnx.jit(lambda norm, x: norm(x, use_running_average=not learns))(self.norm, x)
        return self.dropout(x, deterministic=not drops).mean((1, 2))


def test_eval_mode_is_found_from_the_signature():
    assert _teacher(_model(Moody, learns=True, drops=True)).num_classes == 2


# Refusals


class ByMethod(Net):
    """Its second normalisation is used by a method that is not __call__."""

    def __call__(self, x):
        mean = self.blocks.norm.mean[...]
        return (self.first(x) - mean).mean((1, 2))


class NoCall(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, rngs=rngs)


@pytest.mark.parametrize(
    ('make', 'fields', 'options', 'sentence'),
    [
        (NoCall, {}, {}, 'NoCall cannot be applied to images of shape 8x8x2 .* not callable'),
        (ByMethod, {}, {}, 'ByMethod keeps running statistics that the tap cannot reach: blocks/norm\\.'),
        (Net, {'arrangement': 'loop'}, {}, 'Net keeps running statistics that the tap cannot reach: blocks/norm\\.'),
        (Block, {}, {}, 'Block must return logits \\[B, K\\]; for images of shape 8x8x2 it returns'),
        (Twin, {}, {'image_shape': (8, 8, 3), 'mean': (0.5,) * 3, 'std': (0.5,) * 3}, 'applied to images of shape 8x8x3'),
        (Twin, {}, {'call_kwargs': {'tarin': 1}}, 'Twin cannot be applied to images .* with .*tarin.*TypeError'),
        (Twin, {}, {'std': (0.5, 0.0)}, 'std is \\(0.5, 0.0\\)'),
        (Moody, {'learns': True}, {'call_kwargs': {}}, 'Moody wants to update its running statistics, .* \\(now {}\\)'),
        (Moody, {'drops': True}, {'call_kwargs': {}}, 'Moody asks for random numbers \\(dropout\\?\\), .* \\(now {}\\)'),
    ],
    ids=str,
)
def test_what_cannot_be_inverted_is_refused_in_a_sentence(make, fields, options, sentence):
    with pytest.raises(DvinvError, match=sentence):
        _teacher(_model(make, **fields), **options)


def test_either_door_names_the_other():
    with pytest.raises(DvinvError, match='a TinyNet is none; a Linen module goes to dvinv\\.from_linen'):
        _teacher(TinyNet())
    with pytest.raises(DvinvError, match='a Twin is none; an NNX model goes to dvinv\\.from_nnx'):
        from_linen(_model(Twin), {}, **PICTURES)


def test_logits_are_picked_from_what_a_model_returns():
    class Both(Twin):
        def __call__(self, x, phase):
            return super().__call__(x), x

    pictures = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}
    with pytest.raises(DvinvError, match=r"It takes phase beside x; .* call_kwargs=\{'phase': \.\.\.\}"):
        from_nnx(Both(nnx.Rngs(0)), **pictures)
    with pytest.raises(DvinvError, match=r'logits=lambda out: out\[0\]'):
        from_nnx(Both(nnx.Rngs(0)), **pictures, call_kwargs={'phase': 0})
    teacher = from_nnx(Both(nnx.Rngs(0)), **pictures, call_kwargs={'phase': 0}, logits=lambda out: out[0])
    assert teacher.apply_fn(teacher.variables, np.zeros((2, *IMAGE_SHAPE), np.float32)).shape == (2, teacher.num_classes)
