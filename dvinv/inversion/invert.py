"""Inversion of whole batches, from labels to images: the loop on the host around the compiled programs of programs.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Integer

from dvinv.config import PRESETS, InversionConfig, Stage, preset_for
from dvinv.inversion.programs import make_feature_loss, programs_of
from dvinv.inversion.teacher import Teacher, network_input
from dvinv.runtime.devices import make_mesh, on_mesh, usual_promotions
from dvinv.runtime.errors import DvinvError, listed

REPORT_EVERY = 20  # the least number of iterations between two fetches of the metrics


def validate_resolutions(teacher: Teacher, config: InversionConfig) -> None:
    """Validates, by shapes alone, that the network takes images of the resolution of every stage.

    Raises:
      DvinvError: The network cannot take such images. The message names the stage and quotes the network's error.
    """
    height, width, channels = teacher.image_shape
    for i, stage in enumerate(config.stages):
        size = stage.view_size(height, width)
        if size == (height, width):
            continue
        x = jax.ShapeDtypeStruct((1, *size, channels), np.float32)
        try:
            jax.eval_shape(teacher.apply_fn, teacher.variables, x)
        except Exception as error:  # Flax and JAX raise many kinds here
            reason = str(error).splitlines()[0]
            raise DvinvError(
                f'stages[{i}].resolution is {stage.resolution}, but the network cannot take images of that size: {reason} '
                'Choose 0, for the full image.'
            ) from error


def validate_statistics(teacher: Teacher, config: InversionConfig) -> None:
    """Validates that the network has statistics for the feature term to match, if that term has a weight.

    Raises:
      DvinvError: The network has neither running statistics nor recorded moments. The message names both remedies.
    """
    if config.weights.feature and not teacher.statistics(teacher.variables):
        raise DvinvError(
            f'The network has no running statistics (it has no BatchNorm) and no recorded moments, so the feature term, of '
            f'weight {config.weights.feature}, has nothing to match. Either record the moments of about 100 of its training '
            'images (dvinv.record_moments, or the flag --record_moments) and give them: teacher.moments=FILE, or '
            'from_linen(..., moments=...); or invert it without any, weights.feature=0, by the prior alone.'
        )


def with_attention(teacher: Teacher, config: InversionConfig) -> InversionConfig:
    """Returns the settings as `Programs` takes them: if attention has a weight, its patterns become places in the network.

    Raises:
      DvinvError: See `attention_of`.
    """
    return (
        dataclasses.replace(config, attention=attention_of(teacher, config)) if config.weights.patch_similarity else config
    )


def attention_of(teacher: Teacher, config: InversionConfig) -> tuple[str, ...]:
    """Returns the places of the attention outputs from which the patch similarity term is computed.

    Raises:
      DvinvError: The network has no such layers, or they are inside lifted loops.
    """
    places, x = teacher.tap.find(teacher.variables, config.attention), np.zeros((1, *teacher.image_shape), np.float32)
    _, _, captured = jax.eval_shape(lambda v, x: teacher.tap(v, x, capture=places), teacher.variables, x)
    missed = [place for place in places if not all(getattr(call, 'ndim', 0) > 2 for call in captured.get(place, [None]))]
    if missed:
        raise DvinvError(
            f'weights.patch_similarity is {config.weights.patch_similarity}, but {missed[0]}, which attention names, is not '
            'an array of patches [B, ..., C] that can be captured; name layers that return one, or set the weight to 0.'
        )
    return places


def takes_resolutions(teacher: Teacher, config: InversionConfig) -> bool:
    """Returns whether the network takes the resolutions of all stages; a network that flattens its input takes only one."""
    try:
        validate_resolutions(teacher, config)
    except DvinvError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Inversion:
    """The result of an inversion: one or several finished batches.

    Attributes:
      images: The images of the last iteration, not of the iteration with the lowest loss: [..., B, H, W, C] float32,
        normalised.
      metrics: {'loss' or the name of an unweighted term: [..., iterations] float32}. Each value is computed before the
        update of its iteration.
      labels: The classes of the images, int [..., B], or None if they were not kept.
    """

    images: Float[np.ndarray, '*n B H W C']
    metrics: dict[str, Float[np.ndarray, '*n iterations']]
    labels: Integer[np.ndarray, '*n B'] | None = None

    def __repr__(self):
        """Returns one line with the shapes, labels, number of iterations and mean final loss, without the arrays."""
        parts = [f'images {self.images.dtype} {[*self.images.shape]}']
        if self.labels is not None:
            parts.append(f'labels {listed([str(label) for label in np.ravel(self.labels)])}')
        if 'loss' in self.metrics:
            losses = self.metrics['loss']
            parts.append(f'{losses.shape[-1]} iterations, final loss {losses[..., -1].mean():.4g}')
        return f'Inversion({", ".join(parts)})'


@dataclasses.dataclass(frozen=True)
class BatchCheckpoint:
    """The state of one batch in the middle of its inversion, on the host.

    Together with the batch's key, labels and config it resumes the inversion bit for bit.

    Attributes:
      iterations: The number of finished iterations, at least 1.
      state: The arrays of this batch that `Programs.take` returns.
      metrics: {term: [iterations] float32}.
    """

    iterations: int
    state: list[np.ndarray]
    metrics: dict[str, Float[np.ndarray, ' iterations']]


def balanced_labels(number: int, batch_size: int, num_classes: int) -> Integer[np.ndarray, ' B']:
    """Returns the labels of batch `number`, int32 [B]: all classes in turn, continued from the end of the previous batch."""
    return ((np.arange(batch_size, dtype=np.int64) + number * batch_size) % num_classes).astype(np.int32)


def validate_labels(labels, num_classes: int) -> None:
    """Validates that labels are a vector of integers in [0, num_classes).

    Raises:
      DvinvError: They are not.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DvinvError(f'Labels must be a vector of integers; these are {labels.dtype} of shape {labels.shape}.')
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise DvinvError(f'Label {wrong[0]} is out of range: the network has {num_classes} classes, 0 to {num_classes - 1}.')


