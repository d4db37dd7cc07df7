"""Published CIFAR ResNets: PyTorch's logits, and strict import."""

from pathlib import Path

import numpy as np
import pytest

from dvinv import from_linen
from dvinv.evaluation import logits_of, top_accuracy
from dvinv.networks.resnet import CifarResNet
from dvinv.networks.weights import import_weights, read_state_dict
from dvinv.runtime.errors import DvinvError

SHAPE = (32, 32, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def golden() -> dict:
    with np.load(Path(__file__).parents[1] / 'golden' / 'cifar_resnet_logits.npz', allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture
def state(golden) -> dict:
    """The PyTorch state dict of a small ResNet-8."""
    return {key.removeprefix('state/'): value for key, value in golden.items() if key.startswith('state/')}


def teacher_of(module, state):
    return from_linen(module, import_weights(module, SHAPE, state), image_shape=SHAPE, mean=MEAN, std=STD)


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_random_weights_give_the_logits_of_pytorch(golden, state):
    teacher = teacher_of(CifarResNet(10, 1, (4, 8, 16)), state)
    assert_close(logits_of(teacher, golden['images']), golden['random'])


@pytest.mark.slow
@pytest.mark.parametrize(('depth', 'right'), [(20, 915), (32, 928)])
def test_published_weights_give_the_logits_of_pytorch(golden, real_data, depth, right):
    teacher = teacher_of(CifarResNet(10, (depth - 2) // 6), read_state_dict(real_data / f'cifar10_resnet{depth}.npz'))
    with np.load(real_data / 'cifar10_lossless_test1000.npz', allow_pickle=False) as test:
        images, labels = test['x'], test['y']
    logits = logits_of(teacher, images)
    assert_close(logits[:16], golden[f'resnet{depth}'])
    assert round(1000 * top_accuracy(logits, labels)) == right


def test_weights_of_another_depth_are_refused(state):
    with pytest.raises(DvinvError, match=r'lack layer1\.1\.bn1\.bias'):
        import_weights(CifarResNet(10, 2, (4, 8, 16)), SHAPE, state)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(state):
    module = CifarResNet(10, 1, (4, 8, 16))
    without = {key: value for key, value in state.items() if key != 'linear.bias'}
    with pytest.raises(DvinvError, match=r'lack linear\.bias'):
        import_weights(module, SHAPE, without)
    with pytest.raises(DvinvError, match=r'left over spare\.weight'):
        import_weights(module, SHAPE, {**state, 'spare.weight': np.zeros(1)})
    with pytest.raises(DvinvError, match=r'shapes.*bn1\.bias \(3,\)\.'):
        import_weights(module, SHAPE, {**state, 'bn1.bias': np.zeros(3)})


def test_prefixes_and_counters_of_pytorch_are_understood(state):
    module = CifarResNet(10, 1, (4, 8, 16))
    wrapped = {f'module.{key}': value for key, value in state.items()}
    import_weights(module, SHAPE, wrapped | {'module.bn1.num_batches_tracked': np.zeros((), np.int64)})


def test_files_that_are_missing_unknown_or_could_run_code_are_refused(tmp_path, state):
    with pytest.raises(DvinvError, match='not there'):
        read_state_dict(tmp_path / 'none.npz')
    (tmp_path / 'weights.h6').write_bytes(b'?')
    with pytest.raises(DvinvError, match=r'\(it is of no known kind\): dvinv reads a PyTorch state dict .*\(\.npz\)'):
        read_state_dict(tmp_path / 'weights.h6')
    (tmp_path / 'cut.safetensors').write_bytes(b'\x08')
    with pytest.raises(DvinvError, match='cannot be read'):
        read_state_dict(tmp_path / 'cut.safetensors')
    np.savez(tmp_path / 'objects.npz', weights=np.array([object()], object))
    with pytest.raises(DvinvError, match=r'objects\.npz holds Python objects \(weights\), which could run code'):
        read_state_dict(tmp_path / 'objects.npz')
