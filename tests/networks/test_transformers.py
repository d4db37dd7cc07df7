"""Networks without BatchNorm: PyTorch's logits, everybody's names, images of other sizes, and what dvinv does with them."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from golden.drawn import draw_images, draw_state
from safetensors.numpy import save_file
from smoke import smoke_config
from tiny import IMAGE_SHAPE, MEAN, STD, trained_variables

from dvinv import from_linen
from dvinv.config import TrainingSettings, parse
from dvinv.distillation.student import choose_hints, staged_forward, staged_loss
from dvinv.graph.stages import initial_projections
from dvinv.networks import create, load_network, read_classifier, registry, shapes_of
from dvinv.networks.classifier import flatten
from dvinv.networks.convnext import ConvNeXt
from dvinv.networks.naming import find_keys, to_flax_layout
from dvinv.networks.vision_transformer import VisionTransformer
from dvinv.networks.weights import import_weights
from dvinv.pipeline import tasks as pipeline
from dvinv.pipeline.run import Run
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.errors import DvinvError
from dvinv.training.step import Rounds, TrainJob, initial_state, make_train_step

PARAMETERS = {  # for 1,000 classes, as torchvision and timm publish them
    'vit_b_16': 86_567_656,
    'deit_tiny': 5_717_416,
    'deit_small': 22_050_664,
    'convnext_tiny': 28_589_128,
    'resnet50_gn': 25_557_032,
}
SHALLOW = {  # of golden/transformer_logits.npz: few blocks, or compilation takes long
    'vit_b_16': {'depth': 2},
    'deit_tiny': {'depth': 4},
    'convnext_tiny': {'blocks': (1, 1, 2, 1)},
    'resnet20_gn': {'blocks': 1},
}

with np.load(Path(__file__).parents[1] / 'golden' / 'transformer_logits.npz', allow_pickle=False) as arrays:
    GOLDEN = dict(arrays)


def golden_shapes(name: str) -> dict:
    return json.loads(str(GOLDEN[name]))


@functools.cache
def shallow(name: str):
    """(the module with few blocks, the shape of its images, its state dict) that the golden logits are of."""
    size = int(GOLDEN[f'{name}/size'])
    state = draw_state(golden_shapes(f'{name}/drawn'), seed=0, gain=float(GOLDEN[f'{name}/gain']))
    return create(name, 10).clone(**SHALLOW[name]), (size, size, 3), state


def numbered(shapes: dict) -> dict:
    """A state dict in which each tensor has the number of its place in the file for all values."""
    return {key: np.broadcast_to(np.float32(index), shape) for index, (key, shape) in enumerate(shapes.items())}


# What they compute


@pytest.mark.slow
@pytest.mark.parametrize('name', SHALLOW)
def test_logits_are_those_of_torchvision_and_timm(name):
    module, image_shape, state = shallow(name)
    variables = import_weights(module, image_shape, state)
    logits = jax.jit(module.apply)(variables, draw_images(0, image_shape[0]))
    expected = GOLDEN[f'{name}/logits']
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


# What they are made of, and what others call it


@functools.cache
def full(name: str):
    """(the module for 1,000 classes, {path: shape} of its variables)."""
    module = create(name, 1000)
    return module, flatten(shapes_of(module, (224, 224, 3)))


@pytest.mark.parametrize('key', [key for key in GOLDEN if key.endswith('/shapes')])
def test_names_shapes_and_parameters_are_those_of_the_published(key):
    module, shapes, state = *full(key.partition('/')[0]), numbered(golden_shapes(key))
    assert sum(leaf.size for leaf in shapes.values()) == PARAMETERS[key.partition('/')[0]]
    keys = find_keys(shapes, state, getattr(module, 'aliases', {}))
    assert {*keys.values()} == {*state}
    for path, name in keys.items():
        assert to_flax_layout(path, name, state[name], shapes[path].shape).shape == shapes[path].shape


def as_timm_orders(name: str, keys) -> list[str]:
    """torchvision's keys in the order of timm's, which has the positions before the patches."""
    keys = [*keys]
    if name == 'vit_b_16':
        keys.insert(1, keys.pop(keys.index('encoder.pos_embedding')))
    return keys


def of_old_torchvision(state: dict) -> dict:
    """As the published vit_b_16 has them."""
    linear = {'.mlp.0.': '.mlp.linear_1.', '.mlp.3.': '.mlp.linear_2.'}
    return {re.sub(r'\.mlp\.[03]\.', lambda found: linear[found[0]], key): value for key, value in state.items()}


def of_the_authors(state: dict) -> dict:
    """The keys of timm's ConvNeXt in those of the authors' repository."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r'^stem\.', 'downsample_layers.0.', key)
        key = re.sub(r'^stages\.(\d)\.downsample', r'downsample_layers.\1', key).replace('.blocks.', '.')
        key = key.replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')
        renamed[key.replace('head.norm', 'norm').replace('head.fc', 'head')] = value
    return renamed


