"""The channels of a network in groups that can only be removed together, and the places of each group in the variables."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.networks.channels.coupling import Coupling, Pin
from dvinv.networks.channels.flat import flat_program
from dvinv.networks.channels.rules import Product, follow
from dvinv.networks.classifier import flatten, name_of, unflatten
from dvinv.networks.registry import shapes_of

FIXED = -1  # stands for the group of a place that cannot be removed


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """The channel groups of a network, numbered from 0.

    The argument `keep` of the methods is a keep mask, bool [count]: it is true for the groups that remain in the network.

    Attributes:
      count: The number of groups that can be removed.
      shapes: The variables of the full network, as shapes.
      axes: {path of a variable: for each of its axes the groups of the places along the axis, int [n], or None for an axis
        without channels that can be removed}.
      products: The network's convolutions and matrix products, with groups of channels instead of slots.
      pins: The reasons why channels must stay: operations that cannot be followed, or that combine all channels at once.
    """

    count: int
    shapes: dict
    axes: dict[str, tuple[np.ndarray | None, ...]]
    products: tuple[Product, ...]
    pins: tuple[Pin, ...]

    @functools.cached_property
    def whole(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`shapes` as a flat dict, {path: shape}."""
        return flatten(self.shapes)

    @functools.cached_property
    def layers(self) -> dict[str, np.ndarray]:
        """{a layer with output channels that can be removed: the groups of its output channels}, in the variables' order."""
        made = {
            path.removeprefix('params/').rpartition('/')[0]: axes[-1] for path, axes in self.axes.items() if _makes(path)
        }
        return {layer: groups for layer, groups in made.items() if groups is not None and (groups != FIXED).any()}

    def there(self, groups: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Returns a mask, bool [n], of the places with these groups [n] that remain."""
        return np.append(keep, True)[groups]  # FIXED is -1 and reads the appended True

    def places(self, keep: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
        """Returns {number of a leaf of the variables: {axis: mask of its remaining places}}, for `pruned_function`."""
        paths = jax.tree.leaves(unflatten({path: path for path in self.axes}))
        return {
            leaf: {axis: self.there(groups, keep) for axis, groups in enumerate(self.axes[path]) if groups is not None}
            for leaf, path in enumerate(paths)
        }

    def masked(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns the variables with zeros in place of removed groups: the full network then acts as the pruned one."""
        return self.restored(keep, self.sliced(keep, variables))

    def sliced(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns the variables without the places of removed groups."""
        return self._each(keep, variables, lambda leaf, axis, there: leaf.take(np.flatnonzero(there), axis))

    def restored(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns variables of the full network's shapes, with zeros in place of removed groups: the inverse of `sliced`."""

        def spread(leaf, axis, there):
            places = np.zeros((*leaf.shape[:axis], len(there), *leaf.shape[axis + 1 :]), leaf.dtype)
            places[(slice(None),) * axis + (there,)] = np.asarray(leaf)
            return places

        return self._each(keep, variables, spread)

    def _each(self, keep: np.ndarray, variables: dict, change) -> dict:
        changed = {}
        for path, leaf in flatten(variables).items():
            for axis, groups in enumerate(self.axes[path]):
                if groups is not None and not self.there(groups, keep).all():
                    leaf = change(leaf, axis, self.there(groups, keep))
            changed[path] = leaf
        return unflatten(changed)

    def kept(self, keep: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Returns {a layer with removed channels: the indices of its remaining output channels}."""
        there = {layer: self.there(groups, keep) for layer, groups in self.layers.items()}
        return {layer: tuple(map(int, np.flatnonzero(mine))) for layer, mine in there.items() if not mine.all()}

    def keep_mask(self, kept: dict[str, Iterable[int]]) -> np.ndarray:
        """Returns the keep mask for the remaining output channels of layers: the inverse of `kept`.

        Raises:
          DvinvError: The network does not have a layer or channel, a removed channel must stay, or channels are kept while
            others of their group are removed.
        """
        keep, layers = np.ones(self.count, bool), self.layers
        for layer, left in kept.items():
            if layer not in layers:
                raise DvinvError(f'{layer!r} is no layer whose channels can be removed; these are: {listed([*layers], 8)}.')
            groups, left = layers[layer], np.asarray(left, int)
            if len(left) and (left.min() < 0 or left.max() >= len(groups)):
                wrong = left[(left < 0) | (left >= len(groups))][0]
                raise DvinvError(f'{layer} has {len(groups)} channels, numbered from 0, so there is no {wrong}.')
            gone = groups[np.setdiff1d(np.arange(len(groups)), left)]
            if (gone == FIXED).any():
                raise DvinvError(f'Channels of {layer} are missing that can not be removed.')
            keep[gone] = False
        for layer, left in kept.items():
            if set(np.flatnonzero(self.there(layers[layer], keep))) != {*map(int, left)}:
                raise DvinvError(f'Channels of {layer} are there whose like are gone elsewhere; they can only go together.')
        return keep


def _makes(path: str) -> bool:
    return path.startswith('params/') and path.endswith('/kernel')


def find_channels(module: nn.Module, image_shape, ignored: tuple[str, ...] = ()) -> ChannelGroups:
    """Finds the channel groups of a Linen module that takes images and `train`.

    Args:
      module: The network.
      image_shape: (H, W, C).
      ignored: The layers that keep all their output channels.

    Raises:
      DvinvError: No channel can be removed (the message names the operations that prevent it), or the network does not have
        an ignored layer.
    """
    try:
        return _found(module, tuple(image_shape), tuple(ignored))
    except TypeError as error:
        if 'hash' not in str(error):
            raise
        return _found.__wrapped__(module, tuple(image_shape), tuple(ignored))  # for example, one of its fields is a list


@functools.lru_cache(maxsize=32)  # because a pruned network calls it each time that it is traced
def _found(module: nn.Module, image_shape: tuple[int, ...], ignored: tuple[str, ...]) -> ChannelGroups:
    variables = shapes_of(module, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    closed = jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, image)
    program, coupling = flat_program(closed), Coupling()
    shapes = {path: leaf.shape for path, leaf in flatten(variables).items()}
    slots = {path: tuple(map(coupling.fresh, shape)) for path, shape in shapes.items()}
    order = jax.tree.leaves(unflatten({path: path for path in shapes}))
    numbers = dict(zip(order, program.inputs[: len(order)], strict=True))
    labels, products = follow(program, {numbers[path]: slots[path] for path in order}, coupling)
    for output in program.outputs:
        for axis in labels.get(output, ()):
            if axis is not None:
                coupling.pin(axis, Pin('the logits', name_of(module)))
    pins = coupling.pins()
    group = coupling.groups()
    layers = {path.removeprefix('params/').rpartition('/')[0]: axes[-1] for path, axes in slots.items() if _makes(path)}
    stays = np.zeros(group.max(initial=0) + 1, bool)
    for layer in ignored:
        if layer not in layers:
            raise DvinvError(
                f'pruning.ignored_layers names {layer!r}, which is no layer; these are: {listed([*layers], 8)}.'
            )
        stays[group[layers[layer]]] = True
    for some, _ in pins:
        stays[group[some]] = True
    made = np.zeros_like(stays)
    for some in layers.values():
        made[group[some]] = True  # other groups are no layer's output, such as a constant or a bias that is added to nothing
    removable = np.flatnonzero(made & ~stays)
    renumbered = np.full(len(stays), FIXED)
    renumbered[removable] = np.arange(len(removable))
    if not len(removable):
        raise DvinvError(f'No channel of {name_of(module)} can be removed{_because(pins)}.')

    def units_of(some: np.ndarray) -> np.ndarray | None:
        mine = renumbered[group[some]]
        return None if (mine == FIXED).all() else mine

    return ChannelGroups(
        len(removable),
        variables,
        {path: tuple(map(units_of, axes)) for path, axes in slots.items()},
        tuple(_in_units(product, units_of) for product in products),
        tuple(dict.fromkeys(why for _, why in pins)),
    )


def _in_units(product: Product, units_of: Callable) -> Product:
    """Returns a product with groups instead of slots; an axis with no channels that can be removed counts as fixed."""
    axes = [units_of(axis) for axis in product.axes]
    moved = {
        index: sum(groups is not None for groups in axes[:index]) for index, groups in enumerate(axes) if groups is not None
    }
    return dataclasses.replace(
        product,
        fixed=product.fixed
        * math.prod(len(axis) for axis, groups in zip(product.axes, axes, strict=True) if groups is None),
        axes=tuple(groups for groups in axes if groups is not None),
        operands=tuple(tuple(moved.get(axis) for axis in operand) for operand in product.operands),
    )


def _because(pins) -> str:
    reasons = listed([*dict.fromkeys(f'{why.operation} in {why.where}' for _, why in pins)], 3)
    return f': they meet operations that cannot be followed, or that take all channels at once ({reasons})' if pins else ''
