"""`--plan`: what the synthesis of a config will cost on the devices at hand, from a few timed steps; nothing is written.

A step is one iteration of all the batches that are inverted side by side.
"""

import dataclasses
import math
import time

import jax
import numpy as np

from dvinv import pipeline
from dvinv.configuration import inversion_config
from dvinv.errors import DvinvError
from dvinv.evaluation import flops
from dvinv.inversion import Stage, balanced_labels
from dvinv.inversion.programs import Programs
from dvinv.networks import Classifier, apply_fn_of, create, shapes_of
from dvinv.runtime.devices import make_mesh, platform_of
from dvinv.runtime.progress import duration
from dvinv.synthesizer import abreast

TIMED_SECONDS = 1.0  # that steps of a stage are timed for, at least; and three of them


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What one stage costs.

    Attributes:
      resolution: height in pixels of what the teacher sees.
      iterations: of a batch.
      gflops: of a step: the forward pass and the gradient with respect to the images, of teacher and competitor.
      seconds: of a step, the median of a few.
      memory: bytes that a device needs for it, weights included.
    """

    resolution: int
    iterations: int
    gflops: float
    seconds: float
    memory: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the whole synthesis costs; times without compilation, measured where `platform` and `devices` say."""

    platform: str
    devices: int  # at work
    images: int
    batches: int
    side_by_side: int  # batches
    stages: tuple[StagePlan, ...]
    compile_seconds: float
    pool_bytes: int  # of pixels and logits

    @property
    def seconds_per_batch(self) -> float:
        """Of one, with others side by side."""
        return sum(stage.iterations * stage.seconds for stage in self.stages) / self.side_by_side

    @property
    def seconds(self) -> float:
        """Of the whole pool."""
        return math.ceil(self.batches / self.side_by_side) * self.seconds_per_batch * self.side_by_side

    def __str__(self) -> str:
        lines = [
            f'{self.images:,} images in {self.batches:,} batches, {self.side_by_side} side by side; '
            f'{self.devices} {self.platform} device{"s" * (self.devices > 1)}',
            f'{"resolution":>10} {"iterations":>10} {"GFLOP/step":>10} {"s/step":>10} {"GFLOP/s":>10} {"MB/device":>10}',
        ]
        lines += [
            f'{stage.resolution:10} {stage.iterations:10,} {stage.gflops:10,.1f} {stage.seconds:10.4f} '
            f'{stage.gflops / stage.seconds:10,.0f} {stage.memory / 1e6:10,.0f}'
            for stage in self.stages
        ]
        lines += [
            f'a batch: {self.seconds_per_batch:,.2f} s',
            f'the whole pool: {self.seconds / 3600:,.2f} h ({duration(self.seconds)}), {self.pool_bytes / 1e6:,.1f} MB',
            f'Not counted: compilation ({duration(self.compile_seconds)} just now), controls, students that learn, scores.',
        ]
        return '\n'.join(lines)


def plan(config) -> Plan:
    """Measure it. The weights of networks that are yet to be trained are zeros here: they cost the same.

    Raises:
      DvinvError: what `pipeline.check` refuses, or a config that optimises no image.
    """
    teacher, group = pipeline.check(config), config.synthesis
    if group.method == 'noise' or config.pool:
        what = f'pool is {config.pool!r}' if config.pool else "synthesis.method is 'noise'"
        raise DvinvError(f'{what}: no image is optimised, so there is nothing to plan.')
    teacher = dataclasses.replace(teacher, variables=_arrays(teacher.variables))
    student = None
    if group.method == 'adaptive':
        module = create(config.student.network, teacher.num_classes, config.student.width)
        weights = _arrays(shapes_of(module, teacher.image_shape))
        student = dataclasses.replace(teacher, apply_fn=apply_fn_of(module), variables=weights)

    settings, mesh = inversion_config(config), make_mesh(config.devices)
    side_by_side = abreast(config, mesh.size)
    mesh = mesh if config.bn_stats == 'global' else make_mesh(side_by_side)
    labels = np.stack([balanced_labels(i, group.batch_size, teacher.num_classes) for i in range(side_by_side)])
    programs = Programs(teacher, settings, mesh, student and student.apply_fn)
    networks = [teacher, student] if student else [teacher]
    stages, seconds = zip(*(_time(programs, stage, labels, networks) for stage in settings.stages), strict=True)
    return Plan(
        platform_of(mesh),
        mesh.size,
        group.images,
        group.images // group.batch_size,
        side_by_side,
        stages,
        sum(seconds),
        group.images * (math.prod(teacher.image_shape) + 4 * teacher.num_classes),
    )


def _time(programs: Programs, stage: Stage, labels: np.ndarray, networks: list[Classifier]) -> tuple[StagePlan, float]:
    """(the stage's plan, seconds of its compilation); `networks` are the teacher and, where there is one, its competitor."""
    height, width, channels = networks[0].image_shape
    shown = *stage.shown_size(height, width), channels
    forward = sum(flops(dataclasses.replace(network, image_shape=shown)) for network in networks)

    iterations = min(programs.dispatch, stage.iterations)
    keys = jax.vmap(jax.random.key)(np.arange(len(labels)))
    state = programs.restart(stage, programs.begin(keys, labels.shape[1]))
    student_variables = programs.everywhere(networks[1].variables if len(networks) > 1 else None)
    arguments = programs.labels(labels), programs.variables, student_variables
    start = time.perf_counter()
    program = programs.advance(stage, iterations).lower(state, *arguments).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    while len(times) < 4 or sum(times) < TIMED_SECONDS:
        start = time.perf_counter()
        state, metrics = program(state, *arguments)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / iterations)
    size = program.memory_analysis()
    memory = size.argument_size_in_bytes + size.output_size_in_bytes + size.temp_size_in_bytes - size.alias_size_in_bytes
    step = StagePlan(shown[0], stage.iterations, 2 * forward * labels.size / 1e9, float(np.median(times[1:])), memory)
    return step, compile_seconds


def _arrays(variables):
    """Variables with zeros for those that are shapes only."""

    def filled(leaf):
        return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(filled, variables)
