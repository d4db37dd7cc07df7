"""The published CIFAR networks: PyTorch's logits, names and shapes; their weights from files of PyTorch and of Keras."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from golden.drawn import draw_images, draw_state
from safetensors.numpy import save_file
from tiny import trained_variables

from dvinv import from_linen
from dvinv.networks import NETWORKS, create, image_shape, read_classifier, save_network
from dvinv.networks.classifier import flatten
from dvinv.networks.naming import find_keys
from dvinv.networks.registry import published_pixels
from dvinv.networks.resnet import ResNet
from dvinv.networks.weights import OLD_TORCH, import_weights, read_state_dict
from dvinv.runtime.errors import DvinvError

PARAMETERS = {  # for 10 classes
    'resnet20': 269_722,
    'resnet32': 464_154,
    'resnet44': 658_586,
    'resnet56': 853_018,
    'resnet110': 1_727_962,
    'cifar_resnet18': 11_173_962,
    'cifar_resnet34': 21_282_122,
    'vgg11_bn': 9_231_114,
    'vgg16_bn': 14_728_266,
    'wrn16_1': 175_066,
    'wrn16_2': 691_674,
    'wrn40_1': 563_930,
    'wrn40_2': 2_243_546,
}
OWN = {  # of no published weights
    'resnet8': 75_290,
    'resnet20_gn': 269_722,
    'cifar_vgg': 289_194,
    'cifar_mobilenet': 80_778,
    'cifar_vit': 2_693_194,
}
WITHOUT_BATCH_NORM = {
    *('squeezenet1_1', 'resnet20_gn', 'resnet50_gn', 'convnext_tiny'),
    *('small_vit', 'cifar_vit', 'vit_b_16', 'deit_tiny', 'deit_small'),
}
SHAPE = (32, 32, 3)
PIXELS = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)}

with np.load(Path(__file__).parents[1] / 'golden' / 'published_logits.npz', allow_pickle=False) as arrays:
    GOLDEN = dict(arrays)
NARROW = sorted(key.removesuffix('/logits') for key in GOLDEN if key.endswith('/logits'))


def golden_shapes(name: str) -> dict:
    return json.loads(str(GOLDEN[name]))


def variable_shapes(module, shape):
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), image)


# What they compute


@pytest.mark.parametrize('name', NARROW)
def test_logits_are_those_of_pytorch(name):
    module = create(name, 10, float(GOLDEN[f'{name}/width']))
    state = draw_state(golden_shapes(f'{name}/narrow_shapes'), seed=0)
    logits = jax.jit(module.apply)(import_weights(module, SHAPE, state), draw_images(seed=0))
    expected = GOLDEN[f'{name}/logits']
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_picture_too_small_for_a_vgg_is_told():
    with pytest.raises(DvinvError, match='takes images of 32x32 or larger, not 28x32'):
        variable_shapes(create('vgg11_bn', 10), (28, 32, 3))


# What they are made of


def test_every_published_network_is_looked_at():
    assert {*PARAMETERS, *OWN} == {name for name in NETWORKS if image_shape(name) == SHAPE}


@pytest.mark.parametrize('name', OWN)
def test_small_students_have_so_many_parameters(name):
    variables = variable_shapes(create(name, 10), SHAPE)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == OWN[name]


@pytest.mark.parametrize('name', PARAMETERS)
def test_names_and_shapes_are_those_of_pytorch(name):
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in golden_shapes(f'{name}/shapes').items()}
    variables = import_weights(create(name, 10), image_shape(name), state)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    # Not the deepest ones, which take seconds each, and none without BatchNorm.
    sorted(
        NETWORKS.keys() - {*(f'resnet{depth}' for depth in (32, 34, 44, 56, 101, 110)), 'inception_v3'} - WITHOUT_BATCH_NORM
    ),
)
def test_the_tap_reaches_every_batch_norm(name):
    module, shape = create(name, 10), image_shape(name)
    variables = variable_shapes(module, shape)
    teacher = from_linen(module, variables, image_shape=shape, mean=[0.5] * shape[-1], std=[0.5] * shape[-1])
    assert 2 * len(teacher.tap.layers) == len(jax.tree.leaves(variables['batch_stats']))
    assert teacher.num_classes == 10


# PyTorch's weights

TINY = ResNet(10, (1, 1), (8, 16))


@pytest.fixture
def state() -> dict:
    """A state dict of `TINY`, in torchvision's names."""
    parts = ('conv1', 'bn1', 'layer1.0', 'layer2.0', 'fc')
    shapes = golden_shapes('cifar_resnet18/narrow_shapes')
    shapes = {key: shape for key, shape in shapes.items() if key.startswith(parts)}
    return draw_state(shapes | {'fc.weight': [10, 16]}, seed=1)


