"""Published weights: the format of a file, found by its first bytes, and strict conversion of its tensors to Flax variables.

A PyTorch state dict is stored as `.npz`, as `.safetensors`, or in PyTorch's own formats with any suffix (`.pth`, `.pt`,
`.th`, `.bin`, `.ckpt`, `.pth.tar`). PyTorch's formats are read if torch is installed, with weights_only=True, because an
untrusted file must not run code. Keras and Gluon weights are stored as `.npz`.
"""

import contextlib
import dataclasses
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  a dependency of JAX; its import registers bfloat16 with numpy
import numpy as np
from safetensors import safe_open

from dvinv.networks.classifier import flatten, shapes_of, unflatten
from dvinv.networks.naming import AVERAGED, Unwrapped, find_keys, to_flax_layout, unwrapped
from dvinv.runtime.errors import DvinvError, listed, say_once

KNOWN = 'a PyTorch state dict (.pth, .pt, .bin, .ckpt, .safetensors), or named arrays (.npz)'
STATE_DICT = "save the state dict, torch.save(network.state_dict(), 'weights.pth')"
SAVE_KERAS = "save the arrays, np.savez('weights.npz', **{variable.path: variable for variable in network.variables})"

OLD_TORCH = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19'  # the pickled number at the start of files of PyTorch before 1.6
# Formats that dvinv does not read: (regular expression of the first bytes, name of the format, how to convert the weights).
UNREADABLE = (
    (rb'\x80[\x02-\x05]', 'a pickle, which could run code', 'save every tensor under its name by numpy.savez'),
    (rb'version https://git-lfs', 'a pointer of Git LFS in place of the weights', 'get the file itself by git lfs pull'),
    (rb'\s*<(!DOCTYPE|!doctype|html|HTML|\?xml)', 'a web page', 'download the file itself'),
    (rb'\s*\{\s*"', 'a JSON text', 'name the file that holds the tensors; shards that an index names must be joined first'),
    (rb'\x89HDF\r\n\x1a\n', 'an HDF5 file', f'with Keras, {SAVE_KERAS}'),
    (rb'GGUF', 'a GGUF file', 'use the float weights from which it was quantized'),
    (rb'.{4}TFL3', 'a TensorFlow Lite model', 'use the weights from which it was converted'),
    (rb'\x12\x01\x00{6}', 'a parameter file of MXNet', 'save its arrays under their names by numpy.savez'),
    (rb'\x93NUMPY', 'a single array', 'save every tensor under its name by numpy.savez'),
    (
        rb'[\x81-\x8f\xde\xdf].{0,4}[\xa1-\xbf\xd9]',
        'a msgpack file',
        'restore it with Flax in a function, and name that by teacher.factory',
    ),
    (rb'\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf', 'compressed', 'decompress it'),
    (rb'.{257}ustar', 'a tar archive', 'unpack it (one of PyTorch older than 0.1.10: load it there and save it again)'),
    (rb'\x08[\x01-\x1f][\x12\x1a\x3a\x42]', 'an ONNX graph', f'with the network from which it was exported, {STATE_DICT}'),
)
# The names of a network's state dict in checkpoints, in the order of preference if a checkpoint has several.
STATE_DICTS = ('state_dict', 'model_state_dict', 'model', 'net', 'network', 'module', 'params', 'weights')
ENDINGS = {
    '.npz': 'npz',
    '.safetensors': 'safetensors',
    **dict.fromkeys(('.pth', '.pt', '.th', '.bin', '.ckpt', '.tar'), 'torch'),
}


