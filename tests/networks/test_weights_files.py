"""Weights files as they come: of any kind, wrapped, quantized, damaged in their values, of another network."""

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden.drawn import draw_state
from safetensors.numpy import save_file

from dvinv.networks import read_classifier, registry, save_network
from dvinv.networks.resnet import CifarResNet
from dvinv.networks.weights import import_weights, read_state_dict
from dvinv.runtime.errors import DvinvError, say_once

SHAPE, PIXELS = (32, 32, 3), {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)}
GOLDEN = Path(__file__).parents[1] / 'golden'
TINY = CifarResNet(10, 1, (4, 8, 16))


@pytest.fixture(scope='module')
def state() -> dict:
    """A PyTorch state dict of `TINY`."""
    with np.load(GOLDEN / 'cifar_resnet_logits.npz', allow_pickle=False) as arrays:
        return {key.removeprefix('state/'): value for key, value in arrays.items() if key.startswith('state/')}


@pytest.fixture(autouse=True)
def _said():
    say_once.cache_clear()


def refusal(state) -> str:
    with pytest.raises(DvinvError) as caught:
        import_weights(TINY, SHAPE, state)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# Values


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('layer1.0.conv1.weight', np.nan, '1 are NaN or infinite'),
        ('linear.bias', -np.inf, '1 are NaN or infinite'),
        ('bn1.running_mean', np.nan, '1 are NaN or infinite'),
        ('layer2.0.bn1.running_var', np.inf, '1 are NaN or infinite'),
        ('layer2.0.bn1.running_var', -1e-3, '1 are negative, though variances'),
    ],
)
def test_values_that_no_network_has_are_refused_by_their_name_in_the_file(state, prefix, key, value, words):
    wrong = {prefix + name: array.copy() for name, array in state.items()}
    wrong[prefix + key].flat[-1] = value
    assert f'Of the {state[key].size} numbers in {prefix}{key}, {words}.' in refusal(wrong)


def test_a_float64_that_float32_cannot_hold_is_refused(state):
    assert 'linear.bias' in refusal(state | {'linear.bias': np.full(10, 1e300)})


def test_a_variance_of_zero_and_a_negative_mean_are_healthy(state):
    state = state | {'bn1.running_var': np.zeros(4), 'bn1.running_mean': -np.ones(4)}
    assert import_weights(TINY, SHAPE, state)['batch_stats']['bn1']['var'].tolist() == [0] * 4


def test_values_in_a_file_of_ones_own_are_looked_at_too(state, tmp_path):
    variables = import_weights(TINY, SHAPE, state)
    variables['params']['linear']['bias'][0] = np.nan
    about = {'network': 'resnet8', 'width': 0.25, 'num_classes': 10, 'image_shape': SHAPE, **PIXELS}
    save_network(tmp_path / 'own.safetensors', variables, about)
    with pytest.raises(DvinvError, match='Of the 10 numbers in params/linear/bias, 1 are NaN'):
        read_classifier(tmp_path / 'own.safetensors', 'resnet8', **PIXELS)


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'bool', 'complex64'])
def test_weights_that_are_no_floats_are_refused(state, dtype):
    wrong = state | {'conv1.weight': state['conv1.weight'].astype(dtype)}
    assert f'not floating-point numbers: conv1.weight ({dtype}). Are they quantized?' in refusal(wrong)


def test_integers_of_another_network_are_not_called_quantized(state):
    assert 'left over blocks.0.index.' in refusal(state | {'blocks.0.index': np.arange(4)})


def test_counters_of_any_name_are_passed_over(state):
    import_weights(TINY, SHAPE, state | {'n_averaged': np.int64(3), 'bn1.num_batches_tracked': np.float32(4)})


# Wrapped keys


@pytest.mark.parametrize(
    'prefix',
    [
        '_orig_mod.',
        'module.',
        'model.',
        'module._orig_mod.',
        'model._orig_mod.',
        'net.backbone.',
        'ema.module.',
        'state_dict.',
    ],
)
def test_what_wraps_a_network_is_left_out_of_the_keys_and_said(state, capsys, prefix):
    wrapped = {prefix + key: value for key, value in state.items()} | {f'{prefix}bn1.num_batches_tracked': np.int64(3)}
    for _ in range(2):
        variables = import_weights(TINY, SHAPE, wrapped, 'x.npz')
    jax.tree.map(np.testing.assert_array_equal, variables, import_weights(TINY, SHAPE, state))
    assert capsys.readouterr().err == f'dvinv: x.npz: {prefix!r} is left out of the keys.\n'