def renamed(state: dict) -> dict:
    """The state dict in the names of the common CIFAR repositories."""
    return {key.replace('downsample', 'shortcut').replace('fc', 'linear'): value for key, value in state.items()}


def test_the_names_of_the_common_cifar_repositories_are_understood(state):
    variables = import_weights(TINY, SHAPE, state)
    jax.tree.map(np.testing.assert_array_equal, variables, import_weights(TINY, SHAPE, renamed(state)))
    np.testing.assert_array_equal(variables['params']['fc']['kernel'], state['fc.weight'].T)
    projection = variables['params']['layer2_0']['downsample_0']['kernel']
    np.testing.assert_array_equal(projection[0, 0], state['layer2.0.downsample.0.weight'][:, :, 0, 0].T)


def test_one_tensor_under_two_names_is_one_too_many(state):
    with pytest.raises(DvinvError, match=r'do not fit ResNet: they have left over linear\.bias\. Is it another depth'):
        import_weights(TINY, SHAPE, state | {'linear.bias': state['fc.bias']})


def test_a_refusal_uses_the_names_of_the_file(state):
    state = renamed(state) | {'layer2.0.shortcut.1.bias': np.zeros(8)}
    with pytest.raises(DvinvError, match=r'shapes than expected have layer2\.0\.shortcut\.1\.bias \(8,\)\.'):
        import_weights(TINY, SHAPE, state)


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_variables_are_float32_arrays_of_numpy(state, dtype):
    variables = import_weights(TINY, SHAPE, {key: value.astype(dtype) for key, value in state.items()})
    assert {(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(variables)} == {(np.ndarray, np.dtype(np.float32))}


# Keras's weights


class Separable(nn.Module):
    """A depthwise convolution with two channels for each of its own, BatchNorm, a dense layer."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(6, (3, 3), padding='VALID', feature_group_count=3, use_bias=False, name='conv_dw_1')(x)
        x = nn.BatchNorm(use_running_average=not train, name='conv_dw_1_bn')(x)
        return nn.Dense(5, name='conv_preds')(x.mean((1, 2)))


@pytest.fixture
def keras() -> dict:
    names = ('gamma', 'beta', 'moving_mean', 'moving_variance')
    rng = np.random.default_rng(0)
    return {
        'conv_dw_1/depthwise_kernel': rng.normal(size=(3, 3, 3, 2)),
        **{f'conv_dw_1_bn/{name}': rng.uniform(1, 2, 6) for name in names},
        'conv_preds/kernel': rng.normal(size=(6, 5)),
        'conv_preds/bias': rng.normal(size=5),
    }


def test_weights_of_keras_compute_what_keras_does(keras, tmp_path):
    np.savez(tmp_path / 'keras.npz', **keras)
    variables = import_weights(Separable(), (3, 3, 3), read_state_dict(tmp_path / 'keras.npz'))
    x = np.random.default_rng(1).normal(size=(2, 3, 3, 3)).astype(np.float32)
    features = np.einsum('bhwc,hwcm->bcm', x, keras['conv_dw_1/depthwise_kernel']).reshape(2, 6)
    gamma, beta, mean, variance = list(keras.values())[1:5]
    features = gamma * (features - mean) / np.sqrt(variance + 1e-5) + beta
    expected = features @ keras['conv_preds/kernel'] + keras['conv_preds/bias']
    np.testing.assert_allclose(Separable().apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_depthwise_kernels_of_keras_3_have_the_name_of_all(keras):
    again = {key.replace('depthwise_kernel', 'kernel'): value for key, value in keras.items()}
    jax.tree.map(np.testing.assert_array_equal, *(import_weights(Separable(), (3, 3, 3), s) for s in (keras, again)))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'conv_dw_1_bn/beta': None}, 'lack conv_dw_1_bn/beta'),
        ({'conv_preds/bias': None, 'conv_preds/kernel': None}, 'lack conv_preds/bias, conv_preds/kernel'),
        ({'conv_pw_1/kernel': np.zeros(3)}, 'left over conv_pw_1/kernel'),
        ({'conv_dw_1/kernel': np.zeros((3, 3, 3, 2))}, 'left over conv_dw_1/depthwise_kernel'),
        ({'conv_dw_1/depthwise_kernel': np.zeros((3, 3, 3, 1))}, r'shapes .* conv_dw_1/depthwise_kernel \(3, 3, 3, 1\)'),
        ({'conv_dw_1_bn/moving_mean': np.zeros(5)}, r'shapes .* conv_dw_1_bn/moving_mean \(5,\)'),
    ],
)
def test_weights_of_keras_are_imported_as_strictly(keras, change, words):
    state = {key: value for key, value in (keras | change).items() if value is not None}
    with pytest.raises(DvinvError, match=f'do not fit Separable: .*{words}'):
        import_weights(Separable(), (3, 3, 3), state)


# Files that only PyTorch reads


class Tensor(SimpleNamespace):
    """As much of PyTorch's as reading takes."""

    dtype = 'torch.float32'
    detach = float = lambda self: self

    def numpy(self):
        return self.array


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """`checkpoint(content)`: the path of a file that a stand-in for PyTorch reads as `content`."""

    def checkpoint(content) -> Path:
        def load(path, map_location, weights_only):
            assert (path, map_location, weights_only) == (tmp_path / 'model.th', 'cpu', True)
            return content

        monkeypatch.setitem(
            sys.modules, 'torch', SimpleNamespace(load=load, is_tensor=lambda value: isinstance(value, Tensor))
        )
        (tmp_path / 'model.th').write_bytes(b'\x80\x02' + OLD_TORCH)
        return tmp_path / 'model.th'

    return checkpoint


def test_a_checkpoint_gives_its_state_dict(checkpoint, state):
    wrapped = {f'module.{key}': Tensor(array=value) for key, value in state.items()}
    read = read_state_dict(checkpoint({'state_dict': wrapped, 'best_prec1': 90.0}))
    assert read.keys() == wrapped.keys()
    jax.tree.map(np.testing.assert_array_equal, import_weights(TINY, SHAPE, read), import_weights(TINY, SHAPE, state))


@pytest.mark.parametrize('content', [{'net': {}, 'epoch': 3}, {'state_dict': {'net': 1, 'epoch': 2}}])
def test_a_checkpoint_without_a_state_dict_is_told(checkpoint, content):
    with pytest.raises(
        DvinvError, match=r'model\.th is no state dict \(net, epoch: no tensors\); save the state_dict alone'
    ):
        read_state_dict(checkpoint(content))


def test_a_checkpoint_that_is_no_dict_is_told(checkpoint):
    with pytest.raises(DvinvError, match='is no state dict'):
        read_state_dict(checkpoint([1.0]))


@pytest.mark.parametrize('suffix', ['pth', 'pt', 'th'])
def test_without_pytorch_its_files_are_refused(monkeypatch, tmp_path, suffix):
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = tmp_path / f'model.{suffix}'
    path.write_bytes(b'\x80\x02' + OLD_TORCH)
    with pytest.raises(DvinvError, match=rf'model\.{suffix} needs PyTorch to be read; install torch'):
        read_state_dict(path)


def test_pytorch_reads_a_checkpoint_of_data_parallel(tmp_path, state):
    torch = pytest.importorskip('torch')
    wrapped = {f'module.{key}': torch.nn.Parameter(torch.from_numpy(value)) for key, value in state.items()}
    torch.save({'state_dict': wrapped, 'best_prec1': 90.0}, tmp_path / 'model.th')
    variables = import_weights(TINY, SHAPE, read_state_dict(tmp_path / 'model.th'))
    jax.tree.map(np.testing.assert_array_equal, variables, import_weights(TINY, SHAPE, state))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip('torch')

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'evil',)

    torch.save({'state_dict': Evil()}, tmp_path / 'model.pth')
    with pytest.raises(DvinvError, match='could run code, so it is not read'):
        read_state_dict(tmp_path / 'model.pth')
    assert not (tmp_path / 'evil').exists()


