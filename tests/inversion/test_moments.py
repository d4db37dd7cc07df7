"""Networks without BatchNorm: what is captured, recorded, kept in a file and matched."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from smoke import flip, synthesis_config
from tiny import IMAGE_SHAPE, MEAN, STD, saved, tiny_teacher, trained_variables

import dvinv
from dvinv.config import parse
from dvinv.inversion import attention_of
from dvinv.inversion.augmentation import Augmentation, centred, color_shift_each
from dvinv.inversion.losses import patch_similarity_entropy, pixel_moments
from dvinv.inversion.recording import default_places
from dvinv.inversion.step import make_objective, view
from dvinv.networks import create, shapes_of
from dvinv.networks.vision_transformer import VisionTransformer
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime.errors import DvinvError
from dvinv.synthesis import task
from dvinv.teacher.task import record_to_file

QUICKLY = {'xla_backend_optimization_level': 0}  # what runs once is not worth optimising
PICTURES = {'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}
IMAGES = np.random.default_rng(0).integers(0, 256, (11, *IMAGE_SHAPE), dtype=np.uint8)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        x = x + nn.Dense(x.shape[-1])(nn.LayerNorm()(x))
        return x, mask


class Loop(nn.Module):
    """Blocks in a scan, which carries the parameters and nothing else; or one after the other."""

    scan: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if self.scan:
            x, _ = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)()(x, None)
        else:
            for _ in range(2):
                x, _ = Block()(x, np.ones((1, 8, 8, 1)))
        return nn.Dense(3)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.dense = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.dense(self.norm(x))


class Twin(nnx.Module):
    """The same for NNX."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((1, 2)))


@functools.cache
def loop(scan: bool = False):
    return dvinv.from_linen(Loop(scan), trained_variables(Loop(scan)), **PICTURES)


@functools.cache
def twin():
    return dvinv.from_nnx(Twin(nnx.Rngs(0)), **PICTURES)


@functools.cache
def recorded():
    return dvinv.record_moments(loop(), IMAGES)


# What is captured and recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    ('teacher', 'places', 'stacked'),
    [
        (loop, ('Block_0/LayerNorm_0', 'Block_0:output', 'Block_1/LayerNorm_0', 'Block_1:output'), 0),
        (functools.partial(loop, True), ('ScanBlock_0/LayerNorm_0',), 1),
        (twin, ('blocks/0/norm', 'blocks/0:output', 'blocks/1/norm', 'blocks/1:output'), 0),
    ],
    ids=['linen', 'scan', 'nnx'],
)
def test_moments_are_those_of_inputs_and_outputs_over_all_images_and_positions(teacher, places, stacked):
    bare = teacher()
    moments = dvinv.record_moments(bare, IMAGES, batch_size=6)
    assert tuple(moments.layers) == places
    own = bare.with_moments(moments)

    def run(variables, x):
        parts = x[:10].reshape(2, 5, 8, 8, 2)
        split = jax.vmap(lambda part: own.tap(variables, part, 'devices')[1], axis_name='devices')(parts)
        return own.features(variables, x)[1], own.tap(variables, x[:10])[1], split

    features, whole, split = jax.jit(run, compiler_options=QUICKLY)(own.variables, bare.normalise(IMAGES))
    assert own.tap.layers == places
    for place, (mean, variance) in moments.layers.items():
        (values,) = (np.asarray(call, np.float64) for call in features[place])
        axes = tuple(range(stacked, values.ndim - 1))
        np.testing.assert_allclose(mean, values.mean(axes), atol=1e-5)
        np.testing.assert_allclose(variance, values.var(axes), rtol=1e-4, atol=1e-6)
    # One batch over two devices has the moments of the whole.
    for place, pair in whole.items():
        for joint, value in zip(split[place], pair, strict=True):
            np.testing.assert_allclose(joint[1], value, rtol=2e-4, atol=1e-5)


