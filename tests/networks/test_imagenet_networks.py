"""The ImageNet networks: PyTorch's logits, Keras's and Gluon's names, strict import, and real photos."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from golden.drawn import draw_images, draw_state
from safetensors.numpy import save_file

from dvinv import from_linen
from dvinv.config import DataSettings
from dvinv.data.real import load_real
from dvinv.evaluation import logits_of, top_accuracy
from dvinv.networks import classifier_of, create, image_shape, read_classifier, shapes_of
from dvinv.networks.weights import import_weights, read_state_dict
from dvinv.runtime.errors import DvinvError

PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
SYMMETRIC = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
SHAPE = (32, 32, 3)

with np.load(Path(__file__).parents[1] / 'golden' / 'imagenet_logits.npz', allow_pickle=False) as arrays:
    GOLDEN = dict(arrays)
SIZE = int(GOLDEN['size'])


def named_as_keras(state: dict) -> dict:
    """A state dict of PyTorch in the names and layouts of Keras."""
    names = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'moving_mean', 'running_var': 'moving_variance'}

    def renamed(key: str, tensor: np.ndarray):
        layer, leaf = key.split('.')
        if layer.endswith('_bn'):
            return f'{layer}/{names[leaf]}', tensor
        if layer.startswith('conv_dw'):
            return f'{layer}/depthwise_kernel', tensor.transpose(2, 3, 0, 1)
        return (f'{layer}/kernel', tensor.transpose(2, 3, 1, 0)) if leaf == 'weight' else (f'{layer}/bias', tensor)

    return dict(renamed(key, tensor) for key, tensor in state.items())


def named_as_gluon(state: dict) -> dict:
    """A state dict of PyTorch in the names of Gluon."""
    return {f'squeezenet0_{key.replace(".", "_")}': tensor for key, tensor in state.items()}


NAMED = {'mobilenet_v1': named_as_keras, 'squeezenet1_1': named_as_gluon, 'timm_mobilenet_v1': dict}
HEADS = {'mobilenet_v1': 'conv_preds', 'squeezenet1_1': 'conv25', 'timm_mobilenet_v1': 'classifier'}


def narrow_state(name: str, num_classes: int = 10) -> dict:
    """The weights of golden/imagenet_logits.npz as the file of `name` has them."""
    shapes = json.loads(str(GOLDEN[f'{name}/shapes']))
    shapes = {key: [num_classes, *shape[1:]] if key.startswith(HEADS[name]) else shape for key, shape in shapes.items()}
    return NAMED[name](draw_state(shapes, seed=0))


def named_as_torchvision(state: dict) -> dict:
    """The weights of a SqueezeNet in the names of torchvision."""
    fires = [f'features.{place}' for place in (3, 4, 6, 7, 9, 10, 11, 12)]
    layers = [f'{fire}.{layer}' for fire in fires for layer in ('squeeze', 'expand1x1', 'expand3x3')]
    names = ['features.0', *layers, 'classifier.1']
    parts = [(key, *re.fullmatch(r'squeezenet0_conv(\d+)_(\w+)', key).groups()) for key in state]
    return {f'{names[int(index)]}.{leaf}': state[key] for key, index, leaf in parts}


def size_of(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# What they compute


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMED)
def test_logits_are_those_of_pytorch(name):
    module = create(name, 10, float(GOLDEN[f'{name}/width']))
    variables = import_weights(module, (SIZE, SIZE, 3), narrow_state(name))
    logits, expected = jax.jit(module.apply)(variables, draw_images(0, SIZE)), GOLDEN[f'{name}/logits']
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.optimized  # runs much longer than it compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'file', 'width', 'pixels', 'step', 'top1', 'top5'),
    [
        # Every fifth photo, because a CPU takes a tenth of a second for one; of all 1,000 they know 0.815 and 0.954, and
        # 0.608 and 0.828.
        ('mobilenet_v1', 'imagenet_mobilenet_v1_075_224.npz', 0.75, SYMMETRIC, 5, 0.83, 0.965),
        ('squeezenet1_1', 'imagenet_squeezenet1.1.npz', 1.0, PIXELS, 5, 0.645, 0.84),
    ],
)
def test_published_weights_know_real_photos(real_data, name, file, width, pixels, step, top1, top5):
    classifier = classifier_of(*read_classifier(real_data / file, name, width=width, **pixels))
    photos = load_real(DataSettings('npz', str(real_data / 'imagenet_sample_1000_224px.npz'))).test
    logits, labels = logits_of(classifier, photos.images[::step], 50), photos.labels[::step]
    assert abs(top_accuracy(logits, labels) - top1) < 0.003
    assert abs(top_accuracy(logits, labels, 5) - top5) < 0.003


def test_a_squeezenet_of_torchvision_is_that_of_gluon(tmp_path):
    state = narrow_state('squeezenet1_1')
    np.savez(tmp_path / 'gluon.npz', **state)
    save_file(named_as_torchvision(state), tmp_path / 'torchvision.safetensors')
    (_, gluon, _), (_, torchvision, about) = (
        read_classifier(tmp_path / name, 'squeezenet1_1', width=0.25, **PIXELS)
        for name in ('gluon.npz', 'torchvision.safetensors')
    )
    assert about['num_classes'] == 10
    jax.tree.map(np.testing.assert_array_equal, gluon, torchvision)


def test_a_published_squeezenet_is_read_in_the_names_of_torchvision(real_data):
    state = read_state_dict(real_data / 'imagenet_squeezenet1.1.npz')
    module = create('squeezenet1_1', 1000)
    renamed = named_as_torchvision(state)
    assert {'features.0.weight', 'features.3.squeeze.weight', 'features.12.expand3x3.bias'} < renamed.keys()
    jax.tree.map(np.testing.assert_array_equal, *(import_weights(module, (224, 224, 3), s) for s in (state, renamed)))


def test_squeezenet_drops_features_in_training():
    module = create('squeezenet1_1', 10, 0.25)
    variables, x = import_weights(module, SHAPE, narrow_state('squeezenet1_1')), draw_images(0)
    train = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={'dropout': key}))
    assert np.any(train(jax.random.key(0)) != train(jax.random.key(1)))


def test_a_picture_too_small_for_a_squeezenet_is_told():
    module = create('squeezenet1_1', 10)
    assert shapes_of(module, (31, 31, 3)) == shapes_of(module, image_shape('squeezenet1_1'))
    with pytest.raises(DvinvError, match='takes images of 31x31 or larger, not 30x31'):
        shapes_of(module, (30, 31, 3))


@pytest.mark.parametrize('size', [(1, 1), (7, 9), (32, 32)])
def test_mobilenet_takes_pictures_of_any_size(size):
    module = create('mobilenet_v1', 10)
    image = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
    logits, variables = jax.eval_shape(lambda k, x: module.init_with_output(k, x), jax.random.key(0), image)
    assert logits.shape == (2, 10)
    assert variables == shapes_of(module, image_shape('mobilenet_v1'))


# What they are made of


@pytest.mark.parametrize(
    ('name', 'trained', 'running'), [('mobilenet_v1', 4_231_976, 4_253_864 - 4_231_976), ('squeezenet1_1', 1_235_496, 0)]
)
def test_parameters_are_as_many_as_published(name, trained, running):
    assert image_shape(name) == (224, 224, 3)
    shapes = shapes_of(create(name, 1000), image_shape(name))
    assert (size_of(shapes['params']), size_of(shapes.get('batch_stats', {}))) == (trained, running)


def test_mobilenet_of_three_quarters():
    assert create('mobilenet_v1', 1000, 0.75).channels == (24, 48, 96, 96, 192, 192, *[384] * 6, 768, 768)


def test_the_tap_finds_the_batch_norms_of_mobilenet_in_forward_order():
    module = create('mobilenet_v1', 10)
    teacher = from_linen(module, shapes_of(module, SHAPE), image_shape=SHAPE, **SYMMETRIC)
    pairs = [f'conv_{kind}_{pair}_bn' for pair in range(1, 14) for kind in ('dw', 'pw')]
    assert teacher.tap.layers == ('conv1_bn', *pairs)
    assert len(teacher.tap.layers) == 27


# Their weights from files


@pytest.mark.parametrize('name', NAMED)
def test_the_number_of_classes_is_read_off_the_head(tmp_path, name):
    np.savez(tmp_path / 'weights.npz', **narrow_state(name, 7))
    module, _, about = read_classifier(tmp_path / 'weights.npz', name, width=0.25, **PIXELS)
    assert about == {'network': name, 'width': 0.25, 'num_classes': 7, 'image_shape': (224, 224, 3), **PIXELS}
    assert module == create(name, 7, 0.25)


@pytest.mark.parametrize(
    ('name', 'change', 'words'),
    [
        ('mobilenet_v1', {'conv_dw_3_bn/beta': None}, 'MobileNetV1: they lack conv_dw_3_bn/beta'),
        ('mobilenet_v1', {'conv_dw_14/depthwise_kernel': np.zeros(1)}, 'they have left over conv_dw_14/depthwise_kernel'),
        ('mobilenet_v1', {'conv_preds/bias': np.zeros(3)}, r'other shapes than expected have conv_preds/bias \(3,\)'),
        ('squeezenet1_1', {'squeezenet0_conv3_bias': None}, r'SqueezeNet: they lack squeezenet0_conv3_bias\.'),
        ('squeezenet1_1', {'squeezenet0_conv26_bias': np.zeros(1)}, r'they have left over squeezenet0_conv26_bias\.'),
        ('squeezenet1_1', {'squeezenet1_conv0_bias': np.zeros(1)}, r'they have left over squeezenet1_conv0_bias\.'),
        ('squeezenet1_1', {'squeezenet0_conv3_bias': np.zeros(3)}, r'expected have squeezenet0_conv3_bias \(3,\)\.'),
    ],
)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(name, change, words):
    state = {key: value for key, value in (narrow_state(name) | change).items() if value is not None}
    with pytest.raises(DvinvError, match=words):
        import_weights(create(name, 10, 0.25), SHAPE, state)


@pytest.mark.parametrize(
    ('name', 'other', 'words'),
    [
        ('squeezenet1_1', 'mobilenet_v1', r'SqueezeNet: they lack conv0/bias, .* and 39 more\.'),
        ('mobilenet_v1', 'squeezenet1_1', r'MobileNetV1: they lack squeezenet0_conv1_bn_beta, .*_conv1_bn_running_mean, '),
    ],
)
def test_weights_of_the_other_network_are_refused(name, other, words):
    with pytest.raises(DvinvError, match=words):
        import_weights(create(name, 10, 0.25), SHAPE, narrow_state(other))


def test_gluon_may_have_counted_on_before_it_saved():
    module, state = create('squeezenet1_1', 10, 0.25), narrow_state('squeezenet1_1')
    again = {key.replace('squeezenet0', 'squeezenet12'): tensor for key, tensor in state.items()}
    jax.tree.map(np.testing.assert_array_equal, *(import_weights(module, SHAPE, s) for s in (state, again)))