def make_inverter(teacher: Teacher, config: InversionConfig, mesh: Mesh, student_fn: Callable | None = None):
    """Returns a function that inverts many batches on one mesh and is compiled once.

    Args:
      teacher: The network to invert.
      config: The settings of the inversion.
      mesh: The devices.
      student_fn: (student_variables, x) -> logits, in eval mode: the student of Adaptive DeepInversion; None for plain
        DeepInversion.

    Returns:
      `run(keys, labels, student_variables=None, on_chunk=None, begun=None, pause=None) -> Inversion`, which inverts n
      batches at a time, where n is the mesh's size in `device` mode and 1 in `global` mode.
        keys: random keys [n].
        labels: int [n, B].
        on_chunk: `on_chunk(iterations done, {term: mean of the last iteration})`, called as chunks finish.
        begun: a list of n `BatchCheckpoint`s, all after the same number of iterations, from which the inversion resumes.
        pause: `pause(take)`, called between two dispatches; `take()` returns the n batches as a list of `BatchCheckpoint`s.

    Raises:
      DvinvError: The settings do not fit the network or its images.
    """
    config.validate_for(teacher.image_shape)
    validate_statistics(teacher, config)
    config = with_attention(teacher, config)
    programs, split = programs_of(teacher, config, mesh, student_fn), config.bn_stats == 'global'
    if not programs.checked:
        validate_resolutions(teacher, config)
        programs.checked = True
    variables = programs.everywhere(teacher.variables)

    def run(keys, labels, student_variables=None, on_chunk=None, begun=None, pause=None) -> Inversion:
        labels = np.asarray(labels)
        validate_labels(labels.ravel(), teacher.num_classes)
        batches, batch_size = labels.shape
        if split and batch_size % mesh.size:
            raise DvinvError(
                f'A batch of {batch_size} images cannot be split evenly over {mesh.size} devices '
                f"(bn_stats='global'); choose a batch_size that {mesh.size} divides, or other devices."
            )
        expected = 1 if split else mesh.size
        if batches != expected:
            raise ValueError(f'this inverter takes {expected} batches at a time, not {batches}')
        asked, labels, student_variables = labels, programs.labels(labels), programs.everywhere(student_variables)
        log = _Log(on_chunk, most=-(-REPORT_EVERY // programs.dispatch))
        state, done = programs.begin(keys, batch_size), 0
        if begun:
            done = begun[0].iterations
            state = programs.put(_stage_of(config, done - 1), state, [batch.state for batch in begun])
            log.history.append(_joined([batch.metrics for batch in begun], split))

        def take() -> list[BatchCheckpoint]:
            log.collect()
            metrics = _parted(log.terms(), batches, split)
            return [BatchCheckpoint(done, *parts) for parts in zip(programs.take(state), metrics, strict=True)]

        first, start = 0, done
        for stage in config.stages:
            left = max(0, first + stage.iterations - max(done, first))
            if left == stage.iterations:
                state = programs.restart(stage, state)
            for length in _chunks(left, programs.dispatch):
                if pause is not None and done > start:
                    pause(take)
                state, metrics = programs.advance(stage, length)(state, labels, variables, student_variables)
                done += length
                log.add(metrics)
            first += stage.iterations
        log.collect()
        images = programs.finish(state)
        if not np.isfinite(images).all():  # because of the very last update, after which no loss is computed
            raise DvinvError(
                f'The images are not finite after the last of {config.iterations} iterations: lower the learning rate.'
            )
        metrics = log.terms()
        return Inversion(images, {term: values[None] for term, values in metrics.items()} if split else metrics, asked)

    return run


def invert(
    teacher: Teacher,
    labels,
    config: InversionConfig | str | None = None,
    key: jax.Array | int = 0,
    *,
    student_fn: Callable | None = None,
    student_variables=None,
    mesh: Mesh | None = None,
) -> Inversion:
    """Synthesizes one batch of images that `teacher` classifies as `labels` and that match its BatchNorm statistics.

    Args:
      teacher: The network to invert.
      labels: int [B], the class of each image.
      config: The settings, or the name of one of `PRESETS`. None selects the preset for images of this size, see
        `preset_for`.
      key: The batch's random key, or the integer that seeds one. The same key, labels and config give the same images.
      student_fn, student_variables: The student of Adaptive DeepInversion, in eval mode; None for plain DeepInversion.
      mesh: The devices for `bn_stats = 'global'` (default: all). In `device` mode a single batch is inverted on one device.

    Returns:
      An `Inversion` with images [B, H, W, C] float32, normalised; `teacher.to_uint8` converts them to pixels.

    Raises:
      DvinvError: Labels are out of range, the settings do not fit the images, the number of devices does not divide the
        batch, or a loss is not finite (the message names the iteration and the term).
    """
    config = _settings(config, teacher)
    labels, (key_data, kind) = np.asarray(labels), _key_data(key)
    validate_labels(labels, teacher.num_classes)
    mesh = (mesh or make_mesh()) if config.bn_stats == 'global' else make_mesh(1)
    with on_mesh(mesh), usual_promotions():
        run = make_inverter(teacher, config, mesh, student_fn)
        result = run(jax.random.wrap_key_data(key_data[None], impl=kind), labels[None], student_variables)
    return Inversion(result.images[0], {term: values[0] for term, values in result.metrics.items()}, labels)


def _settings(config, teacher: Teacher) -> InversionConfig:
    """Returns the settings that the argument `config` of `invert` denotes."""
    if config is None:
        preset = PRESETS[preset_for(teacher.image_shape)]
        if takes_resolutions(teacher, preset):
            return preset
        return dataclasses.replace(preset, stages=tuple(dataclasses.replace(stage, resolution=0) for stage in preset.stages))
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    if not isinstance(config, InversionConfig):
        raise DvinvError(
            f'config is {config!r}; it must be a dvinv.InversionConfig, or the name of a preset: {", ".join(PRESETS)}. '
            'Without one, the preset is chosen by the size of the images.'
        )
    return config


def _key_data(key) -> tuple[Any, Any]:
    """Returns (bits uint32, implementation) of one random key, typed or raw uint32, or of the key that an integer seeds."""
    is_array = isinstance(key, jax.Array | np.ndarray | np.generic)
    dtype, shape = (key.dtype, key.shape) if is_array else (type(key) if isinstance(key, int) else object, ())
    if shape == () and jax.dtypes.issubdtype(dtype, np.integer) and -(2**63) <= key < 2**63:
        key = jax.random.key(int(key))
    elif is_array and dtype == np.uint32 and shape == np.shape(jax.random.key_data(jax.random.key(0))):
        key = jax.random.wrap_key_data(key)
    elif not (is_array and shape == () and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)):
        what = f'{dtype} of shape {shape}' if is_array else repr(key)
        raise DvinvError(f'key is {what}; it must be one random key, for instance jax.random.key(0), or an integer as seed.')
    return np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)


