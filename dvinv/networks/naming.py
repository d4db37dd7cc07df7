"""What PyTorch, Keras and Gluon (MXNet) call the variables of a Flax network, and how they lay them out.

Flax       params/layer1_0/conv1/kernel    batch_stats/layer1_0/bn1/mean
PyTorch    layer1.0.conv1.weight           layer1.0.bn1.running_mean
Keras      layer1_0/conv1/kernel           layer1_0/bn1/moving_mean
Gluon      resnet0_layer1_0_conv1_weight   resnet0_layer1_0_bn1_running_mean
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

# Flax's names of leaves, and theirs. Keras has two for a kernel, and others for what BatchNorm has.
PYTORCH = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
KERAS = {'kernel': ('kernel', 'depthwise_kernel'), 'bias': ('bias',)}
KERAS_BATCH_NORM = {'scale': ('gamma',), 'bias': ('beta',), 'mean': ('moving_mean',), 'var': ('moving_variance',)}
GLUON = {'kernel': ('weight',), 'bias': ('bias',)}
GLUON_BATCH_NORM = {'scale': ('gamma',), 'bias': ('beta',), 'mean': ('running_mean',), 'var': ('running_var',)}
# 'squeezenet0_conv0_weight': the network's name comes first, numbered as the process that saved it happened to count.
GLUON_KEY = re.compile(r'([a-z]+\d+_)\w+_(weight|bias|gamma|beta|running_mean|running_var)')


def find_keys(paths: Collection[str], keys: Collection[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """{path: the key that it goes by}; a key that is not among `keys` is the usual one.

    Args:
      paths: of a network's variables in Flax.
      keys: those of a file; Keras's have slashes, PyTorch's have dots, Gluon's have neither and one prefix.
      aliases: {name of a submodule: what other PyTorch repositories call it}.
    """
    keras, prefix = any('/' in key for key in keys), _gluon_prefix(keys)
    found = {}
    for path in paths:
        if keras:
            spellings = _layer_keys(path, paths, '/', KERAS, KERAS_BATCH_NORM)
        elif prefix:
            spellings = [prefix + key for key in _layer_keys(path, paths, '_', GLUON, GLUON_BATCH_NORM)]
        else:
            spellings = _torch_keys(path, aliases)
        found[path] = next((key for key in spellings if key in keys), spellings[0])
    return found


def to_flax_layout(key: str, tensor: np.ndarray) -> np.ndarray:
    """OIHW to HWIO and [out, in] to [in, out]; Keras's depthwise [H, W, C, M], for C groups, to [H, W, 1, C * M]."""
    if key.endswith('/depthwise_kernel'):
        return tensor.reshape(*tensor.shape[:2], 1, -1)
    if '/' in key:
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _torch_keys(path: str, aliases: Mapping[str, str]) -> list[str]:
    """'params/layer2_0/downsample_1/scale' -> ['layer2.0.downsample.1.weight', 'layer2.0.shortcut.1.weight']."""
    *modules, leaf = path.split('/')[1:]
    names = [*re.sub(r'_(\d+)', r'.\1', '.'.join(modules)).split('.'), PYTORCH[leaf]]
    return ['.'.join(names), '.'.join(aliases.get(name, name) for name in names)]


def _layer_keys(path: str, paths: Collection[str], separator: str, leaves: dict, batch_norm: dict) -> list[str]:
    """'params/conv1/kernel' -> ['conv1/kernel', 'conv1/depthwise_kernel']; 'params/bn1/bias' -> ['bn1/beta']."""
    *modules, leaf = path.split('/')[1:]
    names = batch_norm if f'batch_stats/{"/".join(modules)}/mean' in paths else leaves
    return [separator.join([*modules, name]) for name in names[leaf]]


def _gluon_prefix(keys: Collection[str]) -> str:
    """What most of Gluon's keys begin with, such as 'squeezenet0_'; '' if the keys are not Gluon's."""
    if any('.' in key for key in keys):
        return ''
    prefixes = Counter(match[1] for match in map(GLUON_KEY.fullmatch, keys) if match)
    return max(prefixes, key=prefixes.get, default='')
