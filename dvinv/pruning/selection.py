"""The choice of the channel groups to remove: their importance, a network's latency, and removal down to a target cost."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.interpolate import RegularGridInterpolator

from dvinv.config import PruningSettings
from dvinv.evaluation import divergence
from dvinv.inversion import Teacher
from dvinv.inversion.statistics import running_statistics
from dvinv.networks import Classifier, channel_groups
from dvinv.networks.channel_groups import FIXED, ChannelGroups, Cost, KeepMask, PerGroup, Term
from dvinv.networks.channel_rules import Product, is_depthwise
from dvinv.networks.classifier import Pixels, flatten
from dvinv.networks.suited import suited_to
from dvinv.runtime.errors import DvinvError

WIDTH_SHARES = (0.25, 0.5, 0.75, 1.0)  # grid of the table of latencies: shares of the channels along an axis
# {measure: its cost}; 'latency' is measured instead
EXACT = {'filters': channel_groups.filters, 'flops': channel_groups.flops, 'parameters': channel_groups.parameters}


class Importance:
    """Importance of the groups of one network, by any method.

    First-order Taylor (arXiv 1912.08795, section 4.3; Molchanov et al., arXiv 1906.10771): imagine a gate, 1 when open,
    after each channel of every BatchNorm. Closing the gates of group u changes the loss L by about -sum dL/dg, and over
    batches

        importance(u) = E[(sum over the gates g of u of dL/dg)^2]

    A gate multiplies scale and bias, so dL/dg = scale dL/dscale + bias dL/dbias, and no actual gate is needed. Groups
    without a BatchNorm have their gates after the layers that produce them, where they multiply kernel and bias instead.
    Magnitude and random importance are controls.

    All methods take the variables of the unpruned network, with zeros in place of removed groups. Their shapes never change,
    so one compiled program serves all steps of pruning.
    """

    def __init__(self, module: nn.Module, teacher: Teacher, channels: ChannelGroups):
        """Prepares the functions without compiling them.

        Args:
          module: the unpruned network; takes x and `train`.
          teacher: the network that the pruned one is compared with in the loss.
          channels: the channel groups of the network.
        """
        self._module, self._teacher = module, teacher
        self._gates, self._count = _gates(channels), channels.count
        self._products = jax.jit(self._gate_products, static_argnames='equal')

    def taylor(self, variables: dict, batches: Iterable[np.ndarray], equal: bool) -> PerGroup:
        """Computes the first-order Taylor importance, float64 [groups].

        Args:
          variables: the variables of the network, with zeros in place of removed groups.
          batches: images uint8 [B, H, W, C].
          equal: whether the network still equals the teacher. KL(teacher || network) and its gradient are zero then and
            carry no information, so the loss is the cross-entropy to the class that the teacher predicts. For images that it
            classifies with confidence, this is their own class.
        """
        total, count = np.zeros(self._count), 0
        for images in batches:
            products = self._products(variables, self._teacher.variables, images, equal=equal)
            total += np.square(self._summed(products))
            count += 1
        return total / count

    def magnitude(self, variables: dict) -> PerGroup:
        """Computes the root mean square of the weights that the gates multiply, float64 [groups]."""
        weights = {path: _by_channel(leaf) for path, leaf in flatten(variables).items() if path in self._gates}
        squares = self._summed({path: np.square(leaf).sum(0) for path, leaf in weights.items()})
        numbers = self._summed({path: np.full(leaf.shape[-1], len(leaf)) for path, leaf in weights.items()})
        return np.sqrt(squares / numbers)

    def random(self, seed: int | tuple[int, ...]) -> PerGroup:
        """Draws uniform random importance, float64 [groups]."""
        return np.random.default_rng(seed).random(self._count)

    def _gate_products(self, variables, teacher_variables, images: Pixels, equal: bool) -> dict:
        """Computes {path of a variable: its part of dL/dg for the gates along its last axis}."""
        x = self._teacher.normalise(images)
        teacher_logits = self._teacher.apply_fn(teacher_variables, x)

        def loss(params):
            logits = self._module.apply({**variables, 'params': params}, x, train=False)
            if equal:
                return optax.softmax_cross_entropy_with_integer_labels(logits, teacher_logits.argmax(-1)).mean()
            return divergence(teacher_logits, logits)

        gradient = flatten({'params': jax.grad(loss)(variables['params'])})
        return {
            path: _by_channel(gradient[path] * leaf).sum(0)
            for path, leaf in flatten(variables).items()
            if path in self._gates
        }

    def _summed(self, values: dict) -> PerGroup:
        """Sums values over the gates of each group, float64 [groups].

        Args:
          values: {path of a variable: one value per gate along its last axis}.
        """
        sums = np.zeros(self._count + 1)
        for path, groups in self._gates.items():
            np.add.at(sums, groups, np.asarray(values[path], np.float64))
        return sums[:-1]  # the last entry collects values of FIXED gates, which belong to no group


def _by_channel(leaf):
    """Returns an array with all axes but the last merged, [n, C]."""
    return leaf.reshape(-1, leaf.shape[-1])


def _gates(channels: ChannelGroups) -> dict[str, np.ndarray]:
    """Returns {path of a variable that gates multiply: the group of each gate along its last axis, or FIXED}."""
    normed = running_statistics(channels.shapes)
    outputs = {path: axes[-1] for path, axes in channels.axes.items() if path.startswith('params/') and axes[-1] is not None}
    behind_norms = {path for path in outputs if path.removeprefix('params/').rpartition('/')[0] in normed}
    covered = np.zeros(channels.count + 1, bool)
    for path in behind_norms:
        covered[outputs[path]] = True
    covered[FIXED] = True
    return {
        path: groups if path in behind_norms else np.where(covered[groups], FIXED, groups)
        for path, groups in outputs.items()
    }


def latency(network: Classifier, batch_size: int, repetitions: int = 15) -> float:
    """Measures the median seconds of a forward pass of `batch_size` images."""
    run = jax.jit(suited_to(jax.default_backend(), network.apply_fn))
    x = jnp.zeros((batch_size, *network.image_shape), jnp.float32)
    return _median_seconds(run, (jax.device_put(network.variables), x), repetitions)


def measure_latencies(
    channels: ChannelGroups,
    batch_size: int,
    round_to: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Measures the seconds of every layer at the widths of the grid, and of an empty call; returns plain numbers for JSON.

    The table has the time of every convolution and matrix product of the network on a grid of widths, and is interpolated
    between them. Each layer is timed together with the pass over its result that follows it in a network (scale, shift,
    ReLU). The fixed cost of a call is subtracted, because the full network has it only once.

    Args:
      round_to: the number that all widths of the grid are multiples of. Time is not linear between widths that a backend
        handles well and others: on a CPU, a convolution of 15 channels takes one and a half times as long as one of 16.
      progress: called with the number of finished layers and the number of all layers.
    """
    measured: dict[str, list[float]] = {}  # of equal layers, only the first is measured
    layers = []
    for index, product in enumerate(channels.products):
        widths = [_widths(len(axis), round_to) for axis in product.axes]
        key = str((product.operation.name, product.operation.params, product.operation.shapes, product.operands))
        if key not in measured:
            measured[key] = [_seconds(product, counts, batch_size) for counts in itertools.product(*widths)]
        layers.append({'layer': product.layer, 'widths': widths, 'seconds': measured[key]})
        progress(index + 1, len(channels.products))
    return {
        'batch_size': batch_size,
        'call': _median_seconds(jax.jit(lambda x: x + 1), (jnp.zeros(1),), 50),
        'layers': layers,
    }


