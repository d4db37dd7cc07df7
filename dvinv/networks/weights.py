"""Published weights into Flax variables, strictly: every tensor finds its place, every place its tensor.

A PyTorch state dict comes as `.npz`, `.safetensors`, or `.pth` (where torch is installed, and then with weights_only=True:
an untrusted file must not run code). dvinv's own files are read by `registry.load_network`.
"""

import re
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dvinv.errors import DvinvError
from dvinv.networks.classifier import flatten, unflatten

# Flax's names of leaves, and PyTorch's.
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a weights file by name.

    Raises:
      DvinvError: the file is missing, damaged, of another kind, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise DvinvError(f'The weights file {path} is not there.')
    readers = {'.npz': _read_npz, '.safetensors': load_file, '.pth': _read_pth, '.pt': _read_pth}
    if path.suffix not in readers:
        raise DvinvError(f'{path} is no weights file that dvinv reads; it must end in {", ".join(readers)}.')
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, SafetensorError) as error:
        raise DvinvError(f'The weights file {path} cannot be read: {str(error).splitlines()[0]}') from error


def import_state_dict(module, image_shape, state: dict[str, np.ndarray]) -> dict:
    """The variables of a Linen `module` for images [H, W, C] from a PyTorch state dict.

    Paths spell keys: 'params/layer1_0/conv1/kernel' is 'layer1.0.conv1.weight', 'batch_stats/bn1/mean' is
    'bn1.running_mean'. Kernels go from OIHW to HWIO, matrices are transposed.

    Raises:
      DvinvError: keys that are missing or left over, or shapes that differ; lists them.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    template = flatten(jax.eval_shape(lambda k, x: module.init(k, x, train=False), jax.random.key(0), image))
    state = {key.removeprefix('module.'): value for key, value in state.items() if not key.endswith('num_batches_tracked')}
    wanted = {torch_key(path): path for path in template}
    name = type(module).__name__
    for problem, keys in (('lack', wanted.keys() - state.keys()), ('have left over', state.keys() - wanted.keys())):
        if keys:
            raise DvinvError(
                f'These weights do not fit {name}: they {problem} {_listed(sorted(keys))}. Is it another depth or '
                'another network?'
            )
    arrays = {path: _transposed(np.asarray(state[key])) for key, path in wanted.items()}
    wrong = [
        f'{torch_key(path)} ({tuple(state[torch_key(path)].shape)})'
        for path, array in arrays.items()
        if array.shape != template[path].shape
    ]
    if wrong:
        raise DvinvError(f'These weights do not fit {name}: other shapes than expected have {_listed(wrong)}.')
    return unflatten({path: array.astype(np.float32) for path, array in arrays.items()})


def torch_key(path: str) -> str:
    """'params/layer1_0/conv1/kernel' -> 'layer1.0.conv1.weight'."""
    *modules, leaf = path.split('/')[1:]
    return '.'.join([*(re.sub(r'_(\d+)', r'.\1', module) for module in modules), LEAVES[leaf]])


def _transposed(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's layout of a kernel to Flax's: OIHW to HWIO, [out, in] to [in, out]."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _listed(keys: list[str]) -> str:
    return ', '.join(keys[:12]) + (f' and {len(keys) - 12} more' if len(keys) > 12 else '')


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise DvinvError(f'{path} needs PyTorch to be read; install torch, or convert it to safetensors.') from error
    import pickle

    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise DvinvError(
            f'{path} holds more than tensors and could run code, so it is not read; save its state_dict alone, or as '
            'safetensors.'
        ) from error
    state = state.get('state_dict', state)
    return {key: tensor.numpy() for key, tensor in state.items()}