def kind_of(path: Path) -> str:
    """Returns the key in `READERS` for a file, determined by its content or, if that is not conclusive, by its suffix.

    Raises:
      DvinvError: the file is missing, or in an unsupported format, which the message names.
    """
    path = Path(path)
    try:
        with path.open('rb') as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise DvinvError(f'The weights file {path} is not there.') from error
    except IsADirectoryError as error:
        raise DvinvError(
            f'The weights file {path} is a folder; name a file in it, for instance model.safetensors.'
        ) from error
    except PermissionError as error:
        raise DvinvError(f'The weights file {path} cannot be read ({error.strerror}).') from error
    if not start:
        raise DvinvError(f'The weights file {path} cannot be read (it is empty); get it again.')
    if start[:2] == b'PK':
        return _kind_of_archive(path)
    if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') + 8 <= path.stat().st_size:
        return 'safetensors'
    if OLD_TORCH in start[:64]:
        return 'torch'
    for pattern, kind, way_out in UNREADABLE:
        if re.match(pattern, start, re.DOTALL):
            raise _not_read(path, kind, way_out)
    if path.suffix not in ENDINGS:
        raise _not_read(path, 'of no known kind', 'save it as one of these')
    return ENDINGS[path.suffix]


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Converts the many exceptions of numpy, zipfile, zlib, safetensors and torch during reading to a `DvinvError`."""
    try:
        yield
    except DvinvError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DvinvError(f'The weights file {path} cannot be read ({reason}); get it again.') from error


def _not_read(path: Path, kind: str, way_out: str) -> DvinvError:
    return DvinvError(f'The weights file {path} cannot be read (it is {kind}): dvinv reads {KNOWN}; {way_out}.')


def _kind_of_archive(path: Path) -> str:
    """Returns `kind_of` a zip archive, a container that numpy, PyTorch and other programs write."""
    with _refusing_damage(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(re.search(r'(^|/)(constants\.pkl|code/)', name) for name in names):
        way_out = "save its state dict, torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
        raise _not_read(path, 'a TorchScript archive, a program with its weights', way_out)
    if any(re.search(r'(^|/)data\.pkl$', name) for name in names):
        return 'torch'
    if any(name.endswith('.weights.h5') for name in names):
        raise _not_read(path, 'a Keras archive', f'with Keras, {SAVE_KERAS}')
    if names and all(name.endswith('.npy') for name in names):
        return 'npz'
    raise _not_read(path, f'a zip archive of {listed(names, 3) or "nothing"}', 'name a file in it')


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with _refusing_damage(path), path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        return {_keras_name(name): _array_of(path, arrays, name) for name in arrays}


def _array_of(path: Path, arrays, name: str) -> np.ndarray:
    try:
        return arrays[name]
    except ValueError as error:
        if 'allow_pickle' not in str(error):
            raise
        raise DvinvError(
            f'{path} holds Python objects ({name}), which could run code and cannot be read; save every tensor under a name '
            'of its own, by numpy.savez(path, **tensors).'
        ) from error


def _keras_name(name: str) -> str:
    """Removes the ':0' that TensorFlow appends to a variable's name: 'conv1/kernel:0' becomes 'conv1/kernel'."""
    return name.removesuffix(':0')


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with _refusing_damage(path), safe_open(path, 'numpy') as file:
        names = file.keys()
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
        _refuse_small_floats(path, {name: dtype for name, dtype in dtypes.items() if re.match('F[468](_|$)', dtype)})
        return {name: file.get_tensor(name) for name in names}


def _refuse_small_floats(path: Path, dtypes: Mapping[str, str]) -> None:
    """Raises DvinvError if there are quantized tensors; `dtypes` is {name: dtype} of those."""
    if dtypes:
        raise DvinvError(
            f'{path} holds quantized weights: {listed([f"{name} ({dtype})" for name, dtype in dtypes.items()], 3)}. What '
            'scales them is not known here; use the float weights from which they were made.'
        )


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict, or the one in a training checkpoint."""
    try:
        import torch
    except ImportError as error:
        raise DvinvError(f'{path} needs PyTorch to be read; install torch, or convert it to safetensors.') from error
    import pickle

    with _refusing_damage(path):
        try:
            content = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r'GLOBAL ([\w.]+)', str(error))
            contents = f'more than tensors ({found[1]})' if found else 'more than tensors'
            raise DvinvError(
                f'{path} is damaged, or holds {contents} and could run code, so it is not read; {STATE_DICT}, or as '
                'safetensors.'
            ) from error
    state = _state_dict_of(path, content, torch.is_tensor)
    dtypes = {key: str(tensor.dtype).removeprefix('torch.') for key, tensor in state.items()}
    _refuse_small_floats(path, {key: dtype for key, dtype in dtypes.items() if re.match('q|float[48]', dtype)})
    with _refusing_damage(path):  # conversion fails for sparse tensors, which numpy does not have
        return {
            key: (tensor.float() if dtypes[key] == 'bfloat16' else tensor).detach().numpy() for key, tensor in state.items()
        }


def _state_dict_of(path: Path, content, is_tensor: Callable) -> dict:
    """Returns the mapping in a checkpoint that has a network's tensors.

    Args:
      path: the path of the file, for messages.
      content: nested mappings; the values of a state dict are tensors, and numbers and strings next to them are ignored.
      is_tensor: the function that returns whether a value is a tensor.

    Raises:
      DvinvError: there is no state dict, or there are several and none has a usual name.
    """
    state_dicts = dict(_state_dicts(content, is_tensor))
    if not state_dicts:
        keys = [str(key) for key in _innermost(content)] if isinstance(content, Mapping) else ['the whole']
        raise DvinvError(f'{path} is no state dict ({listed(keys)}: no tensors); save the state_dict alone.')
    usual = [place for name in STATE_DICTS for place in state_dicts if place[-1:] == (name,)]
    usual.sort(key=lambda place: bool(AVERAGED.search('.'.join(place))))
    places = usual or ([()] if () in state_dicts else [*state_dicts])
    if len(places) > 1 and not usual:
        names = listed(['.'.join(place) for place in state_dicts])
        raise DvinvError(f'{path} holds several state dicts, {names}, and nothing says which is meant; save one of them.')
    place = places[0]
    if place:
        unread = ['.'.join(other) for other in state_dicts if other and other != place]
        exception = f'; {listed(unread)} not' if unread else ''
        say_once(f'{path} is a checkpoint: its {".".join(place)} is read{exception}.')
    return state_dicts[place]


def _state_dicts(content, is_tensor: Callable, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields (keys on the path to it, {key: tensor}) for every mapping with tensors within `content`."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return  # the keys of an optimizer's state are numbers
    tensors = {key: value for key, value in content.items() if is_tensor(value)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        yield from _state_dicts(value, is_tensor, (*place, key))


def _innermost(content: Mapping) -> Mapping:
    """Returns the mapping that a checkpoint without tensors has in place of a state dict, for the error message."""
    inner = content.get('state_dict')
    return inner if isinstance(inner, Mapping) and inner else content


READERS = {'npz': _read_npz, 'safetensors': _read_safetensors, 'torch': _read_torch}


class MisfitError(DvinvError):
    """The names or shapes of the weights do not fit the network."""


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a weights file by name, in the dtypes of the file.

    Raises:
      DvinvError: the file is missing, damaged, in an unsupported format, or would run code.
    """
    path = Path(path)
    return READERS[kind_of(path)](path)


