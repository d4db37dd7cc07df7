"""Recording of moments: the choice of a network's layers, and their mean and variance over some images."""

import re
from collections.abc import Iterable

import jax
import numpy as np

from dvinv.graph.program import Program, called_or_jaxs_own, program_of
from dvinv.inversion.augmentation import Augmentation
from dvinv.inversion.capture import OUTPUT
from dvinv.inversion.statistics import Moments, find_statistics
from dvinv.inversion.tap import in_order
from dvinv.inversion.teacher import Teacher, network_input
from dvinv.networks.classifier import flatten, join_names
from dvinv.runtime.devices import usual_promotions
from dvinv.runtime.errors import DvinvError, listed

NORMALISES = re.compile(r'^(?!Weight|Spectral).*Norm(?:aliz\w*|alis\w*)?(?:_?\d+[dD]?)?$')  # class names of such layers
LEAST = 2  # the least number of images


def record_moments(
    network: Teacher,
    images,
    layers: Iterable[str] | str = (),
    *,
    augmentation: Augmentation | None = None,
    views: int = 10,
    key: int = 0,
    batch_size: int = 50,
) -> Moments:
    """Records the mean and variance per channel, over images and positions, of inputs or outputs of a network's layers.

    Args:
      network: A Teacher, as returned by `from_linen` and `from_nnx`.
      images: About 100 of the images that it was trained on: pixels uint8 [N, H, W, C], or normalised floats.
      layers: Patterns of a layer's path or class, see `Tap.find`. The default () selects the inputs of all BatchNorms or, in
        a network without any, the inputs of all normalization layers and the outputs of all residual blocks. If it has
        neither, it selects the outputs of all layers with weights except the last one.
      augmentation: The augmentation with which the network was trained. Synthesized images are augmented before the network
        takes them, and should then be compared with moments of augmented images.
      views: The number of times that each image is augmented anew; without `augmentation` each image is used once.
      key: The seed of the augmentation.
      batch_size: The number of images that the network takes at a time.

    Returns:
      The recorded `Moments`.

    Raises:
      DvinvError: There are fewer than 2 images, the images have another shape or are not normalised, a pattern fits no
        layer, a layer cannot be captured, or the moments are not finite.
    """
    if not isinstance(network, Teacher):
        raise DvinvError(
            f'record_moments takes a dvinv.Teacher, and a {type(network).__name__} is none; make one of the network: '
            'dvinv.from_linen(module, variables, ...) or dvinv.from_nnx(model, ...).'
        )
    teacher, images = network.without_moments(), np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != tuple(teacher.image_shape) or len(images) < LEAST:
        shape = ', '.join(map(str, teacher.image_shape))
        raise DvinvError(
            f'The images to record moments from have the shape {images.shape}; give at least {LEAST}, better 100, as '
            f'[N, {shape}].'
        )
    if augmentation is not None and views < 1:
        raise DvinvError(f'views is {views}; it must be at least 1.')
    places, tap = _places(teacher, layers)

    @jax.jit
    def run(variables, x, key):
        augmented = x if augmentation is None else augmentation(key, x, teacher)
        return tap.moments(variables, augmented, places)

    totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    count = 0
    with usual_promotions():
        for view in range(1 if augmentation is None else views):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                x, seed = network_input(teacher, batch), view * len(images) + start
                found = run(teacher.variables, x, jax.random.fold_in(jax.random.key(key), seed))
                count = _merge(totals, count, jax.device_get(found), len(batch))
    moments = {place: (mean.astype(np.float32), variance.astype(np.float32)) for place, (mean, variance) in totals.items()}
    if infinite := [place for place in places if not np.isfinite(moments[place]).all()]:
        raise DvinvError(f'The moments of {listed(infinite, 4)} are not finite; look at the weights and at the images.')
    return Moments(
        {place: moments[place] for place in places}, teacher.digest(), len(images), 0 if augmentation is None else views
    )


def _merge(totals: dict, count: int, found: dict, more: int) -> int:
    """Merges moments of further images into the totals, in place.

    Args:
      totals: {place: (mean, variance)}, float64, of the images so far.
      count: The number of images so far.
      found: {place: (mean, variance)} of the further images.
      more: The number of further images.

    Returns:
      The number of all images, count + more.
    """
    share = more / (count + more)
    for place, pair in found.items():
        mean, variance = (np.asarray(value, np.float64) for value in pair)
        old_mean, old_variance = totals.get(place, (mean, variance))
        between = share * (1 - share) * np.square(mean - old_mean)  # the variance between the two groups of images
        totals[place] = old_mean + share * (mean - old_mean), old_variance + share * (variance - old_variance) + between
    return count + more


