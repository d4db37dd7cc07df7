"""torchvision's ImageNet networks: PyTorch's logits and moments, published sizes, strict import, timm's names too."""

import json
import re
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from golden.drawn import draw_images, draw_state
from safetensors.numpy import save_file

from dvinv.inversion.teacher import trusted_linen
from dvinv.networks import create, image_shape, read_classifier, shapes_of
from dvinv.networks.mobilenet import in_eighths
from dvinv.networks.torch_layers import adaptive_mean
from dvinv.networks.weights import import_weights
from dvinv.runtime.errors import DvinvError

PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
PARAMETERS = {  # for 1,000 classes, as torchvision publishes them
    'resnet18': 11_689_512,
    'resnet34': 21_797_672,
    'resnet50': 25_557_032,
    'resnet101': 44_549_160,
    'mobilenet_v2': 3_504_872,
    'imagenet_vgg11_bn': 132_868_840,
    'imagenet_vgg16_bn': 138_365_992,
}
NARROW = sorted(PARAMETERS.keys() - {'resnet50'})
MOBILENET_BLOCKS = ((1, 2), (2, 3), (3, 4), (4, 3), (5, 3), (6, 1))  # (stage, how many), those after the very first


def read_golden(name: str) -> dict:
    with np.load(Path(__file__).parents[1] / 'golden' / name, allow_pickle=False) as arrays:
        return dict(arrays)


GOLDEN = read_golden('imagenet_logits.npz')
SIZE = int(GOLDEN['size'])
SHAPE = (SIZE, SIZE, 3)


def narrow_network(name: str):
    """(the module, its state dict in torchvision's names) that golden/imagenet_logits.npz is of."""
    module = create(name, 10, float(GOLDEN[f'{name}/width']))
    return module, draw_state(json.loads(str(GOLDEN[f'{name}/shapes'])), seed=0, gain=float(GOLDEN[f'{name}/gain']))


def named_as_timm(name: str, state: dict) -> dict:
    """A state dict of torchvision in the names and shapes of timm, with the counters of BatchNorm."""
    if name == 'mobilenet_v2':
        layers = ['conv_stem', 'bn1', *(f'blocks.0.0.{layer}' for layer in ('conv_dw', 'bn1', 'conv_pw', 'bn2'))]
        inside = ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')
        blocks = [(stage, block) for stage, count in MOBILENET_BLOCKS for block in range(count)]
        layers += [f'blocks.{stage}.{block}.{layer}' for stage, block in blocks for layer in inside]
        layers += ['conv_head', 'bn2', 'classifier']
        shapes = json.loads(str(GOLDEN[f'{name}/shapes']))  # both have their layers in forward order
        ours = dict.fromkeys(key.rpartition('.')[0] for key in shapes)
        names = dict(zip(ours, layers, strict=True))
        state = {f'{names[key.rpartition(".")[0]]}.{key.rpartition(".")[2]}': value for key, value in state.items()}
    if name == 'imagenet_vgg16_bn':
        names = {'classifier.0': 'pre_logits.fc1', 'classifier.3': 'pre_logits.fc2', 'classifier.6': 'head.fc'}
        state = {names.get(key[:12], key[:12]) + key[12:]: value for key, value in state.items()}
        for layer, side in (('fc1', 7), ('fc2', 1)):
            weight = state[f'pre_logits.{layer}.weight']
            state[f'pre_logits.{layer}.weight'] = weight.reshape(len(weight), -1, side, side)
    counters = [key.replace('running_var', 'num_batches_tracked') for key in state if key.endswith('running_var')]
    return state | dict.fromkeys(counters, np.array(9, np.int64))


def torchvision_name(layer: str) -> str:
    """'layer1_0/downsample_1' -> 'layer1.0.downsample.1'."""
    return re.sub(r'_(\d+)', r'.\1', layer.replace('/', '.'))