def test_wrappers_within_a_network_are_left_out(state, capsys):
    inner = {key.replace('layer1.', 'layer1._orig_mod.').replace('conv1', 'conv1.module'): v for key, v in state.items()}
    jax.tree.map(np.testing.assert_array_equal, *(import_weights(TINY, SHAPE, s) for s in (state, inner)))
    assert capsys.readouterr().err == 'dvinv: These weights: What wraps its parts is left out of the keys.\n'


@pytest.mark.parametrize('prefix', ['', 'model.', 'module.', '_orig_mod.'])
def test_averaged_copies_and_what_is_trained_beside_a_network_are_said(state, capsys, prefix):
    copies = {f'ema.{prefix}{key}': 2 * value for key, value in state.items()}
    others = {'criterion.weight': np.ones(10, np.float32)} if prefix == 'model.' else {}
    variables = import_weights(TINY, SHAPE, {**copies, **{prefix + key: v for key, v in state.items()}, **others})
    np.testing.assert_array_equal(variables['params']['linear']['bias'], state['linear.bias'])
    assert f'ema.{prefix}bn1.bias' in capsys.readouterr().err.replace('bn1.weight', 'bn1.bias')


def test_of_two_networks_neither_is_taken(state):
    both = {f'{name}.{key}': value for key, value in state.items() for name in ('student', 'teacher')}
    assert 'several such networks, under student., teacher.,' in refusal(both)


def test_a_wrapped_network_is_imported_as_strictly(state):
    wrapped = {f'module.{key}': value for key, value in state.items()}
    assert 'they have left over module.spare.weight.' in refusal(wrapped | {'module.spare.weight': np.ones(1)})
    del wrapped['module.linear.bias']
    assert 'they lack module.linear.bias.' in refusal(wrapped)


def test_keys_that_say_nothing_are_shown(state):
    unknown = {f'm{index}': value for index, value in enumerate(state.values())}
    assert 'The file has m0, m1, m2, m3 and ' in refusal(unknown)


# Another network


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_the_network_that_the_file_is_of_is_named(tmp_path, prefix):
    with np.load(GOLDEN / 'imagenet_logits.npz', allow_pickle=False) as arrays:
        shapes = json.loads(str(arrays['imagenet_vgg16_bn/shapes']))
    np.savez(tmp_path / 'vgg.npz', **{prefix + key: value for key, value in draw_state(shapes, seed=0).items()})
    words = r'do not fit VGG: .*Names and shapes are those of imagenet_vgg16_bn: set teacher\.network to that\.'
    with pytest.raises(DvinvError, match=words):
        read_classifier(tmp_path / 'vgg.npz', 'vgg16_bn', width=0.125, field='teacher.network', **PIXELS)


@pytest.mark.parametrize(('name', 'asked'), [('timm_mobilenet_v1', 'mobilenet_v1'), ('imagenet_vgg11_bn', 'vgg11_bn')])
def test_so_it_is_of_other_families(monkeypatch, tmp_path, name, asked):
    few = ('resnet8', 'cifar_vgg', name, asked)  # to look at all takes seconds
    monkeypatch.setattr(registry, 'NETWORKS', {other: registry.NETWORKS[other] for other in few})
    with np.load(GOLDEN / 'imagenet_logits.npz', allow_pickle=False) as arrays:
        shapes, width = json.loads(str(arrays[f'{name}/shapes'])), float(arrays[f'{name}/width'])
    np.savez(tmp_path / 'weights.npz', **draw_state(shapes, seed=0))
    with pytest.raises(DvinvError, match=rf'Names and shapes are those of {name}: set network to that\.'):
        read_classifier(tmp_path / 'weights.npz', asked, width=width, **PIXELS)


def test_a_file_of_no_network_says_so(monkeypatch, tmp_path, state):
    monkeypatch.setattr(registry, 'NETWORKS', {name: registry.NETWORKS[name] for name in ('resnet8', 'resnet20')})
    np.savez(tmp_path / 'tiny.npz', **state | {'spare': np.ones(2)})
    with pytest.raises(DvinvError, match=r'left over spare\. Is it another depth or another network\?$'):
        read_classifier(tmp_path / 'tiny.npz', 'resnet8', width=0.25, **PIXELS)


