"""Published weights into Flax variables, strictly: every tensor finds its place, every place its tensor.

A PyTorch state dict comes as `.npz`, `.safetensors`, or `.pth`, `.pt`, `.th` (where torch is installed, and then with
weights_only=True: an untrusted file must not run code); Keras and Gluon weights come as `.npz`.
"""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from safetensors.numpy import load_file

from dvinv.errors import DvinvError, listed
from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.naming import find_keys, to_flax_layout


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a weights file by name.

    Raises:
      DvinvError: the file is missing, damaged, of another kind, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise DvinvError(f'The weights file {path} is not there.')
    if path.suffix not in READERS:
        raise DvinvError(f'{path} is no weights file that dvinv reads; it must end in {", ".join(READERS)}.')
    try:
        return READERS[path.suffix](path)
    except DvinvError:
        raise
    except Exception as error:  # numpy, zipfile, zlib, safetensors and torch raise many kinds here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DvinvError(f'The weights file {path} cannot be read ({reason}); get it again.') from error


def import_weights(module: nn.Module, image_shape, state: dict[str, np.ndarray]) -> dict:
    """The variables, float32 numpy arrays, of `module` for images [H, W, C] from PyTorch's, Keras's or Gluon's tensors.

    Submodules' paths spell the keys, as `naming` tells; a `module.aliases` has other names of theirs, and a `module.unused`
    what keys begin with that are left aside.

    Raises:
      DvinvError: keys that are missing or left over, or shapes that differ; lists them.
    """
    template, state, unused = _shapes(module, image_shape), _without_wrapping(state), getattr(module, 'unused', ())
    state = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
    keys = _keys(module, template, state)
    name, wanted = type(module).__name__, set(keys.values())
    for problem, unmatched in (('lack', wanted - state.keys()), ('have left over', state.keys() - wanted)):
        if unmatched:
            raise DvinvError(
                f'These weights do not fit {name}: they {problem} {listed(sorted(unmatched))}. Is it another depth or '
                'another network?'
            )
    arrays = {path: to_flax_layout(key, np.asarray(state[key]), template[path].ndim) for path, key in keys.items()}
    wrong = [f'{key} {np.shape(state[key])}' for path, key in keys.items() if arrays[path].shape != template[path].shape]
    if wrong:
        raise DvinvError(
            f'These weights do not fit {name}: other shapes than expected have {listed(sorted(wrong))}. Is it another width?'
        )
    return unflatten({path: array.astype(np.float32) for path, array in arrays.items()})


def count_classes(build: Callable[[int], nn.Module], image_shape, state: dict[str, np.ndarray]) -> int:
    """The number of classes of the network that `state` is of; 1 where it has no such head, and so does not fit.

    The head is what changes its shape with `num_classes` in `build(num_classes)`; its outputs are Flax's last axis.
    """
    state = _without_wrapping(state)
    few, many = (_shapes(build(num_classes), image_shape) for num_classes in (1, 2))
    for path, key in _keys(build(1), few, state).items():
        if few[path].shape != many[path].shape and np.ndim(state.get(key)) == few[path].ndim:
            return to_flax_layout(key, state[key], few[path].ndim).shape[-1]
    return 1


def _shapes(module: nn.Module, image_shape) -> dict[str, jax.ShapeDtypeStruct]:
    """What the variables of `module` are like, by path."""
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return flatten(jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), image))


def _keys(module: nn.Module, template, state) -> dict[str, str]:
    return find_keys(template.keys(), state.keys(), getattr(module, 'aliases', {}), getattr(module, 'counted', True))


def _without_wrapping(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the prefix of PyTorch's DataParallel, and without its BatchNorms' counters."""
    return {key.removeprefix('module.'): value for key, value in state.items() if not key.endswith('num_batches_tracked')}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """A state dict, or a checkpoint that has one as 'state_dict'."""
    try:
        import torch
    except ImportError as error:
        raise DvinvError(f'{path} needs PyTorch to be read; install torch, or convert it to safetensors.') from error
    import pickle

    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise DvinvError(
            f'{path} is damaged, or holds more than tensors and could run code, so it is not read; save its state_dict '
            'alone, or as safetensors.'
        ) from error
    state = state.get('state_dict', state) if isinstance(state, dict) else {'the whole': state}
    others = [str(key) for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise DvinvError(f'{path} is no state dict ({listed(others)}: no tensors); save the state_dict alone.')
    return {key: tensor.detach().float().numpy() for key, tensor in state.items()}


READERS = {'.npz': _read_npz, '.safetensors': load_file, '.pth': _read_torch, '.pt': _read_torch, '.th': _read_torch}
