"""Networks: by name and width, as files, their identity, their pixels, and what they cost."""

import contextlib
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smoke import flip
from tiny import IMAGE_SHAPE, pixels_only, tiny_teacher, trained_variables

from dvinv.evaluation import accuracy, flops, logits_of, top_accuracy
from dvinv.networks import NETWORKS, Classifier, create, image_shape, load_classifier, load_network, save_network
from dvinv.runtime.errors import DvinvError

SMALL = ('small_convnet', 'small_resnet')
ABOUT = {
    'network': 'small_resnet',
    'width': 0.125,
    'num_classes': 3,
    'image_shape': IMAGE_SHAPE,
    'mean': (0.4, 0.6),
    'std': (0.2, 0.3),
}


@pytest.fixture
def variables():
    return trained_variables(create('small_resnet', 3, 0.125))


@pytest.fixture
def path(tmp_path, variables):
    path = tmp_path / 'networks' / 'student.safetensors'
    save_network(path, variables, ABOUT)
    return path


def classifier(module, image_shape=IMAGE_SHAPE):
    channels = image_shape[-1]
    return Classifier(
        lambda v, x: module.apply(v, x),
        trained_variables(module, image_shape),
        image_shape,
        3,
        (0.5,) * channels,
        (0.5,) * channels,
    )


# By name


def test_names_are_those_that_the_small_networks_have():
    assert set(SMALL) <= set(NETWORKS)


@pytest.mark.parametrize('name', SMALL)
def test_a_network_gives_a_logit_a_class(name):
    module = create(name, 7)
    shapes = jax.eval_shape(lambda k, x: module.init_with_output(k, x), jax.random.key(0), jnp.zeros((5, 8, 8, 1)))
    assert shapes[0].shape == (5, 7)
    assert 'batch_stats' in shapes[1]


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('width', [0.25, 2.0])
def test_width_multiplies_every_channel_but_the_classes(name, width):
    def last_axes(width):
        leaves = trained_variables(create(name, 7, width), (8, 8, 1))['params']
        return [leaf.shape[-1] for leaf in jax.tree.leaves(leaves)]

    assert [n if n == 7 else width * n for n in last_axes(1.0)] == last_axes(width)


def test_no_width_is_too_small_for_a_channel():
    assert min(min(leaf.shape) for leaf in jax.tree.leaves(trained_variables(create('small_resnet', 2, 1e-3)))) == 1


@pytest.mark.parametrize('width', [0.0, -1.0, float('nan'), float('inf')])
def test_no_width_is_refused(width):
    with pytest.raises(DvinvError, match=f'width of small_resnet is {width}; it must be above 0'):
        create('small_resnet', 3, width)


def test_an_unknown_name_shows_the_choices():
    for ask in (lambda: create('resnet19', 3), lambda: image_shape('resnet19')):
        with pytest.raises(DvinvError, match=r"no network 'resnet19'; choose one of .*small_convnet, small_resnet"):
            ask()


def test_a_network_knows_the_images_that_it_is_made_for():
    assert image_shape('resnet20') == (32, 32, 3)
    assert image_shape('small_resnet') == (8, 8, 1)


# As files


def test_a_file_gives_back_every_bit(path, variables):
    loaded, about = load_network(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert about == {**ABOUT, 'image_shape': list(IMAGE_SHAPE), 'mean': [0.4, 0.6], 'std': [0.2, 0.3]}


def test_equal_networks_make_equal_files(path, tmp_path, variables):
    save_network(tmp_path / 'again', variables, dict(reversed(ABOUT.items())))
    assert (tmp_path / 'again').read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_loaded_classifier_is_the_network(path, variables):
    network = load_classifier(path)
    x = np.random.default_rng(0).normal(size=(2, *IMAGE_SHAPE)).astype(np.float32)
    expected = create('small_resnet', 3, 0.125).apply(variables, x, train=False)
    np.testing.assert_array_equal(network.apply_fn(network.variables, x), expected)
    assert (network.image_shape, network.num_classes, network.mean, network.std) == (IMAGE_SHAPE, 3, (0.4, 0.6), (0.2, 0.3))


def test_safetensors_alone_reads_the_file(path, variables):
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(path)['params/Dense_1/bias'], variables['params']['Dense_1']['bias'])


@pytest.mark.slow
def test_any_flipped_byte_is_found(path, variables):
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], 'little') + 8
    for position in [*range(header), *range(header, len(whole), 1009), len(whole) - 1]:
        flip(path, position)
        with contextlib.suppress(DvinvError):
            loaded, about = load_network(path)
            assert chr(whole[position]).isspace()
            assert about['width'] == 0.125
            jax.tree.map(np.testing.assert_array_equal, loaded, variables)
        path.write_bytes(whole)


