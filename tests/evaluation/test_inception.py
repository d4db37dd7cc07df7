"""Inception-v3: PyTorch's logits, published sizes, strict import of files that have an auxiliary head too."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden.drawn import draw_images, draw_state
from safetensors.numpy import save_file

from dvinv.networks import create, image_shape, read_classifier, shapes_of
from dvinv.networks.weights import import_weights
from dvinv.runtime.errors import DvinvError

PIXELS = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
SMALLEST = (75, 75, 3)
AUXILIARY = {  # what published files have beside, for 1,000 classes
    'conv0.conv.weight': [128, 768, 1, 1],
    **{f'conv0.bn.{leaf}': [128] for leaf in ('weight', 'bias', 'running_mean', 'running_var')},
    'conv1.conv.weight': [768, 128, 5, 5],
    **{f'conv1.bn.{leaf}': [768] for leaf in ('weight', 'bias', 'running_mean', 'running_var')},
    'fc.weight': [1000, 768],
    'fc.bias': [1000],
}

with np.load(Path(__file__).parents[1] / 'golden' / 'inception_logits.npz', allow_pickle=False) as arrays:
    GOLDEN = dict(arrays)
SIZE, WIDTH = int(GOLDEN['size']), float(GOLDEN['width'])


@pytest.fixture(scope='module')
def state() -> dict:
    """The weights of golden/inception_logits.npz, of a narrow network."""
    return draw_state(json.loads(str(GOLDEN['shapes'])), seed=0)


@pytest.fixture(scope='module')
def shapes() -> dict:
    """Of the variables of the published network."""
    return shapes_of(create('inception_v3', 1000), SMALLEST)


@pytest.mark.slow
def test_logits_are_those_of_pytorch(state):
    module = create('inception_v3', 10, WIDTH)
    variables = import_weights(module, (SIZE, SIZE, 3), state)
    quickly = {'xla_backend_optimization_level': 0}  # what runs once is not worth optimising
    logits = jax.jit(module.apply, compiler_options=quickly)(variables, draw_images(0, SIZE))
    assert np.abs(logits - GOLDEN['logits']).max() < 1e-4 * np.abs(GOLDEN['logits']).max()


def test_parameters_are_as_many_as_published(shapes):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
    left_aside = sum(np.prod(shape) for key, shape in AUXILIARY.items() if 'running' not in key)
    assert (parameters, parameters + left_aside) == (23_834_568, 27_161_264)


def test_pictures_may_be_of_any_size_that_leaves_a_pixel(shapes):
    module = create('inception_v3', 1000)
    assert image_shape('inception_v3') == (299, 299, 3)
    assert shapes_of(module, image_shape('inception_v3')) == shapes
    with pytest.raises(DvinvError, match='takes images of 75x75 or larger, not 75x74'):
        shapes_of(module, (75, 74, 3))


@pytest.mark.slow
def test_a_file_with_an_auxiliary_head_is_read_without_it(tmp_path, state):
    auxiliary = draw_state({f'AuxLogits.{key}': shape for key, shape in AUXILIARY.items()}, seed=1)
    counters = {key.replace('running_var', 'num_batches_tracked'): np.array(9) for key in state if 'running_var' in key}
    save_file(state | auxiliary | counters, tmp_path / 'inception.safetensors')
    module, variables, about = read_classifier(
        tmp_path / 'inception.safetensors', 'inception_v3', width=WIDTH, image_shape=SMALLEST, **PIXELS
    )
    assert about['num_classes'] == 10
    assert module == create('inception_v3', 10, WIDTH)
    np.testing.assert_array_equal(variables['params']['fc']['kernel'], state['fc.weight'].T)
    row, key = variables['params']['Mixed_6b']['branch7x7_2']['conv']['kernel'], 'Mixed_6b.branch7x7_2.conv.weight'
    np.testing.assert_array_equal(row, state[key].transpose(2, 3, 1, 0))
    assert len(jax.tree.leaves(variables)) == len(state)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'Mixed_5b.branch5x5_1.conv.weight': None}, r'lack Mixed_5b\.branch5x5_1\.conv\.weight\.'),
        ({'AuxLogit.fc.bias': np.zeros(1)}, r'left over AuxLogit\.fc\.bias\.'),
    ],
)
def test_a_missing_and_an_extra_tensor_are_named(state, change, words):
    changed = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(DvinvError, match=f'do not fit InceptionV3: .*{words}'):
        import_weights(create('inception_v3', 10, WIDTH), SMALLEST, changed)