def feature_loss(teacher: Teacher, images, config: InversionConfig | str | None = None, key: jax.Array | int = 0) -> float:
    """Computes how far the BatchNorm inputs of a batch, synthesized or real, are from the running statistics (R_feature).

    The value of a batch of real images shows what can be reached. Compare batches of the same size, since the moments of
    small batches are further from the running statistics.

    Args:
      teacher: The network.
      images: Pixels uint8 [B, H, W, C], or normalised floats such as `Inversion.images`.
      config: See `invert`. The images are augmented as in its last stage.
      key: The random key of the augmentation, or the integer that seeds one.

    Raises:
      DvinvError: The images do not have the shape that the teacher takes or are not normalised, or the network has neither
        running statistics nor recorded moments.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != tuple(teacher.image_shape) or not len(images):
        shape = ', '.join(map(str, teacher.image_shape))
        raise DvinvError(f'The images have the shape {images.shape}; the network takes [B, {shape}].')
    if not teacher.statistics(teacher.variables):
        raise DvinvError('The network has no running statistics and no recorded moments to set the images against.')
    stage, (key_data, kind) = _settings(config, teacher).stages[-1], _key_data(key)
    with usual_promotions():
        x, measure = network_input(teacher, images), make_feature_loss(teacher, stage)
        return float(measure(teacher.variables, x, jax.random.wrap_key_data(key_data, impl=kind)))


def _stage_of(config: InversionConfig, iteration: int) -> Stage:
    """Returns the stage to which an iteration of a batch belongs."""
    ends = np.cumsum([stage.iterations for stage in config.stages])
    return config.stages[int(np.searchsorted(ends, iteration, side='right'))]


def _chunks(iterations: int, most: int) -> list[int]:
    """Returns the numbers of iterations of the dispatches of a stage: equal ones, then the remainder."""
    full, rest = divmod(iterations, most)
    return [most] * full + [rest] * bool(rest)


class _Log:
    """The metrics of finished chunks, fetched some chunks late so that the devices never wait for the host.

    Attributes:
      history: A dict {term: [..., iterations]} for each chunk, in order.
    """

    def __init__(self, on_chunk: Callable | None, most: int):
        self._on_chunk, self._most = on_chunk, most
        self._pending: list[dict] = []
        self.history: list[dict[str, np.ndarray]] = []

    def add(self, metrics: dict) -> None:
        """Adds the metrics of a dispatched chunk; those of older chunks may be fetched while it runs."""
        if len(self._pending) >= self._most:
            self.collect()
        self._pending.append(metrics)

    def terms(self) -> dict[str, np.ndarray]:
        """Returns {term: [..., iterations]} of all fetched chunks."""
        return {term: np.concatenate([part[term] for part in self.history], -1) for term in self.history[0]}

    def collect(self) -> None:
        """Fetches the metrics of all chunks added so far, validates them, and reports those of the last iteration.

        Raises:
          DvinvError: A value is not finite.
        """
        pending, self._pending = self._pending, []
        for metrics in jax.device_get(pending):
            self._check(metrics, sum(part['loss'].shape[-1] for part in self.history))
            self.history.append(metrics)
        if pending and self._on_chunk is not None:
            self._on_chunk(
                sum(part['loss'].shape[-1] for part in self.history),
                {term: float(values[..., -1].mean()) for term, values in self.history[-1].items()},
            )

    def _check(self, metrics: dict, done: int) -> None:
        bad = {
            term: int(np.argmin(np.isfinite(np.atleast_2d(values)).all(0)))
            for term, values in metrics.items()
            if not np.isfinite(values).all()
        }
        if bad:
            # The loss is the sum of the terms: name a term rather than the loss where both became non-finite at once.
            term = min(bad, key=lambda name: (bad[name], name == 'loss'))
            if term == 'cross_entropy' and done + bad[term] == 0 and np.isposinf(np.atleast_2d(metrics[term])[:, 0]).any():
                raise DvinvError(
                    'The cross-entropy is infinite before the first update: a class that images are asked of has a logit of '
                    '-inf, as of a masked class. Leave it out of the labels, or of synthesis.classes.'
                )
            raise DvinvError(
                f'The term {term} is not a finite number at iteration {done + bad[term]} of the inversion: '
                "lower the learning rate or its weight, or look for NaNs in the teacher's weights."
            )


def _parted(terms: dict, batches: int, split: bool) -> list[dict]:
    """Splits the metrics of all batches into one dict {term: [iterations]} per batch."""
    return [terms] if split else [{term: values[row] for term, values in terms.items()} for row in range(batches)]


def _joined(parts: list[dict], split: bool) -> dict:
    """Joins the metrics of the batches: the inverse of `_parted`."""
    return parts[0] if split else {term: np.stack([part[term] for part in parts]) for term in parts[0]}