def test_what_is_captured_comes_with_logits_and_moments_in_one_pass():
    teacher = loop().with_moments(recorded())
    places = teacher.tap.find(teacher.variables, ('Dense:output', 'Block_*1:output'))
    assert [place.removesuffix(':output') for place in places] == [
        *('Dense_0', 'Block_0/Dense_0', 'Block_1/Dense_0', 'Block_1', 'Dense_1')
    ]
    run = jax.jit(lambda v, x: (teacher.tap(v, x, capture=places), teacher.features(v, x)), compiler_options=QUICKLY)
    (logits, moments, captured), (_, features) = run(teacher.variables, teacher.normalise(IMAGES))
    assert tuple(moments) == tuple(recorded().layers)
    np.testing.assert_allclose(captured['Dense_1:output'][0], logits, rtol=1e-5)
    np.testing.assert_allclose(captured['Block_1:output'][0], features['Block_1:output'][0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'count', 'some'),
    [
        ('small_vit', 13, ('blocks_0/norm1', 'blocks_3:output', 'norm')),
        ('resnet20_gn', 28, ('bn1', 'layer1_0:output', 'layer2_0:output', 'layer3_2/bn2')),  # with a projection, too
        ('resnet20', 19, ('bn1', 'layer3_2/bn2')),
    ],
)
def test_what_is_recorded_by_itself(name, count, some):
    module, shape = create(name, 10, 0.25), (32, 32, 3) if name != 'small_vit' else (8, 8, 3)
    teacher = dvinv.from_linen(module, shapes_of(module, shape), image_shape=shape, mean=0.5, std=0.5)
    places = default_places(teacher)
    assert len(places) == count
    assert {*some} <= {*places}


