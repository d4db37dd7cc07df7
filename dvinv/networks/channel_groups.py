"""The channels of a network in groups that can only be removed together, and the cost of the network without some."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float

from dvinv.graph.program import called_or_jaxs_own, program_of
from dvinv.networks.channel_rules import Coupling, Pin, Product, follow
from dvinv.networks.classifier import flatten, name_of, shapes_of, unflatten
from dvinv.runtime.errors import DvinvError, listed

FIXED = -1  # stands for the group of a place that cannot be removed
KeepMask = Bool[np.ndarray, ' groups']  # whether each channel group is kept
PerGroup = Float[np.ndarray, ' groups']


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
    def flat_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`shapes` as a flat dict, {path: shape}."""
        return flatten(self.shapes)

    @functools.cached_property
    def layers(self) -> dict[str, np.ndarray]:
        """{a layer with output channels that can be removed: the groups of its output channels}, in the variables' order."""
        outputs = {layer: self.axes[path][-1] for layer, path in _kernels(self.axes).items()}
        return {layer: groups for layer, groups in outputs.items() if groups is not None and (groups != FIXED).any()}

    def remaining(self, groups: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Returns a mask, bool [n], of the places with these groups [n] that remain."""
        return np.append(keep, True)[groups]  # FIXED is -1 and reads the appended True

    def places(self, keep: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
        """Returns {number of a leaf of the variables: {axis: mask of its remaining places}}, for `pruned_function`."""
        paths = jax.tree.leaves(unflatten({path: path for path in self.axes}))
        return {
            leaf: {axis: self.remaining(groups, keep) for axis, groups in enumerate(self.axes[path]) if groups is not None}
            for leaf, path in enumerate(paths)
        }

    def masked(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns the variables with zeros in place of removed groups: the full network then acts as the pruned one."""
        return self.restored(keep, self.sliced(keep, variables))

    def sliced(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns the variables without the places of removed groups."""
        return self._each(keep, variables, lambda leaf, axis, mask: leaf.take(np.flatnonzero(mask), axis))

    def restored(self, keep: np.ndarray, variables: dict) -> dict:
        """Returns variables of the full network's shapes, with zeros in place of removed groups: the inverse of `sliced`."""

        def spread(leaf, axis: int, mask: np.ndarray) -> np.ndarray:
            full = np.zeros((*leaf.shape[:axis], len(mask), *leaf.shape[axis + 1 :]), leaf.dtype)
            full[(slice(None),) * axis + (mask,)] = np.asarray(leaf)
            return full

        return self._each(keep, variables, spread)

    def _each(self, keep: np.ndarray, variables: dict, change: Callable) -> dict:
        """Returns the variables after `change(leaf, axis, mask of its remaining places)` for each axis that loses places."""
        changed = {}
        for path, leaf in flatten(variables).items():
            for axis, groups in enumerate(self.axes[path]):
                if groups is not None and not self.remaining(groups, keep).all():
                    leaf = change(leaf, axis, self.remaining(groups, keep))
            changed[path] = leaf
        return unflatten(changed)

    def kept(self, keep: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Returns {a layer with removed channels: the indices of its remaining output channels}."""
        masks = {layer: self.remaining(groups, keep) for layer, groups in self.layers.items()}
        return {layer: tuple(map(int, np.flatnonzero(mask))) for layer, mask in masks.items() if not mask.all()}

    def keep_mask(self, kept: Mapping[str, Iterable[int]]) -> np.ndarray:
        """Returns the keep mask for the remaining output channels of layers: the inverse of `kept`.

        Raises:
          DvinvError: The network does not have a layer or channel, a removed channel must stay, or channels are kept while
            others of their group are removed.
        """
        keep, layers = np.ones(self.count, bool), self.layers
        for layer, indices in kept.items():
            if layer not in layers:
                raise DvinvError(f'{layer!r} is not a layer with channels that can be removed; these are: {_names(layers)}.')
            groups, channels = layers[layer], np.asarray(indices, int)
            if len(channels) and (channels.min() < 0 or channels.max() >= len(groups)):
                wrong = channels[(channels < 0) | (channels >= len(groups))][0]
                raise DvinvError(f'{layer} has {len(groups)} channels, numbered from 0, so there is no {wrong}.')
            removed = groups[np.setdiff1d(np.arange(len(groups)), channels)]
            if (removed == FIXED).any():
                raise DvinvError(f'Channels of {layer} are missing that cannot be removed.')
            keep[removed] = False
        for layer, indices in kept.items():
            if {*np.flatnonzero(self.remaining(layers[layer], keep))} != {*map(int, indices)}:
                raise DvinvError(
                    f'Channels of {layer} remain that are coupled with removed channels of other layers; coupled channels '
                    'must be removed together.'
                )
        return keep


def _kernels(paths: Iterable[str]) -> dict[str, str]:
    """Returns {layer: path of its kernel} of the layers among the paths of variables."""
    kernels = (path for path in paths if path.startswith('params/') and path.endswith('/kernel'))
    return {path.removeprefix('params/').removesuffix('/kernel'): path for path in kernels}


def _names(names: Iterable[str]) -> str:
    return listed([*names], 8)


def find_channels(module, image_shape, ignored: tuple[str, ...] = ()) -> ChannelGroups:
    """Finds the channel groups of a Linen module, or a module with its interface, that takes images and `train`.

    Args:
      module: The network.
      image_shape: (H, W, C).
      ignored: The layers that keep all their output channels.

    Raises:
      DvinvError: No channel can be removed (the message names the operations that prevent it), or the network does not have
        an ignored layer.
    """
    arguments = module, tuple(image_shape), tuple(ignored)
    try:
        return _find_channels(*arguments)
    except TypeError as error:
        if 'hash' not in str(error):
            raise
        return _find_channels.__wrapped__(*arguments)  # for example, one of its fields is a list


@functools.lru_cache(maxsize=32)  # because a pruned network calls it each time that it is traced
def _find_channels(module, image_shape: tuple[int, ...], ignored: tuple[str, ...]) -> ChannelGroups:
    variables = shapes_of(module, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    closed = jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, image)
    program, coupling = program_of(closed, called_or_jaxs_own), Coupling()
    shapes = {path: leaf.shape for path, leaf in flatten(variables).items()}
    slots = {path: tuple(map(coupling.fresh, shape)) for path, shape in shapes.items()}
    order = jax.tree.leaves(unflatten({path: path for path in shapes}))
    numbers = dict(zip(order, program.inputs[: len(order)], strict=True))
    labels, products = follow(program, {numbers[path]: slots[path] for path in order}, coupling)
    for output in program.outputs:
        for axis in labels.get(output, ()):
            if axis is not None:
                coupling.pin(axis, Pin('the logits', name_of(module)))
    pins, group = coupling.pins(), coupling.groups()
    outputs = {layer: slots[path][-1] for layer, path in _kernels(slots).items()}
    fixed = np.zeros(group.max(initial=0) + 1, bool)
    for layer in ignored:
        if layer not in outputs:
            raise DvinvError(f'pruning.ignored_layers names {layer!r}, which is no layer; these are: {_names(outputs)}.')
        fixed[group[outputs[layer]]] = True
    for pinned, _ in pins:
        fixed[group[pinned]] = True
    # Other groups are not the output of any layer, for example a constant, or a bias that is added to nothing.
    of_outputs = np.zeros_like(fixed)
    for channels in outputs.values():
        of_outputs[group[channels]] = True
    removable = np.flatnonzero(of_outputs & ~fixed)
    renumbered = np.full(len(fixed), FIXED)
    renumbered[removable] = np.arange(len(removable))
    if not len(removable):
        raise DvinvError(f'No channel of {name_of(module)} can be removed{_because(pins)}.')

    def groups_of(channels: np.ndarray) -> np.ndarray | None:
        groups = renumbered[group[channels]]
        return None if (groups == FIXED).all() else groups

    return ChannelGroups(
        len(removable),
        variables,
        {path: tuple(map(groups_of, axes)) for path, axes in slots.items()},
        tuple(_in_groups(product, groups_of) for product in products),
        tuple(dict.fromkeys(reason for _, reason in pins)),
    )


def _in_groups(product: Product, groups_of: Callable[[np.ndarray], np.ndarray | None]) -> Product:
    """Returns a product with groups instead of slots; an axis with no channels that can be removed counts as fixed."""
    fixed = product.fixed
    axes: list[np.ndarray] = []
    index_of: dict[int | None, int] = {}  # {index of an axis in `product`: its index in the result}
    for index, slots in enumerate(product.axes):
        groups = groups_of(slots)
        if groups is None:
            fixed *= len(slots)
        else:
            index_of[index] = len(axes)
            axes.append(groups)
    operands = tuple(tuple(index_of.get(axis) for axis in operand) for operand in product.operands)
    return dataclasses.replace(product, fixed=fixed, axes=tuple(axes), operands=operands)


def _because(pins: list[tuple[np.ndarray, Pin]]) -> str:
    reasons = listed([*dict.fromkeys(f'{reason.operation} in {reason.module}' for _, reason in pins)], 3)
    return f': they meet operations that cannot be followed, or that take all channels at once ({reasons})' if pins else ''


@dataclasses.dataclass(frozen=True)
class Term:
    """The cost of one layer or variable as a function of the numbers of remaining channels along its axes.

    Attributes:
      axes: For each axis of channels, the groups of its places.
      price: (number of remaining channels of each axis, float [...]) -> cost [...].
    """

    axes: tuple[np.ndarray, ...]
    price: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Cost:
    """A cost of a network: a sum of terms."""

    count: int  # the number of channel groups
    terms: tuple[Term, ...]

    def total(self, keep: KeepMask) -> float:
        """Computes the cost of the network with the groups in the keep mask, bool [count]."""
        kept = np.append(keep, True)  # with the entry that FIXED, -1, reads
        return float(sum(term.price(*(kept[axis].sum() for axis in term.axes)) for term in self.terms))

    def savings(self, keep: KeepMask) -> PerGroup:
        """Computes the saving by the removal of each group alone, float [count]; 0 for groups that are removed already."""
        kept, savings = np.append(keep, True), np.zeros(self.count)
        for term in self.terms:
            counts = [kept[axis].sum() for axis in term.axes]
            # For each axis, the number of its channels in each group that is not removed yet.
            of_groups = [np.bincount(axis[axis != FIXED], minlength=self.count) * keep for axis in term.axes]
            groups = np.flatnonzero(sum(of_groups))
            if len(groups):
                without = [count - sizes[groups] for count, sizes in zip(counts, of_groups, strict=True)]
                savings[groups] += term.price(*counts) - term.price(*without)
        return savings


def flops(channels: ChannelGroups) -> Cost:
    """Returns the number of floating-point operations of convolutions and matrix products for one image as a cost; exact.

    A multiply-add counts as two operations.
    """
    return Cost(channels.count, tuple(Term(p.axes, _volume(2 * p.fixed)) for p in channels.products))


def parameters(channels: ChannelGroups) -> Cost:
    """Returns the number of trained parameters as a cost; exact."""
    terms = []
    for path, axes in channels.axes.items():
        if path.startswith('params/'):
            fixed = math.prod(n for n, groups in zip(channels.flat_shapes[path].shape, axes, strict=True) if groups is None)
            terms.append(Term(tuple(groups for groups in axes if groups is not None), _volume(fixed)))
    return Cost(channels.count, tuple(terms))


def filters(channels: ChannelGroups) -> Cost:
    """Returns the number of output channels of all layers as a cost."""
    return Cost(channels.count, tuple(Term((groups,), _volume(1)) for groups in channels.layers.values()))


def _volume(fixed: int) -> Callable[..., np.ndarray]:
    return lambda *counts: fixed * math.prod(counts)