@pytest.mark.parametrize('name', ['vit_b_16', 'convnext_tiny'])
def test_a_network_of_several_repositories_is_the_same(name):
    def fewer(key: str) -> dict:
        """The state dict of few channels: the first of each tensor's."""
        shapes = golden_shapes(key)
        state = numbered(
            {key: [math.ceil(length / 96) if length > 16 else length for length in shapes[key]] for key in shapes}
        )
        if name == 'convnext_tiny':
            return state
        return {key: value for key, value in state.items() if not re.search(r'(layer_|blocks\.)([2-9]|1\d)\.', key)}

    timm, torchvision = fewer(f'{name}/timm/shapes'), fewer(f'{name}/shapes')
    ordered = as_timm_orders(name, torchvision)
    torchvision = {key: timm[other].reshape(torchvision[key].shape) for key, other in zip(ordered, timm, strict=True)}
    states = [timm, torchvision, *([of_old_torchvision(torchvision)] if name == 'vit_b_16' else [of_the_authors(timm)])]
    assert len({frozenset(state) for state in states}) == 3
    if name == 'vit_b_16':
        module, image_shape = VisionTransformer(11, 8, 2, 16, 8), (16, 32, 3)
    else:
        module, image_shape = ConvNeXt(11, (3, 3, 9, 3), (1, 2, 4, 8)), (32, 32, 3)
    first, *others = [import_weights(module, image_shape, state) for state in states]
    assert len(jax.tree.leaves(first)) == len(timm)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize(
    ('name', 'change', 'words'),
    [
        ('deit_tiny', {'blocks.1.attn.qkv.bias': None}, r'VisionTransformer: they lack blocks\.1\.attn\.qkv\.bias\.'),
        ('deit_tiny', {'dist_token': np.zeros((1, 1, 192))}, r'left over dist_token\.'),
        ('deit_tiny', {'cls_token': None}, r'lack cls_token\.'),
        ('deit_tiny', {'pos_embed': np.zeros((1, 196, 192))}, r'other shapes than expected have pos_embed \(1, 196, 192\)'),
        ('deit_tiny', {'pos_embed': np.zeros((2, 50, 192))}, r'shapes than expected have pos_embed \(2, 50, 192\)'),
        ('deit_tiny', {'cls_token': np.full((1, 1, 192), np.nan)}, r'Of the 192 numbers in cls_token, 192 are NaN'),
        (
            'vit_b_16',
            {'encoder.layers.encoder_layer_1.self_attention.in_proj_bias': None},
            r'lack encoder\.layers\.encoder_layer_1\.self_attention\.in_proj_bias\.',
        ),
        ('vit_b_16', {'blocks.0.norm1.bias': np.zeros(768)}, r'left over blocks\.0\.norm1\.bias\.'),
        ('convnext_tiny', {'stages.0.blocks.0.gamma': None}, r'lack stages\.0\.blocks\.0\.gamma\.'),
        ('convnext_tiny', {'stages.0.blocks.0.gamma': np.zeros((96, 2))}, r'have stages\.0\.blocks\.0\.gamma \(96, 2\)'),
        ('resnet20_gn', {'bn1.running_mean': np.zeros(16)}, r'left over bn1\.running_mean\.'),
    ],
)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(name, change, words):
    module, image_shape, state = shallow(name)
    with pytest.raises(DvinvError, match=words):
        import_weights(module, image_shape, {key: value for key, value in (state | change).items() if value is not None})


@pytest.mark.parametrize('keys', [('head/kernel', 'norm/gamma'), ('vit0_head_weight', 'vit0_norm_gamma')])
def test_files_of_keras_and_gluon_are_refused_in_a_sentence(keys):
    with pytest.raises(DvinvError, match=r'do not fit VisionTransformer: they lack .*(cls_token|blocks_0)'):
        import_weights(VisionTransformer(10, 16, 1, 4, 16), (8, 8, 3), dict.fromkeys(keys, np.zeros((16, 10))))


def test_a_wrapped_file_gives_classes_pixels_and_positions_of_larger_images(tmp_path, capsys):
    shapes = golden_shapes('deit_tiny/timm/shapes') | {'head.weight': [7, 192], 'head.bias': [7]}
    state = draw_state(shapes, seed=0)
    save_file({f'module.{key}': value for key, value in state.items()}, tmp_path / 'deit.safetensors')
    _, variables, about = read_classifier(tmp_path / 'deit.safetensors', 'deit_tiny', image_shape=(256, 256, 3))
    assert (about['num_classes'], about['mean']) == (7, (0.485, 0.456, 0.406))
    assert variables['params']['pos_embed'].shape == (1, 257, 192)
    np.testing.assert_array_equal(variables['params']['blocks_0']['attn']['qkv']['bias'], state['blocks.0.attn.qkv.bias'])
    said = capsys.readouterr().err
    assert "'module.' is left out of the keys" in said
    assert 'deit.safetensors: the positions, of 14x14 patches, are resampled to 16x16.' in said