# Files that are damaged


@pytest.mark.parametrize('content', [b'', b'PK', b'\x93NUMPY', b'no weights'])
@pytest.mark.parametrize('suffix', ['npz', 'safetensors'])
def test_a_damaged_file_is_told(tmp_path, suffix, content):
    path = tmp_path / f'weights.{suffix}'
    path.write_bytes(content)
    with pytest.raises(DvinvError, match=r'cannot be read \(.+\)|is damaged'):
        read_classifier(path, 'vgg11_bn', **PIXELS)


def test_an_npz_cut_short_and_a_renamed_npy_are_told(tmp_path):
    path = tmp_path / 'weights.npz'
    np.savez(path, a=np.zeros(99))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DvinvError, match='cannot be read'):
        read_state_dict(path)
    with path.open('wb') as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DvinvError, match='cannot be read'):
        read_state_dict(path)


# A classifier from a file


@pytest.fixture
def vgg() -> dict:
    """A state dict of a `vgg11_bn` of width 0.125."""
    return draw_state(golden_shapes('vgg11_bn/narrow_shapes'), seed=0)


@pytest.mark.parametrize('classes', [10, 100])
@pytest.mark.parametrize('suffix', ['npz', 'safetensors'])
def test_the_number_of_classes_is_read_off_the_head(tmp_path, vgg, classes, suffix):
    vgg = vgg | draw_state({'classifier.weight': [classes, 64], 'classifier.bias': [classes]}, seed=1)
    path = tmp_path / f'vgg.{suffix}'
    np.savez(path, **vgg) if suffix == 'npz' else save_file(vgg, path)
    module, variables, about = read_classifier(path, 'vgg11_bn', width=0.125, **PIXELS)
    assert about == {'network': 'vgg11_bn', 'width': 0.125, 'num_classes': classes, 'image_shape': SHAPE, **PIXELS}
    assert module == create('vgg11_bn', classes, 0.125)
    jax.tree.map(np.testing.assert_array_equal, variables, import_weights(module, SHAPE, vgg))