def size_of(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# What they compute


@pytest.mark.slow
@pytest.mark.parametrize('name', NARROW)
def test_logits_are_those_of_pytorch(name):
    module, state = narrow_network(name)
    variables = import_weights(module, SHAPE, state)
    logits = jax.jit(module.apply)(variables, draw_images(0, SIZE))
    expected = GOLDEN[f'{name}/logits']
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_logits_and_moments_of_a_resnet50_are_those_of_pytorch():
    golden = read_golden('resnet50_moments.npz')
    size, every, channels = int(golden['size']), int(golden['every']), json.loads(str(golden['channels']))
    state = draw_state(json.loads(str(golden['shapes'])), seed=0, gain=float(golden['gain']))
    module, shape = create('resnet50', 10), (size, size, 3)
    teacher = trusted_linen(module, import_weights(module, shape, state), image_shape=shape, **PIXELS)
    logits, moments = jax.jit(teacher.tap)(teacher.variables, draw_images(0, size))
    assert np.abs(logits - golden['logits']).max() < 1e-4 * np.abs(golden['logits']).max()
    assert [torchvision_name(layer) for layer in teacher.tap.layers] == [*channels]
    expected = np.split(golden['moments'], np.cumsum([*channels.values()])[:-1], axis=1)
    for (layer, moments_of_layer), expected_moments in zip(moments.items(), expected, strict=True):
        for moment, wanted in zip(moments_of_layer, expected_moments, strict=True):  # mean, variance
            assert np.abs(moment[::every] - wanted).max() < 1e-4 * np.abs(wanted).max(), layer


@pytest.mark.parametrize('size', [(1, 2), (3, 7), (7, 7), (9, 14), (15, 6)])
def test_adaptive_pooling_takes_the_means_of_pytorch(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)

    def bounds(index: int, length: int) -> slice:
        return slice(int(np.floor(index * length / 7)), int(np.ceil((index + 1) * length / 7)))

    expected = [[x[:, bounds(i, size[0]), bounds(j, size[1])].mean((1, 2)) for j in range(7)] for i in range(7)]
    np.testing.assert_allclose(adaptive_mean(x, 7), np.moveaxis(expected, 2, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['mobilenet_v2', 'imagenet_vgg16_bn'])
def test_features_are_dropped_in_training_alone(name):
    module = create(name, 10, 0.125)
    variables, image = shapes_of(module, SHAPE), jax.ShapeDtypeStruct((2, *SHAPE), np.float32)
    with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
        jax.eval_shape(lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats']), variables, image)


def test_a_picture_too_small_for_a_vgg_is_told():
    module = create('imagenet_vgg16_bn', 10)
    assert shapes_of(module, (32, 50, 3)) == shapes_of(module, image_shape('imagenet_vgg16_bn'))
    with pytest.raises(DvinvError, match='takes images of 32x32 or larger, not 31x32'):
        shapes_of(module, (31, 32, 3))


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2'])
def test_the_others_take_pictures_of_any_size(name):
    module = create(name, 10, 0.125)
    assert shapes_of(module, (1, 9, 3)) == shapes_of(module, SHAPE)


# What they are made of


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    assert image_shape(name) == (224, 224, 3)
    assert size_of(shapes_of(create(name, 1000), image_shape(name))['params']) == PARAMETERS[name]


@pytest.mark.parametrize(
    ('channels', 'expected'), [(1, 8), (11, 16), (12, 16), (18, 24), (19.6, 24), (43.6, 40), (44, 48), (1792, 1792)]
)
def test_channels_of_a_mobilenet_are_rounded_to_eighths(channels, expected):
    assert in_eighths(channels) == expected


def test_a_mobilenet_is_as_wide_as_that_of_torchvision():
    module = create('mobilenet_v2', 10, 1.4)
    assert (module.channels, module.last) == ((48, 24, 32, 48, 88, 136, 224, 448), 1792)
    assert create('mobilenet_v2', 10, 0.75).channels == (24, 16, 24, 24, 48, 72, 120, 240)
    # PrunedModule ones keep the last layer whole; the golden weights, a quarter as wide, have it so too.
    assert json.loads(str(GOLDEN['mobilenet_v2/shapes']))['classifier.1.weight'] == [10, 1280]


# Their weights from files


@pytest.mark.parametrize(
    ('name', 'suffix'), [('resnet18', 'pth'), ('mobilenet_v2', 'safetensors'), ('imagenet_vgg16_bn', 'npz')]
)
def test_files_of_torchvision_and_timm_are_read_alike(tmp_path, name, suffix):
    module, state = narrow_network(name)
    width, found = float(GOLDEN[f'{name}/width']), []
    for origin, tensors in (('torchvision', state), ('timm', named_as_timm(name, state))):
        path = tmp_path / f'{origin}.{suffix}'
        if suffix == 'pth':
            torch = pytest.importorskip('torch')
            torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
        else:
            np.savez(path, **tensors) if suffix == 'npz' else save_file(tensors, path)
        read, variables, about = read_classifier(path, name, width=width, image_shape=SHAPE, **PIXELS)
        assert about == {'network': name, 'width': width, 'num_classes': 10, 'image_shape': SHAPE, **PIXELS}
        assert read == module
        found.append(variables)
    jax.tree.map(np.testing.assert_array_equal, *found)
    last = {'resnet18': 'fc', 'mobilenet_v2': 'classifier.1', 'imagenet_vgg16_bn': 'classifier.6'}[name]
    np.testing.assert_array_equal(found[0]['params'][last.replace('.', '_')]['kernel'], state[f'{last}.weight'].T)


@pytest.mark.parametrize(
    ('name', 'change', 'words'),
    [
        ('resnet18', {'layer2.0.downsample.1.running_var': None}, r'lack layer2\.0\.downsample\.1\.running_var\.'),
        ('resnet18', {'layer1.0.bn3.weight': np.zeros(1)}, r'left over layer1\.0\.bn3\.weight\.'),
        ('mobilenet_v2', {'features.1.conv.0.1.bias': None}, r'lack features\.1\.conv\.0\.1\.bias\.'),
        (
            'mobilenet_v2',
            {'classifier.1.bias': np.zeros(3)},
            r'other shapes than expected have classifier\.1\.bias \(3,\)\.',
        ),
        ('imagenet_vgg16_bn', {'classifier.weight': np.zeros(1)}, r'left over classifier\.weight\.'),
    ],
)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(name, change, words):
    module, state = narrow_network(name)
    with pytest.raises(DvinvError, match=words):
        import_weights(module, SHAPE, {key: value for key, value in (state | change).items() if value is not None})


@pytest.mark.parametrize(
    ('name', 'change', 'words'),
    [
        ('mobilenet_v2', {'blocks.1.0.bn1.bias': None}, r'lack blocks\.1\.0\.bn1\.bias\.'),
        (
            'mobilenet_v2',
            {'blocks.1.0.se.conv_reduce.bias': np.zeros(1)},
            r'left over blocks\.1\.0\.se\.conv_reduce\.bias\.',
        ),
        ('mobilenet_v2', {'features.0.1.bias': np.zeros(8)}, r'left over features\.0\.1\.bias\.'),
        ('imagenet_vgg16_bn', {'head.fc.bias': None}, r'lack head\.fc\.bias\.'),
        ('imagenet_vgg16_bn', {'pre_logits.fc1.weight': np.zeros((512, 64, 6, 6))}, r'fc1\.weight \(512, 64, 6, 6\)\.'),
    ],
)
def test_files_of_timm_are_imported_as_strictly(name, change, words):
    module, state = narrow_network(name)
    state = named_as_timm(name, state) | change
    with pytest.raises(DvinvError, match=words):
        import_weights(module, SHAPE, {key: value for key, value in state.items() if value is not None})