def predicted_latency(channels: ChannelGroups, table: dict) -> Cost:
    """Returns the predicted seconds of a forward pass as a `Cost` of the remaining groups.

    Args:
      table: the result of `measure_latencies`.
    """
    terms = [Term((), lambda: table['call'])]
    for product, row in zip(channels.products, table['layers'], strict=True):
        terms.append(Term(product.axes, _interpolated(row['widths'], row['seconds'], table['call'])))
    return Cost(channels.count, tuple(terms))


def _widths(count: int, round_to: int) -> list[int]:
    return sorted({min(count, round_to * max(1, round(count * share / round_to))) for share in WIDTH_SHARES})


def _interpolated(widths: list[list[int]], seconds: list[float], call: float) -> Callable[..., np.ndarray]:
    """Returns the function (numbers of channels along each axis) -> seconds beyond an empty call.

    It is linear between grid points, and constant below the smallest width.
    """
    values = np.maximum(np.reshape(seconds, [len(axis) for axis in widths]) - call, 0.0)
    # An axis with a single width cannot be interpolated.
    axes = [index for index, axis in enumerate(widths) if len(axis) > 1]
    values = values.reshape([len(widths[index]) for index in axes])
    for axis in range(len(axes)):
        values = np.maximum.accumulate(values, axis)  # fewer channels taking longer can only be noise
    if not axes:
        return lambda *counts: values
    grid = RegularGridInterpolator([widths[index] for index in axes], values, bounds_error=False, fill_value=None)

    def price(*counts):
        clipped = (np.maximum(np.asarray(counts[index], float), widths[index][0]) for index in axes)
        points = np.stack(np.broadcast_arrays(*clipped), -1)
        return grid(points).reshape(points.shape[:-1])

    return price