def import_weights(module: nn.Module, image_shape, state: dict[str, np.ndarray], source: str = 'These weights') -> dict:
    """Converts PyTorch, Keras or Gluon tensors to the variables of `module` for images [H, W, C], as float32 numpy arrays.

    The keys are derived from the paths of the submodules, see `naming`. Optional attributes of the module change this:
    `module.aliases` gives alternative names of submodules, `module.unused` the prefixes of keys to ignore, and
    `module.adapt(arrays, image_shape, source)` changes arrays that depend on the image size. Prefixes that wrappers put
    before the keys are removed, and a message says so once.

    Args:
      source: the name of the weights in that message.

    Raises:
      DvinvError: tensors are integers, or have values that no trained network has; the message names them.
      MisfitError: keys are missing or left over, or shapes differ; the message lists them.
    """
    template, state = flatten(shapes_of(module, image_shape)), _without_counters(state)
    matched, keys = _matched(module, template, state)
    names = matched.names
    _refuse_integers({names[key]: state[names[key]] for key in keys.values() if key in names})
    _refuse_misfits(type(module).__name__, [*state], matched, {*keys.values()})
    arrays = {path: to_flax_layout(path, key, state[names[key]], template[path].shape) for path, key in keys.items()}
    if adapt := getattr(module, 'adapt', None):
        arrays = adapt(arrays, image_shape, source)
    _refuse_shapes(type(module).__name__, {names[key]: (arrays[path], template[path]) for path, key in keys.items()}, state)
    with np.errstate(over='ignore'):  # values that overflow float32 are refused below
        arrays = {path: array.astype(np.float32) for path, array in arrays.items()}
    refuse_values({path: names[key] for path, key in keys.items()}, arrays)
    if matched.prefix or any(key != name for key, name in names.items()):
        removed = repr(matched.prefix) if matched.prefix else 'What wraps its parts'
        say_once(f'{source}: {removed} is left out of the keys.')
    if matched.unused:
        say_once(f'{source}: {listed([*matched.unused], 3)} are not used.')
    return unflatten(arrays)


def agreement(module: nn.Module, template: dict, state: dict[str, np.ndarray]) -> tuple[float, bool]:
    """Compares `state` with the weights of `module`, a network with one class.

    Args:
      template: {path: shape} of the variables of `module`.

    Returns:
      The share of the network's keys that are in `state`, and whether names and shapes agree except for the number of
      classes.
    """
    state = _without_counters(state)
    matched, keys = _matched(module, template, state)
    names = matched.names
    share = len({*keys.values()} & names.keys()) / len(keys)
    if {*keys.values()} != names.keys():
        return share, False
    differing = set()
    for path, key in keys.items():
        expected = template[path].shape
        shape = to_flax_layout(path, key, state[names[key]], expected).shape
        if shape != expected:
            differing.add(path.rpartition('/')[0] if shape[:-1] == expected[:-1] and expected[-1] == 1 else path)
    return share, len(differing) <= 1 and not differing & keys.keys()  # only the head may differ