def with_shapes(teacher: Teacher, layers: Iterable[str] | str = ()) -> Teacher:
    """Returns `teacher`, which has shapes as variables, with the shapes of moments that `record_moments` is to record."""
    x = jax.ShapeDtypeStruct((LEAST, *teacher.image_shape), np.float32)
    places, tap = _places(teacher, layers)
    found = jax.eval_shape(lambda variables, x: tap.moments(variables, x, places), teacher.variables, x)
    return teacher.with_variables(Moments(found, '', 0).variables())


def _places(teacher: Teacher, patterns: Iterable[str] | str):
    """Returns the places to record, in forward order, and a tap that captures them."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    variables = teacher.variables
    places = teacher.tap.find(variables, patterns) if patterns else default_places(teacher)
    return places, teacher.tap.reaching(variables, places)


def default_places(teacher: Teacher) -> tuple[str, ...]:
    """Returns the places that `record_moments` records by default, in forward order.

    Raises:
      DvinvError: The network has no normalization layer, no residual block and fewer than two layers with weights.
    """
    tap, variables = teacher.tap, teacher.variables
    if find_statistics(variables):
        return tap.layers
    modules = tap.modules(variables)
    norms = [path for path, module in modules.items() if path and NORMALISES.match(module.__name__)]
    places = [*norms, *(path + OUTPUT for path in residual_blocks(teacher))]
    if not places:
        owners = {join_names(path.split('/')[1:-1]) for path, leaf in flatten(variables).items() if np.ndim(leaf) > 1}
        places = [path + OUTPUT for path in modules if path in owners][:-1]
    if not places:
        raise DvinvError(
            'The network has no layer that normalises, no residual block and fewer than two layers with weights; name what '
            'to record by layers, patterns of paths or classes.'
        )
    return in_order(modules, places)


# Operations through which sums are traced back, because they change neither whether an array is a sum nor its summands.
# They occur after a sum, or in a shortcut without weights.
PASSED = ('relu', 'relu6', 'max', 'convert_element_type', 'reshape', 'squeeze', 'transpose', 'copy', 'pad', 'slice')


def residual_blocks(teacher) -> tuple[str, ...]:
    """Returns the paths of the innermost modules that are residual blocks, in the order of their calls.

    A module is a residual block if its output is a sum, perhaps followed by a ReLU, of its input and of a value that depends
    on its input. The other modules of its class then count as well, since they may project their input. Modules inside
    lifted loops (nn.scan) are not examined.
    """
    tap, variables = teacher.tap, teacher.variables
    modules = {path: module for path, module in tap.modules(variables).items() if path}
    places = tuple(place for path in modules for place in (path, path + OUTPUT))
    x = jax.ShapeDtypeStruct((2, *teacher.image_shape), np.float32)

    def arrays(variables, x):
        _, _, kept = tap(variables, x, capture=places)
        return {place: calls[0] for place, calls in kept.items() if isinstance(calls[0], jax.Array)}

    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)(variables, x)
    program = program_of(closed, called_or_jaxs_own)
    value = dict(zip(sorted(shapes), program.outputs, strict=True))  # JAX flattens a dict in sorted order
    pairs = {path: (value[path], value[path + OUTPUT]) for path in modules if {path, path + OUTPUT} <= value.keys()}
    producers = {value: operation for operation in program.operations for value in operation.outputs}
    found = {path for path, (taken, returned) in pairs.items() if _adds(program, producers, taken, returned)}
    inner = {path for path in found if not any(other.startswith(f'{path}/') for other in found)}
    classes = {modules[path] for path in inner}
    blocks = {path for path, module in modules.items() if module in classes}
    return tuple(path for path in modules if path in blocks and not any(other.startswith(f'{path}/') for other in blocks))


def _adds(program: Program, producers: dict, taken, returned) -> bool:
    """Returns whether `returned` is a sum of `taken` and a value that depends on it; `producers` is {value: operation}."""
    depends = {taken}
    for operation in program.operations:
        if not depends.isdisjoint(operation.inputs):
            depends.update(operation.outputs)
    pending, summands, added = [returned], [], False
    while pending:
        value = pending.pop()
        producer = producers.get(value) if value != taken else None
        if producer and producer.name in ('add', 'add_any'):
            pending += producer.inputs
            added = True
        elif producer and producer.name in PASSED:
            pending.append(producer.inputs[0])
        else:
            summands.append(value)
    return added and taken in summands and not depends.isdisjoint({*summands} - {taken})