def _seconds(product: Product, counts: tuple[int, ...], batch_size: int) -> float:
    """Measures the seconds of one layer with `counts` channels along each of its axes."""
    operation = product.operation
    shapes = [
        [length if axis is None else counts[axis] for length, axis in zip(shape, axes, strict=True)]
        for shape, axes in zip(operation.shapes, product.operands, strict=True)
    ]
    params = dict(operation.params)
    if operation.name == 'conv_general_dilated':
        numbers = params['dimension_numbers']
        shapes[0][numbers.lhs_spec[0]] = batch_size
        outputs, inputs, *_ = numbers.rhs_spec
        groups = params['feature_group_count']
        if is_depthwise(operation):
            params['feature_group_count'] = shapes[0][numbers.lhs_spec[1]]
        elif groups > 1:  # all groups have the same number of channels
            shapes[0][numbers.lhs_spec[1]] = groups * shapes[1][inputs]
            shapes[1][outputs] = max(1, round(shapes[1][outputs] / groups)) * groups
    else:
        shapes[0][0] = batch_size

    def layer(x, kernel, scale):
        (output,) = operation.call(params, [x, kernel])
        return jax.nn.relu(output * scale + scale)

    arrays = [jnp.ones(shape, jnp.float32) for shape in shapes]
    run = jax.jit(suited_to(jax.default_backend(), layer))
    return _median_seconds(run, (*arrays, jnp.float32(0.5)), 9)


def _median_seconds(run: Callable, args: tuple, repetitions: int) -> float:
    timed(run, args)  # compiles
    return statistics.median(timed(run, args) for _ in range(repetitions))


def timed(run: Callable, args: tuple) -> float:
    """Measures the seconds of one call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def removal_scores(settings: PruningSettings, importance: PerGroup, price: Cost | None, keep: KeepMask) -> PerGroup:
    """Computes importance(u) - eta * savings(u) per group u, both relative to the network; the lowest are removed first.

    Args:
      importance: the importance of each group, [groups].
      price: the cost of the network; None if eta is 0.
      keep: the keep mask before the removal, bool [groups].
    """
    scores = importance / max(importance[keep].sum(), np.finfo(float).tiny)
    return scores - settings.eta * price.savings(keep) / price.total(keep) if price else scores


def without_lowest(
    channels: ChannelGroups, keep: KeepMask, scores: PerGroup, price: Cost, most: float, settings: PruningSettings
) -> KeepMask:
    """Removes the groups of the lowest scores until the cost is at most `most` or no more can be removed.

    Args:
      keep, scores: the keep mask before the removal and the scores, [groups].
      price: the cost of the network.

    Returns:
      The keep mask after the removal, bool [groups].
    """
    keep, layers = keep.copy(), channels.layers.values()
    channels_in = np.stack([np.bincount(groups[groups != FIXED], minlength=channels.count) for groups in layers])
    fixed = np.array([(groups == FIXED).sum() for groups in layers])
    remaining = channels_in @ keep + fixed  # the number of channels of each layer
    for bundle in _bundles(channels_in, keep, scores, settings.round_to):
        if price.total(keep) <= most:
            break
        removed = channels_in[:, bundle].sum(1)
        if (remaining - removed >= settings.min_channels)[removed > 0].all():  # else a layer would fall below the minimum
            keep[bundle] = False
            remaining = remaining - removed
    return keep


def _bundles(channels_in: np.ndarray, keep: KeepMask, scores: PerGroup, round_to: int) -> list[np.ndarray]:
    """Returns bundles of groups that are removed together, those of the lowest mean score first.

    Groups with channels in the same layers are of the same kind. Groups of a kind are sorted by score and bundled by
    `round_to`. If their number is not a multiple of it, the first bundle is smaller, so that a multiple remains.

    Args:
      channels_in: the number of channels of each group in each layer, [layers, groups].
      keep, scores: the keep mask before the removal and the scores, [groups].
      round_to: the number of groups in a bundle.
    """
    _, kinds = np.unique(channels_in, axis=1, return_inverse=True)
    order, bundles = np.argsort(scores, kind='stable'), []
    for kind in np.unique(kinds[keep]):
        groups = order[(kinds == kind)[order] & keep[order]]
        first = len(groups) % round_to or round_to
        bundles += np.split(groups, range(first, len(groups), round_to))
    return sorted(bundles, key=lambda bundle: (scores[bundle].mean(), bundle[0]))


def least_reachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> float:
    """Computes the smallest reachable ratio of the cost if groups are removed by number (other orders may differ)."""
    keep_all = np.ones(channels.count, bool)
    keep = without_lowest(channels, keep_all, np.zeros(channels.count), price, -math.inf, settings)
    return price.total(keep) / price.total(keep_all)


def refuse_unreachable(channels: ChannelGroups, price: Cost, settings: PruningSettings) -> None:
    """Refuses a target ratio that cannot be reached.

    Raises:
      DvinvError: the target is too low; the message says the smallest reachable ratio.
    """
    least = least_reachable(channels, price, settings)
    if settings.target_ratio < least:
        raise unreachable(settings, f'at least {least:.3f}')


def unreachable(settings: PruningSettings, remaining: str) -> DvinvError:
    """Returns the error for a target ratio that cannot be reached; `remaining` is the ratio that can."""
    return DvinvError(
        f'pruning.target_ratio is {settings.target_ratio}, but with {settings.min_channels} channels in every layer '
        f'{remaining} of the {settings.measure} remain; raise it, or lower pruning.min_channels.'
    )