# Kinds of files


def archive(*names) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as content:
        for name in names:
            content.writestr(name, 'x')
    return file.getvalue()


def safetensors_of(dtype: str, size: int) -> bytes:
    header = json.dumps({'conv1.weight': {'dtype': dtype, 'shape': [4], 'data_offsets': [0, size]}}).encode()
    return len(header).to_bytes(8, 'little') + header + bytes(size)


@pytest.mark.parametrize(
    ('name', 'content', 'words'),
    [
        ('w.pth', b'', 'it is empty'),
        ('w.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'a pointer of Git LFS'),
        ('w.pth', b'\n<!DOCTYPE html><html>', 'a web page'),
        ('model.safetensors.index.json', b'{\n  "metadata": {"total_size": 3}}', 'a JSON text'),
        ('w.h5', b'\x89HDF\r\n\x1a\n' + bytes(99), 'an HDF5 file'),
        ('w.npz', b'\x89HDF\r\n\x1a\n' + bytes(99), 'an HDF5 file'),
        ('w.keras', archive('metadata.json', 'config.json', 'model.weights.h5'), 'a Keras archive'),
        ('w.gguf', b'GGUF\x03\0\0\0', 'a GGUF file'),
        ('w.onnx', b'\x08\x08\x12\x07pytorch', 'an ONNX graph'),
        ('w.tflite', b'\x1c\0\0\0TFL3', 'a TensorFlow Lite model'),
        ('w.params', b'\x12\x01\0\0\0\0\0\0' + bytes(8), 'a parameter file of MXNet'),
        ('w.msgpack', b'\x82\xa6params\x81\xa5Dense', 'a msgpack file'),
        ('w.pth.tar', b'x' * 257 + b'ustar\0', 'a tar archive'),
        ('w.npz.gz', b'\x1f\x8b\x08\0', 'compressed'),
        ('w.pt', archive('w/code/__torch__.py', 'w/constants.pkl', 'w/data.pkl'), 'a TorchScript archive'),
        ('w.zip', archive('a.txt', 'b.txt'), 'a zip archive of a.txt, b.txt'),
        ('w.npy', b'\x93NUMPY\x01\0', 'a single array'),
        ('w.pth', pickle.dumps({'conv1.weight': [1.0]}), 'a pickle, which could run code'),
        ('w.xyz', b'weights', 'of no known kind'),
    ],
)
def test_what_is_not_read_is_told_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for read in (read_state_dict, lambda path: read_classifier(path, 'resnet20', **PIXELS)):
        with pytest.raises(DvinvError) as caught:
            read(tmp_path / name)
        assert f'{name} cannot be read (it is {words.removeprefix("it is ")}' in str(caught.value)


@pytest.mark.parametrize(('dtype', 'size'), [('F8_E4M3', 4), ('F8_E5M2', 4), ('F4', 2)])
def test_floats_too_small_to_stand_alone_are_refused(tmp_path, dtype, size):
    (tmp_path / 'w.safetensors').write_bytes(safetensors_of(dtype, size))
    with pytest.raises(DvinvError, match=rf'holds quantized weights: conv1\.weight \({dtype}\)'):
        read_state_dict(tmp_path / 'w.safetensors')


@pytest.mark.parametrize(('dtype', 'size'), [('BF16', 8), ('F64', 32)])
def test_other_floats_are_read(tmp_path, dtype, size):
    (tmp_path / 'w.safetensors').write_bytes(safetensors_of(dtype, size))
    assert read_state_dict(tmp_path / 'w.safetensors')['conv1.weight'].astype(np.float32).tolist() == [0] * 4


def test_a_folder_is_told(tmp_path):
    with pytest.raises(DvinvError, match=r'is a folder; name a file in it'):
        read_state_dict(tmp_path)


def test_the_content_counts_and_not_the_ending(tmp_path, state):
    np.savez(tmp_path / 'npz.npz', **state)
    save_file(state, tmp_path / 'weights.bin')
    for name, other in (('npz.npz', 'weights.pth.tar'), ('weights.bin', 'weights.ckpt')):
        (tmp_path / name).rename(tmp_path / other)
        jax.tree.map(np.testing.assert_array_equal, read_state_dict(tmp_path / other), dict(state))


def test_names_of_tensorflow_variables_are_those_of_keras(tmp_path):
    np.savez(tmp_path / 'keras.npz', **{'conv1/kernel:0': np.ones(3)})
    assert [*read_state_dict(tmp_path / 'keras.npz')] == ['conv1/kernel']


# Checkpoints of PyTorch


class Tensor(SimpleNamespace):
    """As much of PyTorch's as reading takes."""

    detach = float = lambda self: self

    def numpy(self):
        return self.array


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """`checkpoint(content, name)`: the path of a file that a stand-in for PyTorch reads as `content`."""

    def checkpoint(content, name='model.ckpt') -> Path:
        torch = SimpleNamespace(load=lambda *_, **__: content, is_tensor=lambda value: isinstance(value, Tensor))
        monkeypatch.setitem(sys.modules, 'torch', torch)
        (tmp_path / name).write_bytes(archive('model/data.pkl', 'model/version'))
        return tmp_path / name

    return checkpoint


def tensors(state, scale=1.0, dtype='torch.float32') -> dict:
    return {key: Tensor(array=scale * value, dtype=dtype) for key, value in state.items()}


TRAINED = {'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': Tensor()}}, 'param_groups': [{'lr': 0.1}]}, 'best': 90.0}


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model_best.pth.tar', 'last.ckpt', 'model.pt', 'weights'])
@pytest.mark.parametrize('place', ['state_dict', 'model', 'net', 'model_state_dict', 'ema', 'model.state_dict'])
def test_the_state_dict_of_a_checkpoint_is_found_and_said(checkpoint, state, capsys, name, place):
    content = tensors(state)
    for key in reversed(place.split('.')):
        content = {**TRAINED, key: content}
    jax.tree.map(np.testing.assert_array_equal, read_state_dict(checkpoint(content, name)), dict(state))
    assert f'{name} is a checkpoint: its {place} is read.' in capsys.readouterr().err


