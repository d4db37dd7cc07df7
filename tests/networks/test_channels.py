"""Channels: which can only go together, what they cost, and that a network without some computes what it did with zeros."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TinyNet, trained_variables

from dvinv import DvinvError, evaluation
from dvinv.inversion import from_linen
from dvinv.networks import NETWORKS, channel_groups, classifier_of, create, load_classifier, save_network
from dvinv.networks.channel_groups import find_channels
from dvinv.networks.pruned import PrunedModule
from dvinv.networks.vision_transformer import VisionTransformer

# One network of every family: its width, and the size of its pictures.
FAMILIES = {
    'resnet20': (0.5, 32),
    'cifar_resnet18': (0.125, 32),
    'vgg11_bn': (0.125, 32),
    'wrn16_2': (0.5, 32),
    'resnet50': (0.125, 64),
    'imagenet_vgg16_bn': (0.0625, 32),
    'mobilenet_v1': (0.25, 64),
    'timm_mobilenet_v1': (0.25, 64),
    'mobilenet_v2': (0.25, 64),
    'inception_v3': (0.125, 75),
    'squeezenet1_1': (0.25, 64),
    'convnext_tiny': (0.0625, 32),
    'small_vit': (0.5, 8),
    'small_resnet': (0.5, 8),
    'small_convnet': (0.5, 8),
}
FEW = {'convnext_tiny': {'blocks': (1, 1, 1, 1)}, 'small_vit': {'depth': 1}}  # blocks, where one is like another


def pruned(module, image_shape, share=0.4, seed=0):
    """(channels, keep, variables, `PrunedModule`, its variables): about this share of the groups gone, by chance."""
    channels, variables = find_channels(module, image_shape), trained_variables(module, image_shape)
    keep = np.random.default_rng(seed).random(channels.count) >= share
    return channels, keep, variables, PrunedModule(module, channels.kept(keep)), channels.sliced(keep, variables)


def compiled(module):
    return jax.jit(lambda v, x: module.apply(v, x, train=False))


def test_the_families_are_all():
    assert {NETWORKS[name].family for name in FAMILIES} == {network.family for network in NETWORKS.values()}


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_a_sliced_network_computes_what_the_masked_one_does(name):
    width, size = FAMILIES[name]
    module, image_shape = create(name, 7, width).clone(**FEW.get(name, {})), (size, size, NETWORKS[name].image_shape[2])
    channels, keep, variables, pruned_module, pruned_variables = pruned(module, image_shape)
    x = np.random.default_rng(1).normal(size=(2, *image_shape)).astype(np.float32)
    full = compiled(module)
    masked, sliced = full(channels.masked(keep, variables), x), compiled(pruned_module)(pruned_variables, x)
    assert np.abs(sliced - masked).max() <= 1e-5 * np.abs(masked).max()
    assert np.abs(sliced - full(variables, x)).max() > 1e-2 * np.abs(masked).max()  # they did something
    assert jax.tree.map(np.shape, jax.eval_shape(pruned_module.init, jax.random.key(0), x)) == jax.tree.map(
        np.shape, pruned_variables
    )
    # Exact costs, against the program and the arrays.
    network = classifier_of(
        pruned_module, pruned_variables, {'image_shape': image_shape, 'num_classes': 7, 'mean': (0,), 'std': (1,)}
    )
    assert channel_groups.flops(channels).total(keep) == evaluation.flops(network)
    assert channel_groups.parameters(channels).total(keep) == network.parameters


def test_option_a_shortcuts_tie_stages_by_their_channel_map():
    channels = find_channels(create('resnet20', 10, 0.5), (32, 32, 3))
    first, second, third = (channels.layers[f'layer{stage}_2/conv2'] for stage in (1, 2, 3))
    np.testing.assert_array_equal(first, second[4:12])  # 8 channels become 16, four zeros on either side
    np.testing.assert_array_equal(second, third[8:24])
    assert len({*third} - {*second}) == 16


@pytest.mark.slow
def test_a_pruned_network_learns_like_the_masked_one():
    module, x = TinyNet(), np.random.default_rng(2).normal(size=(6, 8, 8, 2)).astype(np.float32)
    channels, keep, variables, pruned_module, pruned_variables = pruned(module, (8, 8, 2))

    def gradients(module, variables):
        def loss(variables):
            logits, changed = module.apply(variables, x, train=True, mutable=['batch_stats'])
            return jnp.square(logits).sum(), changed

        gradient, changed = jax.jit(jax.grad(loss, has_aux=True))(variables)
        return {'params': gradient['params'], 'batch_stats': changed['batch_stats']}

    of_pruned, of_masked = (
        gradients(pruned_module, pruned_variables),
        channels.sliced(keep, gradients(module, channels.masked(keep, variables))),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), of_pruned, of_masked)


@pytest.mark.slow
def test_the_tap_listens_to_a_pruned_network():
    _, keep, _, pruned_module, pruned_variables = pruned(TinyNet(), (8, 8, 2))
    teacher = from_linen(pruned_module, pruned_variables, image_shape=(8, 8, 2), mean=(0, 0), std=(1, 1))
    x = np.random.default_rng(3).normal(size=(4, 8, 8, 2)).astype(np.float32)
    logits, moments = teacher.tap(pruned_variables, x)
    np.testing.assert_allclose(logits, pruned_module.apply(pruned_variables, x), rtol=1e-5)
    assert sum(len(mean) for mean, _ in moments.values()) == keep.sum()
    np.testing.assert_allclose(
        moments['BatchNorm_0'][0], teacher.features(pruned_variables, x)[1]['BatchNorm_0'][0].mean((0, 1, 2)), 1e-4
    )


@pytest.mark.slow
def test_a_pruned_network_is_saved_with_its_widths(tmp_path):
    module = create('small_convnet', 3, 0.25)
    channels, keep, _, pruned_module, pruned_variables = pruned(module, (8, 8, 1))
    about = {
        'network': 'small_convnet',
        'width': 0.25,
        'num_classes': 3,
        'image_shape': (8, 8, 1),
        'mean': (0,),
        'std': (1,),
    }
    save_network(tmp_path / 'small.safetensors', pruned_variables, {**about, 'kept': channels.kept(keep)})
    loaded = load_classifier(tmp_path / 'small.safetensors')
    x = np.random.default_rng(4).normal(size=(2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(loaded.apply_fn(loaded.variables, x), pruned_module.apply(pruned_variables, x))
    np.testing.assert_array_equal(channels.keep_mask(channels.kept(keep)), keep)


@pytest.mark.parametrize(
    ('kept', 'sentence'),
    [
        ({'Conv_9': [0]}, 'Conv_9'),
        ({'Conv_0': [0, 99]}, 'no 99'),
        ({'layer1_0/conv2': [0, 1]}, 'must be removed together'),
    ],
)
def test_channels_that_cannot_be_left_are_refused(kept, sentence):
    module = create('resnet20', 3, 0.25) if 'layer1_0/conv2' in kept else TinyNet()
    channels = find_channels(module, (8, 8, 3))
    if 'layer1_0/conv2' in kept:
        kept = {**kept, 'conv1': range(4)}  # which would go with them
    with pytest.raises(DvinvError, match=sentence):
        channels.keep_mask(kept)


def test_of_a_vision_transformer_hidden_channels_can_go_and_what_keeps_the_others_is_named():
    channels = find_channels(VisionTransformer(3, channels=8, depth=1, patch=2, head=4, token=False), (8, 8, 2))
    assert {layer: len({*groups}) for layer, groups in channels.layers.items()} == {'blocks_0/mlp/fc1': 32}
    kept_by = {(pin.operation, pin.module.removeprefix('VisionTransformer/blocks_0/')) for pin in channels.pins}
    assert {('reduce_sum', 'norm1'), ('reduce_sum', 'norm2'), ('reshape', 'attn')} <= kept_by


class Stacked(nn.Module):
    """A network with something in its middle."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = self.middle(nn.Conv(8, (3, 3), name='first')(x))
        return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 3), name='second')(x)).mean((1, 2)))