@pytest.mark.parametrize('length', [0, 5, 100, -1])
def test_a_truncated_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DvinvError, match=r'is damaged, or no safetensors file.*if dvinv made it, delete it'):
        load_network(path)


def test_a_file_of_others_is_refused(path):
    from safetensors.numpy import save_file

    save_file({'a': np.zeros(3, np.float32)}, path)
    with pytest.raises(DvinvError, match=f'{path} is a safetensors file, but dvinv did not write it'):
        load_network(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DvinvError, match=r'none\.safetensors is not there'):
        load_classifier(tmp_path / 'none.safetensors')


# Identity


def test_a_digest_is_that_of_weights_and_normalisation():
    teacher = tiny_teacher()
    digest = teacher.digest()
    assert digest == tiny_teacher().digest()
    assert dataclasses.replace(teacher, mean=(0.4, 0.61)).digest() != digest
    for collection in ('params', 'batch_stats'):
        changed = tiny_teacher()
        leaf = jax.tree.leaves(changed.variables[collection])[-1]
        leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(9))
        assert changed.digest() != digest


# Pixels


@pytest.mark.parametrize('mean_and_std', [(0.5, 0.5), (0.3053, 0.3761), (0.485, 0.229), (0.0, 1.0), (0.9, 3.0)])
@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_every_pixel_value_survives_normalising_and_back(mean_and_std, array):
    mean, std = mean_and_std
    network = pixels_only((16, 16, 1), 2, (mean,), (std,))
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = network.normalise(array(pixels))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(network.to_uint8(x), pixels)
    np.testing.assert_allclose([x.min(), x.max()], np.ravel(network.valid_range), rtol=1e-6, atol=1e-6)


def test_channels_have_their_own_mean_and_std():
    network = pixels_only((1, 1, 2), 2, (0.0, 1.0), (1.0, 0.5))
    np.testing.assert_allclose(network.normalise(jnp.full((1, 1, 2), 255, jnp.uint8)).ravel(), [1.0, 0.0])


def test_values_beyond_the_range_are_cut():
    network = pixels_only((1, 2, 1), 2, (0.5,), (0.5,))
    np.testing.assert_array_equal(network.to_uint8(np.array([-9.0, 9.0]).reshape(1, 1, 2, 1)).ravel(), [0, 255])


# Accuracy


def test_top_accuracy_counts_labels_among_the_highest():
    logits = np.array([[3.0, 2, 1], [1, 2, 3], [1, 3, 2], [2, 1, 3]])
    labels = np.array([0, 0, 0, 0])
    assert [top_accuracy(logits, labels, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]


def test_padding_of_the_last_batch_changes_no_logit():
    network = tiny_teacher()
    images = np.random.default_rng(0).integers(0, 256, (11, *IMAGE_SHAPE), dtype=np.uint8)
    whole = logits_of(network, images)
    assert whole.shape == (11, 3)
    np.testing.assert_allclose(logits_of(network, images, 4), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits_of(network, images, 4)[:8], logits_of(network, images[:8], 4))
    assert accuracy(network, images, whole.argmax(1)) == 1.0


# Cost


class Counted(nn.Module):
    """A strided convolution with a bias, a grouped one, a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x))  # [4, 4, 6] from 2 channels
        x = nn.Conv(6, (3, 3), feature_group_count=3)(x)  # [4, 4, 6], each from 2 channels
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


COUNTED = 2 * (4 * 4 * 6) * (3 * 3 * 2) + 2 * (4 * 4 * 6) * (3 * 3 * 2) + 2 * 96 * 3


class Scanned(nn.Module):
    """Five dense layers of 4 to 4, under scan."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return nn.relu(layer(x)), None

        x, _ = nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True}, length=5)(
            nn.Dense(4), x.reshape(x.shape[0], -1), None
        )
        return x


def test_flops_are_two_a_multiply_add():
    assert flops(classifier(Counted())) == COUNTED


def test_flops_inside_remat_and_jit_count_once():
    assert flops(classifier(nn.remat(Counted)())) == COUNTED
    assert flops(classifier(nn.jit(Counted)())) == COUNTED


def test_flops_inside_a_scan_count_as_often_as_it_runs():
    assert flops(classifier(Scanned(), (2, 2, 1))) == 5 * 2 * 4 * 4


def test_parameters_are_the_trained_numbers():
    network = classifier(Counted())
    assert network.parameters == (3 * 3 * 2 * 6 + 6) * 2 + 96 * 3 + 3