def count_classes(build: Callable[[int], nn.Module], image_shape, state: dict[str, np.ndarray]) -> int:
    """Returns the number of classes of the network in `state`; 1 if `state` has no such head and so does not fit.

    The head is the variable that changes its shape with `num_classes` in `build(num_classes)`; its outputs are the last axis
    in Flax.
    """
    state, module = _without_counters(state), build(1)
    one_class, two_classes = (flatten(shapes_of(build(num_classes), image_shape)) for num_classes in (1, 2))
    matched, keys = _matched(module, one_class, state)
    names = matched.names
    for path, key in keys.items():
        shape = one_class[path].shape
        if shape != two_classes[path].shape and key in names and np.ndim(state[names[key]]) == len(shape):
            return to_flax_layout(path, key, state[names[key]], shape).shape[-1]
    return 1


def _matched(module: nn.Module, template, state) -> tuple[Unwrapped, dict[str, str]]:
    """Returns the keys of `state` that belong to the network, and {path: key} of its variables, also for missing keys."""

    def find(keys) -> dict[str, str]:
        return find_keys(template.keys(), keys, getattr(module, 'aliases', {}), getattr(module, 'counted', True))

    matched, unused = unwrapped(state.keys(), find), getattr(module, 'unused', ())
    names = {key: name for key, name in matched.names.items() if not key.startswith(unused)}
    return dataclasses.replace(matched, names=names), find(names)


def _without_counters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors without step counters such as BatchNorm's num_batches_tracked, which are scalar integers."""
    arrays = {key: np.asarray(value) for key, value in state.items() if not key.endswith('num_batches_tracked')}
    return {key: array for key, array in arrays.items() if array.ndim or jnp.issubdtype(array.dtype, jnp.floating)}


def _refuse_integers(tensors: dict[str, np.ndarray]) -> None:
    wrong = [f'{name} ({array.dtype})' for name, array in tensors.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if wrong:
        raise DvinvError(
            f'These weights are not floating-point numbers: {listed(wrong, 3)}. Are they quantized? Use the float '
            'weights from which they were made.'
        )


def _refuse_misfits(network: str, file_keys: list[str], matched: Unwrapped, expected: set[str]) -> None:
    """Refuses keys that are missing or unexpected.

    Args:
      network: the class name of the network.
      file_keys: all keys of the file.
      matched: the keys that belong to the network.
      expected: the keys that the network needs.
    """
    missing, unexpected = expected - matched.names.keys(), matched.names.keys() - expected
    for problem, unmatched, contents in (
        ('lack', [matched.prefix + key for key in missing], f' The file has {listed(file_keys, 4)}.'),
        ('have left over', [matched.names[key] for key in unexpected], ''),
    ):
        if unmatched:
            raise MisfitError(
                f'These weights do not fit {network}: they {problem} {listed(sorted(unmatched))}. Is it another depth or '
                f'another network?{contents}'
            )


def _refuse_shapes(network: str, arrays: dict[str, tuple], state: dict[str, np.ndarray]) -> None:
    """Refuses arrays of unexpected shapes.

    Args:
      network: the class name of the network.
      arrays: {name: (array, expected shape)}.
      state: the original tensors by name; the message shows their shapes.
    """
    wrong = [f'{name} {state[name].shape}' for name, (array, expected) in arrays.items() if array.shape != expected.shape]
    if wrong:
        raise MisfitError(
            f'These weights do not fit {network}: other shapes than expected have {listed(sorted(wrong))}. Is it another '
            'width?'
        )


def refuse_values(names: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    """Refuses values that no trained network has.

    Args:
      names: {path of a variable: its name in the file}.
      arrays: {path of a variable: array}.

    Raises:
      DvinvError: an array has NaN, infinite numbers or negative variances.
    """
    for path, array in arrays.items():
        wrong, problem = ~np.isfinite(array), 'NaN or infinite'
        if not wrong.any() and path.startswith('batch_stats/') and path.endswith('/var'):
            wrong, problem = array < 0, 'negative, though variances'
        if wrong.any():
            raise DvinvError(
                f'Of the {array.size} numbers in {names[path]}, {wrong.sum()} are {problem}. Did that training diverge, or '
                'is the file damaged? Use weights from before.'
            )