class Gated(nn.Module):
    """Pixels are weighed by a channel of their own."""

    @nn.compact
    def __call__(self, x):
        return x * nn.sigmoid(nn.Conv(1, (1, 1), use_bias=False)(x))


class Scanned(nn.Module):
    """Something that the analysis cannot look into."""

    @nn.compact
    def __call__(self, x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry), None), x, length=3)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('middle', 'count'),
    [
        (nn.Conv(8, (3, 3), feature_group_count=4), 2 + 2 + 6),  # of groups, all lose the same of their two channels
        (nn.Conv(16, (3, 3), feature_group_count=8), 8 + 6),
        (nn.LayerNorm(), 6),  # takes all channels at once
        (Gated(), 8 + 6),  # one channel that meets all others
        (Scanned(), 6),
    ],
)
def test_a_users_own_module_is_followed_as_far_as_it_goes(middle, count):
    module = Stacked(middle)
    channels, keep, variables, pruned_module, pruned_variables = pruned(module, (8, 8, 2))
    assert channels.count == count
    x = np.random.default_rng(5).normal(size=(2, 8, 8, 2)).astype(np.float32)
    masked = module.apply(channels.masked(keep, variables), x)
    np.testing.assert_allclose(pruned_module.apply(pruned_variables, x), masked, atol=1e-5 * np.abs(masked).max())


def test_a_network_that_cannot_be_followed_is_refused_by_the_operation():
    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.Dense(3)(Scanned()(nn.Conv(8, (3, 3))(x)).mean((1, 2)))

    with pytest.raises(DvinvError, match='scan in Whole/Scanned_0'):
        find_channels(Whole(), (8, 8, 2))
