"""The latency of a network on this device: measured end to end, or predicted from a table of layer times at several widths.

The table has the time of every convolution and matrix product of the network on a grid of widths, and is interpolated
between them. Each layer is timed together with the pass over its result that follows it in a network (scale, shift, ReLU).
The fixed cost of a call is subtracted, because the full network has it only once.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from dvinv.networks import Classifier
from dvinv.networks.channels.cost import Cost, Term
from dvinv.networks.channels.groups import ChannelGroups
from dvinv.networks.channels.rules import Product, is_depthwise
from dvinv.networks.suited import suited_to

SHARES = (0.25, 0.5, 0.75, 1.0)  # the grid, as shares of the channels along an axis


def latency(network: Classifier, batch_size: int, repetitions: int = 15) -> float:
    """Measures the median seconds of a forward pass of `batch_size` images."""
    run = jax.jit(suited_to(jax.default_backend(), network.apply_fn))
    x = jnp.zeros((batch_size, *network.image_shape), jnp.float32)
    return _median_seconds(run, (jax.device_put(network.variables), x), repetitions)


def measure_table(
    channels: ChannelGroups,
    batch_size: int,
    round_to: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Measures the seconds of every layer at the widths of the grid, and of an empty call; returns plain numbers for JSON.

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


def predicted(channels: ChannelGroups, table: dict) -> Cost:
    """Returns the predicted seconds of a forward pass as a `Cost` of the remaining groups.

    Args:
      table: the result of `measure_table`.
    """
    terms = [Term((), lambda: table['call'])]
    for product, row in zip(channels.products, table['layers'], strict=True):
        terms.append(Term(product.axes, _interpolated(row['widths'], row['seconds'], table['call'])))
    return Cost(channels.count, tuple(terms))


def _widths(count: int, round_to: int) -> list[int]:
    return sorted({min(count, round_to * max(1, round(count * share / round_to))) for share in SHARES})


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
