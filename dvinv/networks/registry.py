"""Networks by name, and networks as files."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dvinv.errors import DvinvError
from dvinv.networks import small
from dvinv.networks.cifar_resnet import CifarResNet
from dvinv.networks.classifier import Classifier, flatten, unflatten
from dvinv.runtime.files import write_atomic


def _scaled(channels: tuple[int, ...], hidden: int, width: float) -> tuple[tuple[int, ...], int]:
    """Channels and hidden units, `width` times as many."""
    return tuple(max(1, round(c * width)) for c in channels), max(1, round(hidden * width))


def _cifar_resnet(blocks: int, classes: int, width: float):
    return CifarResNet(classes, blocks, tuple(max(1, round(c * width)) for c in (16, 32, 64)))


# name -> (num_classes, width) -> Linen module with __call__(x, train)
NETWORKS: dict[str, Callable] = {
    **{f'resnet{depth}': functools.partial(_cifar_resnet, (depth - 2) // 6) for depth in (20, 32, 44, 56, 110)},
    'small_resnet': lambda classes, width: small.SmallResNet(classes, *_scaled((32, 64), 64, width)),
    'small_convnet': lambda classes, width: small.SmallConvNet(classes, *_scaled((32, 64), 128, width)),
}


def create(name: str, num_classes: int, width: float = 1.0):
    """The Linen module `name` with channel counts scaled by `width`.

    Raises:
      DvinvError: no network has this name.
    """
    if name not in NETWORKS:
        raise DvinvError(f'There is no network {name!r}; choose one of {", ".join(sorted(NETWORKS))}.')
    if width <= 0:
        raise DvinvError(f'The width of {name} is {width}; it must be above 0.')
    return NETWORKS[name](num_classes, width)


def initialise(module, key: jax.Array, image_shape) -> dict:
    """Random variables of a Linen module for images [H, W, C]."""
    # Run once, so not worth optimising: XLA spends 8 s on the random numbers of a small network, and 0.7 s like this.
    options = {'xla_backend_optimization_level': 0}
    return jax.jit(lambda k: module.init(k, np.zeros((1, *image_shape), np.float32), train=False), compiler_options=options)(
        key
    )


def save_network(path: Path, variables, description: dict) -> None:
    """Write a network as one safetensors file.

    Args:
      variables: nested dicts of arrays; the file's tensor names are paths such as 'params/Conv_0/kernel'.
      description: what `load_network` needs to build it again: network, width, num_classes, image_shape, mean, std.
    """
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(variables).items()}
    # One entry: safetensors writes several in an order that changes from call to call.
    about = {**description, 'sha256': _digest(description, tensors)}
    write_atomic(path, save(tensors, {'dvinv': json.dumps(about, sort_keys=True)}))


def load_network(path: Path) -> tuple[dict, dict]:
    """(variables as numpy arrays, description) of a file that `save_network` wrote.

    Raises:
      DvinvError: the file is missing, damaged, or not one of dvinv's.
    """
    path = Path(path)
    if not path.exists():
        raise DvinvError(f'The network file {path} is not there.')
    try:
        with safe_open(path, 'numpy') as file:
            header = (file.metadata() or {}).get('dvinv')
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        about = header and json.loads(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise DvinvError(
            f'The network file {path} is damaged, or no safetensors file ({error}); if dvinv made it, delete it and run the '
            'command that made it again.'
        ) from error
    if about is None:
        raise DvinvError(f'{path} is a safetensors file, but dvinv did not write it: its header has no description.')
    if about.pop('sha256', None) != _digest(about, tensors):
        raise DvinvError(
            f'The network file {path} is damaged (its sha256 is not the one written); delete it and run the '
            'command that made it again.'
        )
    return unflatten(tensors), about


def load_classifier(path: Path) -> Classifier:
    """A `Classifier` from a network file."""
    variables, about = load_network(path)
    module = create(about['network'], about['num_classes'], about['width'])
    return Classifier(
        lambda v, x: module.apply(v, x, train=False),
        variables,
        tuple(about['image_shape']),
        about['num_classes'],
        tuple(about['mean']),
        tuple(about['std']),
    )


def _digest(description: dict, tensors: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f'{name} {tensors[name].dtype} {tensors[name].shape}'.encode())
        sha.update(tensors[name].tobytes())
    return sha.hexdigest()