def test_the_trained_weights_come_before_averaged_ones_and_loose_tensors(checkpoint, state, capsys):
    content = {
        'state_dict_ema': tensors(state, 2),
        'state_dict': tensors(state),
        'best': Tensor(array=np.float32(9)),
        **TRAINED,
    }
    read = read_state_dict(checkpoint(content))
    np.testing.assert_array_equal(read['linear.bias'], state['linear.bias'])
    assert 'its state_dict is read; state_dict_ema not.' in capsys.readouterr().err
    content = {'model_ema': {'state_dict': tensors(state, 2)}, 'model': tensors(state)}
    np.testing.assert_array_equal(read_state_dict(checkpoint(content))['linear.bias'], state['linear.bias'])


def test_a_checkpoint_of_several_networks_is_refused(checkpoint, state):
    with pytest.raises(DvinvError, match='several state dicts, generator, critic, and nothing says which is meant'):
        read_state_dict(checkpoint({'generator': tensors(state), 'critic': tensors(state)}))


@pytest.mark.parametrize('dtype', ['qint8', 'float8_e4m3fn'])
def test_quantized_tensors_of_pytorch_are_refused(checkpoint, state, dtype):
    with pytest.raises(DvinvError, match=rf'holds quantized weights: conv1\.weight \({dtype}\), .* and \d+ more'):
        read_state_dict(checkpoint(tensors(state, dtype=f'torch.{dtype}')))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of TorchScript, which PyTorch leaves
def test_pytorch_itself_reads_what_training_leaves(tmp_path, state):
    torch = pytest.importorskip('torch')
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {f'model.{key}': torch.from_numpy(value).bfloat16() for key, value in state.items()}
    content = {'epoch': 3, 'state_dict': state, 'optimizer': optimizer.state_dict(), 'rng': torch.get_rng_state()}
    torch.save(content, tmp_path / 'last.ckpt')
    torch.save(content, tmp_path / 'old.pth.tar', _use_new_zipfile_serialization=False)
    for name in ('last.ckpt', 'old.pth.tar'):
        read = read_state_dict(tmp_path / name)
        assert {array.dtype for array in read.values()} == {np.dtype(np.float32)}
        import_weights(TINY, SHAPE, read)
    torch.jit.script(network).save(tmp_path / 'script.pt')
    with pytest.raises(DvinvError, match='a TorchScript archive'):
        read_state_dict(tmp_path / 'script.pt')
    torch.save(network, tmp_path / 'whole.pth')
    with pytest.raises(DvinvError, match=r'more than tensors \(torch\.nn\.modules\.linear\.Linear\) and could run code'):
        read_state_dict(tmp_path / 'whole.pth')
