"""The channels of a network in units that can only be removed together, and what each of them is in its variables."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np

from dvinv.errors import DvinvError, listed
from dvinv.networks.channels.flat import flat_program
from dvinv.networks.channels.rules import Product, follow
from dvinv.networks.channels.ties import Pin, Ties
from dvinv.networks.classifier import flatten, name_of, unflatten
from dvinv.networks.registry import shapes_of

STAYS = -1  # the unit of places that cannot be removed


@dataclasses.dataclass(frozen=True)
class Channels:
    """Units are numbered from 0. Which of them are left is told by `alive`, bool [count], everywhere.

    Attributes:
      count: how many there are that can be removed.
      shapes: the variables of the whole network, as shapes.
      axes: {the path of a variable: the units of the places along each of its axes, int [n], or None}.
      products: the network's convolutions and matrix products, the units of their channels in place of atoms.
      pins: why channels stay: the operations that cannot be followed, or that meet all channels at once.
    """

    count: int
    shapes: dict
    axes: dict[str, tuple[np.ndarray | None, ...]]
    products: tuple[Product, ...]
    pins: tuple[Pin, ...]

    @functools.cached_property
    def whole(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`shapes` by path."""
        return flatten(self.shapes)

    @functools.cached_property
    def layers(self) -> dict[str, np.ndarray]:
        """{a layer with channels that can be removed: the units of those that it makes}, in the variables' order."""
        made = {
            path.removeprefix('params/').rpartition('/')[0]: axes[-1] for path, axes in self.axes.items() if _makes(path)
        }
        return {layer: units for layer, units in made.items() if units is not None and (units != STAYS).any()}

    def there(self, units: np.ndarray, alive: np.ndarray) -> np.ndarray:
        """Which places of these units are left, bool [n]."""
        return np.append(alive, True)[units]  # STAYS reads the last

    def places(self, alive: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
        """Which places are left along the axes of the variables' leaves, by their numbers; as `narrowed` takes it."""
        paths = jax.tree.leaves(unflatten({path: path for path in self.axes}))
        return {
            leaf: {axis: self.there(units, alive) for axis, units in enumerate(self.axes[path]) if units is not None}
            for leaf, path in enumerate(paths)
        }

    def masked(self, alive: np.ndarray, variables: dict) -> dict:
        """The variables, with zeros where units are gone: the network's old shape, computing what the small one does."""
        return self.restored(alive, self.sliced(alive, variables))

    def sliced(self, alive: np.ndarray, variables: dict) -> dict:
        """The variables without the places of units that are gone."""
        return self._each(alive, variables, lambda leaf, axis, there: leaf.take(np.flatnonzero(there), axis))

    def restored(self, alive: np.ndarray, variables: dict) -> dict:
        """The inverse of `sliced`, with zeros where units are gone."""

        def spread(leaf, axis, there):
            places = np.zeros((*leaf.shape[:axis], len(there), *leaf.shape[axis + 1 :]), leaf.dtype)
            places[(slice(None),) * axis + (there,)] = np.asarray(leaf)
            return places

        return self._each(alive, variables, spread)

    def _each(self, alive: np.ndarray, variables: dict, change) -> dict:
        changed = {}
        for path, leaf in flatten(variables).items():
            for axis, units in enumerate(self.axes[path]):
                if units is not None and not self.there(units, alive).all():
                    leaf = change(leaf, axis, self.there(units, alive))
            changed[path] = leaf
        return unflatten(changed)

    def kept(self, alive: np.ndarray) -> dict[str, tuple[int, ...]]:
        """{a layer that has lost channels: which of those that it makes are left}."""
        there = {layer: self.there(units, alive) for layer, units in self.layers.items()}
        return {layer: tuple(map(int, np.flatnonzero(mine))) for layer, mine in there.items() if not mine.all()}

    def alive(self, kept: dict[str, Iterable[int]]) -> np.ndarray:
        """The inverse of `kept`.

        Raises:
          DvinvError: a layer or channel that is not there, or channels that cannot go without others.
        """
        alive, layers = np.ones(self.count, bool), self.layers
        for layer, left in kept.items():
            if layer not in layers:
                raise DvinvError(f'{layer!r} is no layer whose channels can be removed; these are: {listed([*layers], 8)}.')
            units, left = layers[layer], np.asarray(left, int)
            if len(left) and (left.min() < 0 or left.max() >= len(units)):
                wrong = left[(left < 0) | (left >= len(units))][0]
                raise DvinvError(f'{layer} has {len(units)} channels, numbered from 0, so there is no {wrong}.')
            gone = units[np.setdiff1d(np.arange(len(units)), left)]
            if (gone == STAYS).any():
                raise DvinvError(f'Channels of {layer} are missing that can not be removed.')
            alive[gone] = False
        for layer, left in kept.items():
            if set(np.flatnonzero(self.there(layers[layer], alive))) != {*map(int, left)}:
                raise DvinvError(f'Channels of {layer} are there whose like are gone elsewhere; they can only go together.')
        return alive


def _makes(path: str) -> bool:
    return path.startswith('params/') and path.endswith('/kernel')


def find_channels(module: nn.Module, image_shape, ignored: tuple[str, ...] = ()) -> Channels:
    """The channels of a Linen module that takes images [H, W, C] and `train`.

    Args:
      ignored: layers whose channels stay.

    Raises:
      DvinvError: no channel can be removed (tells what stops it), or there is no such layer to protect.
    """
    try:
        return _found(module, tuple(image_shape), tuple(ignored))
    except TypeError as error:
        if 'hash' not in str(error):
            raise
        return _found.__wrapped__(module, tuple(image_shape), tuple(ignored))  # a field of it is a list, say


@functools.lru_cache(maxsize=32)  # a pruned network asks again whenever it is traced
def _found(module: nn.Module, image_shape: tuple[int, ...], ignored: tuple[str, ...]) -> Channels:
    variables = shapes_of(module, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    closed = jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, image)
    program, ties = flat_program(closed), Ties()
    shapes = {path: leaf.shape for path, leaf in flatten(variables).items()}
    atoms = {path: tuple(map(ties.fresh, shape)) for path, shape in shapes.items()}
    order = jax.tree.leaves(unflatten({path: path for path in shapes}))
    numbers = dict(zip(order, program.inputs[: len(order)], strict=True))
    labels, products = follow(program, {numbers[path]: atoms[path] for path in order}, ties)
    for output in program.outputs:
        for axis in labels.get(output, ()):
            if axis is not None:
                ties.pin(axis, Pin('the logits', name_of(module)))
    pins = ties.pins()
    unit = ties.units()
    layers = {path.removeprefix('params/').rpartition('/')[0]: axes[-1] for path, axes in atoms.items() if _makes(path)}
    stays = np.zeros(unit.max(initial=0) + 1, bool)
    for layer in ignored:
        if layer not in layers:
            raise DvinvError(
                f'pruning.ignored_layers names {layer!r}, which is no layer; these are: {listed([*layers], 8)}.'
            )
        stays[unit[layers[layer]]] = True
    for some, _ in pins:
        stays[unit[some]] = True
    made = np.zeros_like(stays)
    for some in layers.values():
        made[unit[some]] = True  # else no layer makes it: a bias that is added to nothing, a constant
    removable = np.flatnonzero(made & ~stays)
    renumbered = np.full(len(stays), STAYS)
    renumbered[removable] = np.arange(len(removable))
    if not len(removable):
        raise DvinvError(f'No channel of {name_of(module)} can be removed{_because(pins)}.')

    def units_of(some: np.ndarray) -> np.ndarray | None:
        mine = renumbered[unit[some]]
        return None if (mine == STAYS).all() else mine

    return Channels(
        len(removable),
        variables,
        {path: tuple(map(units_of, axes)) for path, axes in atoms.items()},
        tuple(_in_units(product, units_of) for product in products),
        tuple(dict.fromkeys(why for _, why in pins)),
    )


def _in_units(product: Product, units_of: Callable) -> Product:
    """A product whose axes have units in place of atoms; one that stays whole counts as no axis of channels."""
    axes = [units_of(axis) for axis in product.axes]
    moved = {
        index: sum(units is not None for units in axes[:index]) for index, units in enumerate(axes) if units is not None
    }
    return dataclasses.replace(
        product,
        fixed=product.fixed * math.prod(len(axis) for axis, units in zip(product.axes, axes, strict=True) if units is None),
        axes=tuple(units for units in axes if units is not None),
        operands=tuple(tuple(moved.get(axis) for axis in operand) for operand in product.operands),
    )


def _because(pins) -> str:
    reasons = listed([*dict.fromkeys(f'{why.operation} in {why.where}' for _, why in pins)], 3)
    return f': they meet operations that cannot be followed, or that take all channels at once ({reasons})' if pins else ''