# Images of other sizes


@pytest.mark.parametrize(('name', 'grid'), [('up', (7, 7)), ('down', (3, 3)), ('oblong', (2, 6))])
def test_positions_are_resampled_as_by_timm(name, grid):
    module, path = VisionTransformer(10, 8, 1, 4, 8), 'params/pos_embed'
    positions = draw_state({'pos_embed': [1, 17, 8]}, seed=0)['pos_embed']
    resampled = module.adapt({path: positions}, (4 * grid[0], 4 * grid[1], 3), 'These')[path]
    np.testing.assert_allclose(resampled, GOLDEN[f'positions/{name}'], atol=1e-5)
    assert module.adapt({path: positions}, (16, 16, 3), 'These')[path] is positions


@pytest.mark.parametrize(
    ('name', 'size', 'words'),
    [
        ('small_vit', (9, 8), r'patches of 2x2 pixels takes images that they fill, not 9x8\.'),
        ('small_vit', (16, 8), r'positions .* are of 16 patches, and images of 16x8 have 32; give it images of the size'),
        ('convnext_tiny', (31, 32), 'takes images of 32x32 or larger, not 31x32'),
    ],
)
def test_images_that_do_not_fit_are_told(name, size, words):
    module, image = create(name, 10, 0.25), jax.ShapeDtypeStruct((1, *size, 3), np.float32)
    variables = shapes_of(module, (8, 8, 3)) if name == 'small_vit' else {}
    with pytest.raises(DvinvError, match=words):
        jax.eval_shape(module.apply, variables, image)


def test_a_convnext_leaves_out_whole_branches_in_training_alone():
    module = ConvNeXt(3, (2,), (4,), drop=0.5)
    variables, x = trained_variables(module, (32, 32, 3)), draw_images(0)[:1]
    train = jax.jit(lambda seed: module.apply(variables, x, train=True, rngs={'dropout': jax.random.key(seed)}))
    drawn = {np.asarray(train(seed)).tobytes() for seed in range(8)}
    assert len(drawn) == 2  # the first block stays, a coin is tossed for the second
    assert np.asarray(jax.jit(module.apply)(variables, x)).tobytes() not in drawn


# What dvinv does with them


@pytest.fixture
def one_block(monkeypatch):
    """`small_vit` with one block in place of four."""
    network = dataclasses.replace(registry.NETWORKS['small_vit'], depths={'depth': 1})
    monkeypatch.setitem(registry.NETWORKS, 'small_vit', network)


@pytest.mark.slow
def test_the_task_teacher_trains_them_and_images_need_moments(one_block, tmp_path):
    def config(**changes):
        return smoke_config(**{'teacher__network': 'small_vit', 'verifier__network': '', 'devices': 1, **changes})

    with pytest.raises(DvinvError, match=r'no running statistics .* no recorded moments'):
        pipeline.validated(config(tasks=('teacher', 'synthesis')))
    figures = pipeline.run(config(tasks=('teacher',)), tmp_path / 'run')['teacher']
    assert 0 < figures['test_accuracy'] <= 1
    file = tmp_path / 'run' / 'networks' / 'teacher.safetensors'
    variables, about = load_network(file)
    assert about['network'] == 'small_vit'
    assert figures['parameters'] == sum(leaf.size for leaf in flatten(variables).values())
    assert not Run(parse(config(tasks=('synthesis',), teacher__weights=str(file)))).teacher.tap.layers
    judge = {'verifier__network': 'small_vit', 'verifier__weights': str(file)}
    verifier = Run(parse(config(**judge, teacher__factory='factories:own'))).verifier
    assert verifier.parameters == figures['parameters']


@pytest.mark.slow
def test_a_vision_transformer_learns_the_answers_and_a_stage_of_another_network(one_block):
    module, student = create('small_resnet', 3, 0.125), create('small_vit', 3, 0.25)
    own = from_linen(module, trained_variables(module), image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    pairs = choose_hints('auto', student, own).pairs
    assert [pair.student.resolution for pair in pairs] == [(4, 4)]
    recipe = TrainingSettings(updates=12, batch_size=20, learning_rate=0.01)
    staged = staged_forward(student, own, pairs, 0.5)
    projections = initial_projections(jax.random.key(0), pairs)
    job = TrainJob(recipe, staged_loss(3.0, 1.0), Rounds(20), own.variables, forward=staged, auxiliary=projections)
    images, labels = np.random.default_rng(1).integers(0, 256, (20, *IMAGE_SHAPE), dtype=np.uint8), np.zeros(20, np.int32)
    step, losses = jax.jit(make_train_step(student, job, own, make_mesh(1))), []
    state = initial_state(recipe, trained_variables(student), projections)
    for _ in range(recipe.updates):
        state, loss = step(state, images, labels, job.frozen, jax.random.key(0))
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