class Bare(nn.Module):
    """Layers with weights alone."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(2, (3, 3))(nn.Conv(2, (3, 3))(x))).mean((1, 2)))


def test_of_a_network_without_normalisations_and_blocks_all_outputs_are_recorded():
    teacher = dvinv.from_linen(Bare(), trained_variables(Bare()), **PICTURES)
    assert default_places(teacher) == ('Conv_1:output', 'Conv_0:output')  # as they are called


def test_views_are_those_of_the_augmentation():
    plain, shifted = (dvinv.record_moments(loop(), IMAGES, augmentation=look) for look in (None, Augmentation(shift=2)))
    assert (plain.views, shifted.views) == (0, 10)
    assert not np.allclose(plain.layers['Block_0:output'][0], shifted.layers['Block_0:output'][0], atol=1e-3)


# What is done with them


def test_moments_take_the_place_of_running_statistics():
    teacher = tiny_teacher()
    own = teacher.with_moments(dvinv.record_moments(teacher, IMAGES))
    assert own.tap.layers == teacher.tap.layers
    assert own.digest() != teacher.digest() == own.without_moments().digest()
    assert dvinv.feature_loss(own, IMAGES, dvinv.InversionConfig((dvinv.Stage(1, 0.1),))) < 1e-3
    assert dvinv.feature_loss(teacher, IMAGES, dvinv.InversionConfig((dvinv.Stage(1, 0.1),))) > 1


def test_a_file_holds_the_moments_and_what_they_are_of(tmp_path):
    path = tmp_path / 'moments.safetensors'
    recorded().save(path)
    read = dvinv.Moments.load(path)
    assert (read.digest, read.images, read.views, read.version) == (loop().digest(), len(IMAGES), 0, dvinv.__version__)
    assert tuple(read.layers) == tuple(recorded().layers)
    assert path.stat().st_size < 4000  # no image
    own = dvinv.from_linen(Loop(), loop().variables, **PICTURES, moments=str(path))
    assert own.digest() == loop().with_moments(recorded()).digest()


# Without any statistics


def test_the_entropy_of_similarities_is_that_of_their_density():
    """Against the integral over a fine grid, and low where all patches are equally alike."""
    rng = np.random.default_rng(0)
    same = rng.normal(size=(1, 1, 6)) + 0.1 * rng.normal(size=(2, 12, 6))
    parts = np.concatenate([rng.normal(size=(2, 1, 6)).repeat(6, 1), rng.normal(size=(2, 1, 6)).repeat(6, 1)], 1)
    parts = parts + 0.1 * rng.normal(size=parts.shape)
    expected = []
    for tokens in parts:
        units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        values = (units @ units.T)[np.triu_indices(12, 1)]
        width = 1.06 * values.std() * len(values) ** -0.2
        grid = np.linspace(values.min() - 4 * width, values.max() + 4 * width, 2000)
        density = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))
        expected.append(-np.trapezoid(density * np.log(density + 1e-12), grid))
    entropy = jax.jit(patch_similarity_entropy, compiler_options=QUICKLY)
    images = parts.reshape(2, 12, 1, 6).astype(np.float32)
    np.testing.assert_allclose(entropy(images), np.mean(expected), atol=0.02)
    assert entropy(same.reshape(images.shape).astype(np.float32)) < entropy(images) - 0.5
    gradient = jax.jit(jax.grad(patch_similarity_entropy), compiler_options=QUICKLY)
    assert np.isfinite(gradient(np.ones((2, 12, 6), np.float32))).all()


@pytest.mark.slow
def test_the_prior_is_the_sum_over_the_attention_layers_of_a_network():
    module = VisionTransformer(3, channels=8, depth=2, patch=2, head=4, token=False)
    teacher = dvinv.from_linen(module, trained_variables(module), **PICTURES)
    weights = dvinv.Weights(feature=0.0, patch_similarity=0.5)
    config = dvinv.InversionConfig((dvinv.Stage(1, 0.1, color_shift=0.5, centre=0.5),), weights)
    places = attention_of(teacher, config)
    assert places == tuple(f'blocks_{block}/attn:output' for block in range(2))
    x, arguments = jax.random.normal(jax.random.key(0), (5, *IMAGE_SHAPE)), (np.arange(5) % 3, teacher.variables, None)

    def run(x, key):
        attended = dataclasses.replace(config, attention=places)
        _, terms = make_objective(teacher, attended, config.stages[0])(x, *arguments, key)
        _, shown = view(teacher, config.stages[0], x, key)
        return terms, teacher.tap(teacher.variables, shown, capture=places)[2]

    terms, captured = jax.jit(run, compiler_options=QUICKLY)(x, jax.random.key(1))
    assert 'feature' not in terms
    expected = -sum(patch_similarity_entropy(tokens) for (tokens,) in captured.values())
    np.testing.assert_allclose(terms['patch_similarity'], expected, rtol=1e-4)
    with pytest.raises(DvinvError, match=r"pattern '\*Attention\*:output' fits no layer of Loop"):
        attention_of(loop(), config)
    with pytest.raises(
        DvinvError, match=r'patch_similarity is 0.5, but Dense_1:output, which attention names, is not an array'
    ):
        attention_of(loop(), dataclasses.replace(config, attention=('Dense:output',)))


def test_pixels_are_drawn_to_the_mean_and_variance_that_the_network_normalises_by():
    x = np.float32(np.random.default_rng(0).normal((0.5, -1.0), 2, (6, *IMAGE_SHAPE)))
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = np.linalg.norm(mean) + np.linalg.norm(variance - 1)
    np.testing.assert_allclose(pixel_moments(x), expected, rtol=1e-5)
    parts = jax.vmap(lambda part: pixel_moments(part, 'devices'), axis_name='devices')(x.reshape(2, 3, *IMAGE_SHAPE))
    np.testing.assert_allclose(parts, expected, rtol=1e-5)  # those of the whole batch
    np.testing.assert_allclose(pixel_moments((x - mean) / np.sqrt(variance)), 0, atol=1e-4)
    assert np.isfinite(jax.grad(pixel_moments)(np.zeros_like(x))).all()

    teacher = loop()
    config = dvinv.InversionConfig((dvinv.Stage(1, 0.1, jitter=3),), dvinv.Weights(feature=0.0, pixel_moments=2.0))
    objective = make_objective(teacher, config, config.stages[0])
    loss, terms = objective(x, np.arange(6) % 3, teacher.variables, None, jax.random.key(0))
    np.testing.assert_allclose(terms['pixel_moments'], expected, rtol=1e-5)  # before the augmentation
    others = terms['cross_entropy'] + 1e-4 * terms['total_variation']
    np.testing.assert_allclose(loss, others + 2 * expected, rtol=1e-4)


@pytest.mark.slow
def test_a_network_with_attention_and_exact_gelus_is_inverted_from_patterns_of_its_layers():
    module = VisionTransformer(3, channels=8, depth=1, patch=2, head=4, token=False)
    teacher = dvinv.from_linen(module, trained_variables(module), **PICTURES)
    config = dvinv.InversionConfig((dvinv.Stage(2, 0.1),), dvinv.Weights(feature=0.0, patch_similarity=0.5))
    made = dvinv.invert(teacher, np.arange(4) % 3, config)
    assert np.isfinite(made.images).all()
    assert 'patch_similarity' in made.metrics


def test_a_jax_that_cannot_split_exact_gelus_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ValueError('Primitive polynomial requires varying manual axes to match, but got ...')

    monkeypatch.setattr(jax, 'shard_map', refuse)
    config = dvinv.InversionConfig((dvinv.Stage(2, 0.1),), dvinv.Weights(feature=0.0), bn_stats='global')
    with pytest.raises(DvinvError, match=r"JAX [\d.]+ cannot split a network .* Take bn_stats='device'"):
        dvinv.invert(loop(), np.arange(8) % 3, config)


def test_colours_are_shifted_a_channel_and_image_and_the_middle_is_shown():
    x = np.ones((3, 8, 8, 2), np.float32)
    shifted = np.asarray(color_shift_each(jax.random.key(0), x, 1.0))
    assert (shifted == shifted[:, :1, :1]).all()  # one number a channel and image
    assert len(np.unique(shifted)) == 6
    picture = np.arange(8, dtype=np.float32)[None, :, None, None] * np.ones((1, 8, 8, 1), np.float32)
    middle = np.asarray(centred(picture, 0.5))
    assert middle.shape == picture.shape
    assert (middle.min(), middle.max()) == (2, 5)
    assert centred(picture, 1.0) is picture


# Mistakes


@pytest.mark.parametrize(
    ('call', 'sentence'),
    [
        (lambda: dvinv.record_moments(loop(), IMAGES[:1]), r'have the shape \(1, 8, 8, 2\); give at least 2, better 100'),
        (lambda: dvinv.record_moments(loop(), IMAGES.astype(np.float32)), r'The images are float32 .* must be uint8\.'),
        (lambda: dvinv.record_moments(loop(), IMAGES[..., :1]), r'shape \(11, 8, 8, 1\); .* \[N, 8, 8, 2\]'),
        (
            lambda: dvinv.record_moments(loop(), IMAGES, 'Nrm'),
            "pattern 'Nrm' fits no layer of Loop.* Dense, Block, LayerNorm",
        ),
        (lambda: dvinv.record_moments(Loop(), IMAGES), 'takes a dvinv.Teacher, and a Loop is none; .*from_linen'),
        (lambda: twin().with_moments(recorded()), 'These moments were recorded from another network: other weights'),
        (lambda: loop().with_moments({}), 'moments is a dict; give what dvinv.record_moments returns'),
        (lambda: loop().with_moments('no.safetensors'), 'no.safetensors holds no recorded moments: there is no such file'),
        (lambda: dvinv.invert(loop(), [0], '8px'), r'no running statistics .* no recorded moments.* weights.feature=0'),
        (lambda: dvinv.feature_loss(loop(), IMAGES), 'no running statistics and no recorded moments'),
    ],
)
def test_mistakes_are_told_in_a_sentence(call, sentence):
    with pytest.raises(DvinvError, match=sentence):
        call()


def test_moments_of_other_layers_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / 'moments.safetensors'
    pair = recorded().layers['Block_0:output']
    dvinv.Moments({'Block_7/norm': pair}, loop().digest(), 11).save(path)
    with pytest.raises(DvinvError, match=r'does not have, or not with so many channels: Block_7/norm\. Record'):
        loop().with_moments(path)
    recorded().save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DvinvError, match=r'holds no recorded moments that can be read: .* damaged'):
        loop().with_moments(path)
    recorded().save(path)
    flip(path, path.stat().st_size - 9)
    with pytest.raises(DvinvError, match=r'holds no recorded moments that can be read: .* damaged'):
        loop().with_moments(path)
    with pytest.raises(DvinvError, match='holds no recorded moments, but the weights of a network'):
        loop().with_moments(saved(tmp_path / 'network.safetensors'))


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({}, 'no running statistics .* teacher.moments=FILE'),
        ({'teacher__moments': 'm'}, 'm holds no recorded moments: there is no such file'),
        ({'teacher__moments_images': 1}, 'teacher.moments_images is 1; moments need at least 2 images'),
        ({'teacher__moments_images': 9, 'teacher__moments': 'm'}, "is 9, and moments is 'm'; give one of them"),
        ({'teacher__moments_images': 9, 'data__name': ''}, 'is 9, but there are no real training images .* data.name'),
        (
            {'teacher__moments': 'm', 'teacher__factory': '', 'teacher__network': 'small_vit'},
            "teacher.moments is 'm', but the teacher is yet to be trained",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, sentence):
    tasks = {'teacher__factory': 'factories:without_batch_norm', 'tasks': ('teacher', 'synthesis')}
    with pytest.raises(DvinvError, match=sentence):
        pipeline.validated(synthesis_config(**{**tasks, **changes}))


# The command, and a run


@pytest.mark.slow
def test_a_network_of_a_users_own_is_recorded_by_the_command_and_inverted(tmp_path):
    """It has neither normalisations nor blocks, and one layer, which is named."""
    config = synthesis_config(teacher__factory='factories:without_batch_norm')
    out = str(tmp_path / 'moments.safetensors')
    with pytest.raises(DvinvError, match='fewer than two layers with weights; name what'):
        record_to_file(parse(config), None, out)
    said = record_to_file(parse(config), None, out, 20, ('Dense:output',))
    assert said == f'{out}: the moments of 1 layers, over 20 training images, each augmented 10 times as in its training.'
    config.teacher.moments = out
    figures = pipeline.run(config, tmp_path / 'run')['synthesis']
    assert figures['statistics'] == 'recorded moments of 20 images, 1 layers'
    assert figures['feature_loss_last'] < figures['feature_loss_first']
    assert pipeline.run(config, tmp_path / 'run')['synthesis'] == figures


@pytest.mark.parametrize(
    ('statistics', 'sentence'),
    [
        ('running statistics, 2 layers', 'DeepInversion, without any data: .* found the statistics of its BatchNorm inputs'),
        (
            'recorded moments of 9 images, 2 layers',
            'the network and recorded moments of 9 images.* found these moments',
        ),
        ('none', r'DeepInversion without its feature term, without any data: [^,]* was sure of them\.'),
    ],
)
def test_the_report_names_the_way_of_inversion(statistics, sentence):
    figures = {'images': 10, 'teacher_accuracy': 0.9, 'statistics': statistics}
    assert re.search(sentence, task._summary(figures, *task.METHODS['deepinversion']))
