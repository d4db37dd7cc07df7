"""What PyTorch and Keras call the variables of a Flax network, and how they lay them out.

Flax       params/layer1_0/conv1/kernel    batch_stats/layer1_0/bn1/mean
PyTorch    layer1.0.conv1.weight           layer1.0.bn1.running_mean
Keras      layer1_0/conv1/kernel           layer1_0/bn1/moving_mean
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

# Flax's names of leaves, and theirs. Keras has two for a kernel, and others for what BatchNorm has.
PYTORCH = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
KERAS = {'kernel': ('kernel', 'depthwise_kernel'), 'bias': ('bias',)}
KERAS_BATCH_NORM = {'scale': ('gamma',), 'bias': ('beta',), 'mean': ('moving_mean',), 'var': ('moving_variance',)}


def find_keys(paths: Collection[str], keys: Collection[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """{path: the key that it goes by}; a key that is not among `keys` is the usual one.

    Args:
      paths: of a network's variables in Flax.
      keys: those of a file; Keras's have slashes.
      aliases: {name of a submodule: what other PyTorch repositories call it}.
    """
    keras = any('/' in key for key in keys)
    found = {}
    for path in paths:
        spellings = _keras_keys(path, paths) if keras else _torch_keys(path, aliases)
        found[path] = next((key for key in spellings if key in keys), spellings[0])
    return found


def to_flax_layout(key: str, tensor: np.ndarray) -> np.ndarray:
    """PyTorch's OIHW to HWIO and [out, in] to [in, out]; Keras's depthwise [H, W, C, M] to [H, W, 1, C * M], of C groups."""
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


def _keras_keys(path: str, paths: Collection[str]) -> list[str]:
    """'params/conv1/kernel' -> ['conv1/kernel', 'conv1/depthwise_kernel']; 'params/bn1/bias' -> ['bn1/beta']."""
    layer, _, leaf = path.partition('/')[2].rpartition('/')
    leaves = KERAS_BATCH_NORM if f'batch_stats/{layer}/mean' in paths else KERAS
    return [f'{layer}/{name}' for name in leaves[leaf]]
