"""Networks as files: dvinv's own, which describe themselves, and weights that others published."""

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

from dvinv.errors import DvinvError
from dvinv.networks import formats, registry
from dvinv.networks.channels.module import PrunedModule
from dvinv.networks.classifier import Classifier, apply_fn_of, flatten, unflatten
from dvinv.networks.weights import MisfitError, agreement, count_classes, import_weights, read_state_dict, refuse_values
from dvinv.runtime.files import write_atomic
from dvinv.runtime.processes import meet


def save_network(path: Path, variables, description: dict) -> None:
    """Write a network as one safetensors file; see `network_bytes`."""
    write_atomic(path, network_bytes(variables, description))
    meet(f'{path} to be written')


def network_bytes(variables, description: dict) -> bytes:
    """A network as the bytes of a safetensors file.

    Args:
      variables: nested dicts of arrays; the file's tensor names are paths such as 'params/Conv_0/kernel'.
      description: what `module_of` needs to build it again: network, width, num_classes, and kept where it was pruned;
        and image_shape, mean, std.
    """
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(variables).items()}
    # One entry: safetensors writes several in an order that changes from call to call.
    about = {**description, 'sha256': _digest(description, tensors)}
    return save(tensors, {'dvinv': json.dumps(about, sort_keys=True)})


def load_network(path: Path) -> tuple[dict, dict]:
    """(variables as numpy arrays, description) of a file that `save_network` wrote.

    Raises:
      DvinvError: the file is missing, damaged, or not one of dvinv's.
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


def load_classifier(path: Path, own=None) -> Classifier:
    """A `Classifier` from a network file; for `own` see `module_of`."""
    variables, about = load_network(path)
    return classifier_of(module_of(about, own), variables, about)


def module_of(about: dict, own=None) -> nn.Module:
    """The Linen module of a network with the description of `save_network`.

    Args:
      own: the user's whole network, with the calls of a Linen module that takes x and `train`; None: one of dvinv's.

    Raises:
      DvinvError: no network has this name, or it is a user's and not given.
    """
    if own is None and not about['network']:
        raise DvinvError(
            'The file holds the weights of a network of your own, which is not among those of dvinv; give the Flax module, '
            'or the function that returns it: dvinv.load(..., module=module).'
        )
    module = own if own is not None else registry.create(about['network'], about['num_classes'], about['width'])
    return (
        PrunedModule(module, {layer: tuple(left) for layer, left in about['kept'].items()}) if about.get('kept') else module
    )


def classifier_of(module, variables, about: dict) -> Classifier:
    """The `Classifier` of a Linen module with its variables and the description of `save_network`."""
    return Classifier(
        apply_fn_of(module),
        variables,
        tuple(about['image_shape']),
        about['num_classes'],
        tuple(about['mean']),
        tuple(about['std']),
    )


def read_classifier(
    path: Path, network: str, *, mean=(), std=(), width: float = 1.0, image_shape=None, field: str = 'network', otherwise=()
):
    """(module, variables, description) of `network` from a weights file: dvinv's own, or one that others published.

    Args:
      path: what `save_network` wrote, which describes itself; or a file of `weights.read_state_dict`.
      mean, std: one number a channel, for pixels in [0, 1]; (): those of the file, else of the published weights of
        `network`, see `registry.published_pixels`.
      width: as in `registry.create`. The number of classes is read off the weights.
      image_shape: H, W, C; those of the file, else what `network` is made for when empty.
      field: what a refusal calls `network`, for instance 'teacher.network'.
      otherwise: (mean, std) where nothing else tells them; (): refused.

    Returns:
      The Linen module, its variables (nested dicts of numpy arrays, float32 where they are foreign) and a description as
      in `save_network`.

    Raises:
      DvinvError: the file is missing, damaged, describes itself otherwise than the arguments, holds another network (lists
        the tensors that do not fit, and names the network that does), or values that no trained network has.
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
    known = registry.published_pixels(network, image_shape[-1])
    mean, std = (tuple(a or b or c) for a, b, c in zip((mean, std), known, otherwise or known, strict=True))
    for name, values in (('mean', mean), ('std', std)):
        if not values:
            raise DvinvError(
                f'{group}{name} is (), but of weights for {network} that others published it is not known what they take; '
                f'give the {name} of the pixels in [0, 1] that they were trained with, one number a channel.'
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
    """Returns the network of the registry that has the names and shapes of `state`, which `network` has not; '' if none."""

    def agrees(name: str) -> tuple[float, bool]:
        return agreement(registry.create(name, 1, width), _template(name, width), state)

    same_names, family, strangers = agrees(network)[0] == 1, registry.NETWORKS[network].family, set()
    for name, other in registry.NETWORKS.items():
        # To look at all takes many seconds, so not at families with which the file has no names in common.
        if other.family in strangers or (same_names and other.family != family):
            continue
        share, whole = agrees(name)
        if whole:
            return name
        if share < 0.1:
            strangers.add(other.family)
    return ''


@functools.cache
def _template(name: str, width: float) -> dict:
    """Returns {path: shape} of the variables of a network with one class."""
    return flatten(registry.shapes_of(registry.create(name, 1, width), registry.image_shape(name)))


def refuse_other(path: Path, group: str, about: dict, given: dict) -> None:
    """Refuses what is `given` (but for what is empty, and the usual width) where the file's description has other values."""
    for name, value in given.items():
        if not value or (name == 'width' and value == 1):
            continue
        pairs = zip(np.ravel(value).tolist(), np.ravel(about[name]).tolist(), strict=False)
        same = all(isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)
        if np.size(value) != np.size(about[name]) or not same:
            shown = about[name] if name == 'width' else tuple(about[name])
            raise DvinvError(
                f'{group}{name} is {value}, but {path}, a file that dvinv wrote, is of a network with {name} {shown}, and '
                f'that is what counts; write {group}{name}={shown}, or give other weights.'
            )


def describes_itself(path: Path) -> bool:
    """Whether `save_network` wrote this file.

    Raises:
      DvinvError: the file is missing or damaged.
    """
    if formats.kind_of(Path(path)) != 'safetensors':
        return False
    with _opened(path) as file:
        return 'dvinv' in (file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """A safetensors file, open; what goes wrong inside is told in a sentence."""
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