def test_the_head_of_other_names_is_found(tmp_path):
    state = renamed(
        draw_state(golden_shapes('cifar_resnet18/narrow_shapes') | {'fc.weight': [7, 64], 'fc.bias': [7]}, seed=0)
    )
    np.savez(tmp_path / 'resnet.npz', **{f'module.{key}': value for key, value in state.items()})
    _, variables, about = read_classifier(tmp_path / 'resnet.npz', 'cifar_resnet18', width=0.125, **PIXELS)
    assert about['num_classes'] == 7
    np.testing.assert_array_equal(variables['params']['fc']['bias'], state['linear.bias'])


@pytest.mark.parametrize(
    ('network', 'width', 'words'),
    [
        ('vgg16_bn', 0.125, r'do not fit VGG: they lack features\.10\.bias, .* and 48 more\. Is it another depth'),
        ('resnet20', 0.125, r'do not fit CifarResNet: they lack bn1\.bias, '),
        ('vgg11_bn', 1.0, r'do not fit VGG: other shapes than expected have .*features\.0\.weight \(8, 3, 3, 3\)'),
        ('vgg12', 1.0, "no network 'vgg12'"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, vgg, network, width, words):
    np.savez(tmp_path / 'vgg.npz', **vgg)
    with pytest.raises(DvinvError, match=words):
        read_classifier(tmp_path / 'vgg.npz', network, width=width, **PIXELS)


def test_a_head_that_disagrees_with_itself_is_refused(tmp_path, vgg):
    np.savez(tmp_path / 'vgg.npz', **vgg | {'classifier.bias': np.zeros(11)})
    with pytest.raises(DvinvError, match=r'other shapes than expected have classifier\.'):
        read_classifier(tmp_path / 'vgg.npz', 'vgg11_bn', width=0.125, **PIXELS)


OURS = {
    'network': 'small_resnet',
    'width': 0.125,
    'num_classes': 3,
    'image_shape': [8, 8, 2],
    'mean': [0.4, 0.6],
    'std': [0.2, 0.3],
}


@pytest.fixture
def own_file(tmp_path) -> Path:
    save_network(tmp_path / 'own_file.safetensors', trained_variables(create('small_resnet', 3, 0.125)), OURS)
    return tmp_path / 'own_file.safetensors'


def test_a_file_of_dvinv_describes_itself(own_file):
    module, variables, about = read_classifier(own_file, 'small_resnet')
    assert about == OURS
    assert module == create('small_resnet', 3, 0.125)
    jax.tree.map(np.testing.assert_array_equal, variables, trained_variables(module))


@pytest.mark.parametrize(
    ('field', 'value', 'own'),
    [
        ('mean', (0.5, 0.5), (0.4, 0.6)),
        ('std', (0.2,), (0.2, 0.3)),
        ('image_shape', (8, 8, 3), (8, 8, 2)),
        ('width', 0.5, 0.125),
    ],
)
def test_config_values_that_contradict_a_file_of_dvinv_are_refused(own_file, field, value, own):
    with pytest.raises(DvinvError) as caught:
        read_classifier(own_file, 'small_resnet', **{field: value}, field='verifiers[1].network')
    sentence = str(caught.value)
    assert sentence.startswith(f'verifiers[1].{field} is {value}, but {own_file}, a file that dvinv wrote')
    assert f'write verifiers[1].{field}={own}' in sentence


@pytest.mark.parametrize(
    ('network', 'channels', 'default_pixels', 'expected'),
    [
        ('resnet8', 3, ((0.0,) * 3, (1 / 255,) * 3), (0.485, 0.229)),
        ('resnet8', 1, ((0.1,), (0.2,)), (0.1, 0.2)),
        ('wrn16_1', 3, ((0.1,) * 3, (0.2,) * 3), (0.1, 0.2)),
        ('wrn16_1', 3, (), None),
    ],
)
def test_published_weights_take_their_own_pixels(tmp_path, network, channels, default_pixels, expected):
    shape, path = (32, 32, channels), tmp_path / 'weights.npz'
    variables = flatten(trained_variables(create(network, 10, 0.125), shape))
    np.savez(path, **{name: variables[place] for place, name in find_keys(variables, '/', {}).items()})
    given = {'width': 0.125, 'image_shape': shape, 'default_pixels': default_pixels}
    if expected is None:
        with pytest.raises(DvinvError, match=r'^mean is \(\), but of weights for wrn16_1 .* it is not known'):
            read_classifier(path, network, **given)
        return
    about = read_classifier(path, network, **given)[2]
    assert (about['mean'][0], about['std'][0]) == expected
    assert read_classifier(path, network, mean=(0.3,) * channels, **given)[2]['mean'] == (0.3,) * channels


@pytest.mark.parametrize('network', NETWORKS)
def test_known_pixels_are_those_of_a_network_that_others_published(network):
    mean, std = published_pixels(network, 3)
    known = NETWORKS[network].image_shape[0] > 32 or network.startswith('resnet')
    # Of vit_b_16 torchvision and timm publish weights for different pixels.
    assert len(mean) == len(std) == (3 if known and network not in ('resnet20_gn', 'vit_b_16') else 0)
    assert published_pixels(network, 4) == ((), ())


def test_a_file_of_dvinv_with_another_network_is_refused(own_file):
    with pytest.raises(DvinvError, match=f'^{own_file} holds a small_resnet, but verifier.network is resnet20.$'):
        read_classifier(own_file, 'resnet20', field='verifier.network', **PIXELS)


@pytest.mark.parametrize('name', ['none.npz', 'none.safetensors', 'none.pth'])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DvinvError, match=f'{name} is not there'):
        read_classifier(tmp_path / name, 'resnet20', **PIXELS)
