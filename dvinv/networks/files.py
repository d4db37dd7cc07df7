"""Network files: those written by dvinv, which contain their description, and published weights of other projects."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dvinv.networks import registry, weights
from dvinv.networks.classifier import Classifier, apply_fn_of, flatten, shapes_of, unflatten
from dvinv.networks.pruned import PrunedModule
from dvinv.networks.weights import MisfitError, agreement, count_classes, import_weights, read_state_dict, refuse_values
from dvinv.runtime.devices import meet
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import write_atomic


def save_network(path: Path, variables, description: dict) -> None:
    """Writes a network as one safetensors file; see `network_bytes`."""
    write_atomic(path, network_bytes(variables, description))
    meet(f'{path} to be written')


def network_bytes(variables, description: dict) -> bytes:
    """Serializes a network to the bytes of a safetensors file.

    Args:
      variables: nested dicts of arrays; the file's tensor names are paths such as 'params/Conv_0/kernel'.
      description: the entries that `module_of` needs to rebuild the network (network, width, num_classes, and kept if it
        was pruned), and image_shape, mean, std.
    """
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(variables).items()}
    # A single entry, because safetensors writes several entries in an order that changes from call to call.
    about = {**description, 'sha256': _digest(description, tensors)}
    return save(tensors, {'dvinv': json.dumps(about, sort_keys=True)})


def load_network(path: Path) -> tuple[dict, dict]:
    """Returns (variables as numpy arrays, description) of a file that `save_network` wrote.

    Raises:
      DvinvError: the file is missing, damaged, or was not written by dvinv.
    """
    with _opened(path) as file:
        header = (file.metadata() or {}).get('dvinv')
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        about = header and json.loads(header)
    if about is None:
        raise DvinvError(f'{path} is a safetensors file, but dvinv did not write it: its header has no description.')
    if about.pop('sha256', None) != _digest(about, tensors):
        raise DvinvError(
            f'The network file {path} is damaged (its sha256 is not the one written); delete it and run the '
            'command that made it again.'
        )
    return unflatten(tensors), about


def load_classifier(path: Path, user_module=None) -> Classifier:
    """Loads a `Classifier` from a network file; for `user_module` see `module_of`."""
    variables, about = load_network(path)
    return classifier_of(module_of(about, user_module), variables, about)


def module_of(about: dict, user_module=None) -> nn.Module:
    """Builds the Linen module of a network from the description that `save_network` stored.

    Args:
      about: the description; a pruned network, with an entry `kept`, becomes a `PrunedModule`.
      user_module: the unpruned network of the user, with the methods of a Linen module that takes x and `train`; None: it
        is in the registry.

    Raises:
      DvinvError: the registry has no network of this name, or the network is a user's own and `user_module` is not given.
    """
    if user_module is None and not about['network']:
        raise DvinvError(
            'The file holds the weights of a network of your own, which is not among those of dvinv; give the Flax module, '
            'or the function that returns it: dvinv.load(..., module=module).'
        )
    module = user_module
    if module is None:
        module = registry.create(about['network'], about['num_classes'], about['width'])
    kept = {layer: tuple(indices) for layer, indices in (about.get('kept') or {}).items()}
    return PrunedModule(module, kept) if kept else module


def classifier_of(module, variables, about: dict) -> Classifier:
    """Returns the `Classifier` of a Linen module, its variables and the description that `save_network` stored."""
    return Classifier(
        apply_fn_of(module),
        variables,
        tuple(about['image_shape']),
        about['num_classes'],
        tuple(about['mean']),
        tuple(about['std']),
    )


def read_classifier(
    path: Path,
    network: str,
    *,
    mean=(),
    std=(),
    width: float = 1.0,
    image_shape=None,
    field: str = 'network',
    default_pixels=(),
):
    """Reads `network` from a weights file written by dvinv or published by another project.

    Args:
      path: a file that `save_network` wrote, which contains its description, or a file for `weights.read_state_dict`.
      mean, std: one number per channel, for pixels in [0, 1]; (): those of the file, else of the published weights of
        `network`, see `registry.published_pixels`.
      width: as in `registry.create`. The number of classes is read from the weights.
      image_shape: H, W, C; when empty, that of the file, else that of the registry for `network`.
      field: the setting that holds `network`, in error messages, for instance 'teacher.network'.
      default_pixels: the (mean, std) where neither the arguments nor the registry gives them; (): they are required.

    Returns:
      The Linen module, its variables (nested dicts of numpy arrays, float32 if the weights are those of another project)
      and a description as in `save_network`.

    Raises:
      DvinvError: the file is missing or damaged, its description differs from the arguments, it holds another network (the
        message lists the tensors that do not fit, and names the registered network that fits), or it holds values that no
        trained network has.
    """
    path, group, mean, std = Path(path), field.removesuffix('network'), tuple(mean), tuple(std)
    if describes_itself(path):
        variables, about = load_network(path)
        arrays = {variable: leaf for variable, leaf in flatten(variables).items() if leaf.dtype.kind == 'f'}
        refuse_values({variable: variable for variable in arrays}, arrays)
        if about['network'] != network:
            raise DvinvError(f'{path} holds a {about["network"]}, but {field} is {network}.')
        refuse_other(path, group, about, {'mean': mean, 'std': std, 'image_shape': image_shape, 'width': width})
        return module_of(about), variables, about
    image_shape = tuple(image_shape or registry.image_shape(network))
    state = read_state_dict(path)
    num_classes = count_classes(lambda classes: registry.create(network, classes, width), image_shape, state)
    published = registry.published_pixels(network, image_shape[-1])
    mean, std = (tuple(a or b or c) for a, b, c in zip((mean, std), published, default_pixels or published, strict=True))
    for name, values in (('mean', mean), ('std', std)):
        if not values:
            raise DvinvError(
                f'{group}{name} is (), but of weights for {network} that others published it is not known what they take; '
                f'give the {name} of the pixels in [0, 1] that they were trained with, one number per channel.'
            )
    module = registry.create(network, num_classes, width)
    about = {
        'network': network,
        'width': width,
        'num_classes': num_classes,
        'image_shape': image_shape,
        'mean': mean,
        'std': std,
    }
    try:
        return module, import_weights(module, image_shape, state, str(path)), about
    except MisfitError as error:
        if other := _fitting(state, network, width):
            raise DvinvError(f'{error} Names and shapes are those of {other}: set {field} to that.') from error
        raise


def _fitting(state: dict[str, np.ndarray], network: str, width: float) -> str:
    """Returns the registered network with the names and shapes of `state`, which do not fit `network`; '' if none."""

    def agrees(name: str) -> tuple[float, bool]:
        return agreement(registry.create(name, 1, width), _template(name, width), state)

    same_names, family, unrelated = agrees(network)[0] == 1, registry.NETWORKS[network].family, set()
    for name, candidate in registry.NETWORKS.items():
        # Comparing all networks takes many seconds, so families that share no names with the file are skipped.
        if candidate.family in unrelated or (same_names and candidate.family != family):
            continue
        share, fits = agrees(name)
        if fits:
            return name
        if share < 0.1:
            unrelated.add(candidate.family)
    return ''


@functools.cache
def _template(name: str, width: float) -> dict:
    """Returns {path: shape} of the variables of a network with one class."""
    return flatten(shapes_of(registry.create(name, 1, width), registry.image_shape(name)))


def refuse_other(path: Path, group: str, about: dict, arguments: dict) -> None:
    """Refuses arguments that differ from the file's description.

    Empty values and a `width` of 1 count as not given.

    Raises:
      DvinvError: a value differs.
    """
    for name, value in arguments.items():
        if not value or (name == 'width' and value == 1):
            continue
        pairs = zip(np.ravel(value).tolist(), np.ravel(about[name]).tolist(), strict=False)
        close = all(isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)
        if np.size(value) != np.size(about[name]) or not close:
            shown = about[name] if name == 'width' else tuple(about[name])
            raise DvinvError(
                f'{group}{name} is {value}, but {path}, a file that dvinv wrote, is of a network with {name} {shown}, and '
                f'that is what counts; write {group}{name}={shown}, or give other weights.'
            )


def describes_itself(path: Path) -> bool:
    """Returns whether `save_network` wrote this file, so that it contains its description.

    Raises:
      DvinvError: the file is missing or damaged.
    """
    if weights.kind_of(Path(path)) != 'safetensors':
        return False
    with _opened(path) as file:
        return 'dvinv' in (file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """Yields an open safetensors file; errors on the file inside the context become a one-sentence `DvinvError`."""
    if not Path(path).exists():
        raise DvinvError(f'The network file {path} is not there.')
    try:
        with safe_open(path, 'numpy') as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise DvinvError(
            f'The network file {path} is damaged, or no safetensors file ({error}); if dvinv made it, delete it and run the '
            'command that made it again.'
        ) from error


def _digest(description: dict, tensors: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f'{name} {tensors[name].dtype} {tensors[name].shape}'.encode())
        sha.update(tensors[name].tobytes())
    return sha.hexdigest()
