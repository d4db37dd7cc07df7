"""`--plan`: predicts the cost of the tasks of a config on the available devices from a few timed steps; writes nothing.

A step of a synthesis is one iteration of all batches that are inverted side by side. A step of a training is one update.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dvinv.config import Settings, Stage
from dvinv.continual.stream import pools_of
from dvinv.evaluation import flops
from dvinv.inversion import Teacher, balanced_labels
from dvinv.inversion.invert import with_attention
from dvinv.inversion.programs import Programs
from dvinv.networks import Classifier, apply_fn_of, shapes_of
from dvinv.pipeline import tasks as pipeline
from dvinv.pipeline.run import Run
from dvinv.runtime.devices import make_mesh, platform_of
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.progress import duration
from dvinv.synthesis.synthesizer import batches_side_by_side
from dvinv.training.step import TrainStep
from dvinv.training.trainer import PlannedTraining

TIMED_SECONDS = 1.0  # minimum total time of the timed dispatches; at least three are timed after the first
PLANNED = ('teacher', 'distillation', 'pruning', 'continual', 'quantization')  # tasks that train networks


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The cost of one stage of a synthesis.

    Attributes:
      resolution: the height in pixels of the images that the teacher is given.
      iterations: the number of iterations of a batch.
      gflops: GFLOP per step: the forward pass and the gradient with respect to the images, of teacher and competitor.
      seconds: seconds per step, the median over a few dispatches.
      memory: bytes of device memory that the stage needs, including the weights.
      compile_seconds: seconds of compilation.
    """

    resolution: int
    iterations: int
    gflops: float
    seconds: float
    memory: int
    compile_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class SynthesisPlan:
    """The cost of the image pools; times exclude compilation.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      devices: the number of devices in use.
      images, batches: the size of the run's pool.
      side_by_side: the number of batches that are inverted at a time.
      stages: the cost of each stage of a batch.
      pool_bytes: the size of the pixels and logits of the run's pool.
      pools: the total cost as a multiple of the cost of the run's pool. It counts the pool itself, the images without the
        feature term, and the images that other tasks make.
    """

    platform: str
    devices: int
    images: int
    batches: int
    side_by_side: int
    stages: tuple[StagePlan, ...]
    pool_bytes: int
    pools: float = 1.0

    @property
    def seconds_per_batch(self) -> float:
        """Seconds per batch, when `side_by_side` batches are inverted at a time."""
        return sum(stage.iterations * stage.seconds for stage in self.stages) / self.side_by_side

    @property
    def seconds(self) -> float:
        """Seconds of the run's pool."""
        return math.ceil(self.batches / self.side_by_side) * self.seconds_per_batch * self.side_by_side

    @property
    def pflop(self) -> float:
        """Floating-point operations of the run's pool, in units of 1e15."""
        return sum(stage.iterations * stage.gflops for stage in self.stages) / self.side_by_side * self.batches / 1e6

    def __str__(self) -> str:
        """Returns the number of images, a table of the stages, and the time and size of the pool."""
        lines = [
            f'{self.images:,} images in {self.batches:,} batches, {self.side_by_side} side by side; '
            f'{_devices(self.devices, self.platform)}',
            f'{"resolution":>10} {"iterations":>10} {"GFLOP/step":>10} {"s/step":>10} {"GFLOP/s":>10} {"MB/device":>10}',
        ]
        lines += [
            f'{stage.resolution:10} {stage.iterations:10,} {stage.gflops:10,.1f} {stage.seconds:10.4f} '
            f'{stage.gflops / stage.seconds:10,.0f} {stage.memory / 1e6:10,.0f}'
            for stage in self.stages
        ]
        lines += [
            f'a batch: {self.seconds_per_batch:,.2f} s',
            f'the pool: {_hours(self.seconds)}, {self.pflop:,.3g} PFLOP, {self.pool_bytes / 1e6:,.1f} MB',
        ]
        if self.pools > 1:
            lines.append(f'with the images that controls and other tasks need, {self.pools:.3g} times that')
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The cost of the trainings of one kind; times exclude compilation.

    Attributes:
      name: the name of the network.
      networks: the number of networks that are trained in this way.
      updates, batch_size: those of each training.
      gflops: GFLOP per update: forward and backward pass of the network (3 times a forward pass), and the forward pass of
        the teacher if there is one.
      seconds: seconds per update, the median over a few dispatches.
      compile_seconds: seconds of compilation.
    """

    name: str
    networks: int
    updates: int
    batch_size: int
    gflops: float
    seconds: float
    compile_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Seconds of all the networks."""
        return self.networks * self.updates * self.seconds

    @property
    def pflop(self) -> float:
        """Floating-point operations of all the networks, in units of 1e15."""
        return self.networks * self.updates * self.gflops / 1e6

    def __str__(self) -> str:
        """Returns a line of the table of trainings."""
        return (
            f'{self.name:>10} {self.networks:8} {self.updates:9,} {self.batch_size:6} {self.gflops:12,.1f} '
            f'{self.seconds:10.4f} {self.gflops / self.seconds:10,.0f} {self.pflop:10,.3g} {self.total_seconds / 3600:8,.2f}'
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of all tasks of a config.

    Attributes:
      synthesis: the cost of the image pools; None if no image is optimized.
      trainings: the cost of the trainings, one entry per kind of network.
      training_devices: the devices that the trainings were timed on, for instance '2 gpu devices'.
    """

    synthesis: SynthesisPlan | None
    trainings: tuple[TrainingPlan, ...]
    training_devices: str

    @property
    def compile_seconds(self) -> float:
        """Seconds of compilation, which no other figure includes."""
        stages = self.synthesis.stages if self.synthesis else ()
        synthesis = sum(stage.compile_seconds for stage in stages)
        return synthesis + sum(training.compile_seconds for training in self.trainings)

    @property
    def seconds(self) -> float:
        """Seconds of all synthesis and training."""
        synthesis = self.synthesis.pools * self.synthesis.seconds if self.synthesis else 0.0
        return synthesis + sum(training.total_seconds for training in self.trainings)

    @property
    def pflop(self) -> float:
        """Floating-point operations of all synthesis and training, in units of 1e15."""
        synthesis = self.synthesis.pools * self.synthesis.pflop if self.synthesis else 0.0
        return synthesis + sum(training.pflop for training in self.trainings)

    def __str__(self) -> str:
        """Returns the tables of synthesis and trainings, and the total."""
        lines = [str(self.synthesis)] if self.synthesis else []
        if self.trainings:
            lines.append(f'trainings on {self.training_devices}')
            lines.append(
                f'{"training":>10} {"networks":>8} {"updates":>9} {"batch":>6} {"GFLOP/update":>12} {"s/update":>10} '
                f'{"GFLOP/s":>10} {"PFLOP":>10} {"hours":>8}'
            )
            lines += map(str, self.trainings)
        lines += [
            f'all tasks: {_hours(self.seconds)}, {self.pflop:,.3g} PFLOP',
            f'Not counted: compilation ({duration(self.compile_seconds)} just now), scores, report, and pruned networks '
            'that images compete with.',
        ]
        return '\n'.join(lines)


def plan(config) -> Plan:
    """Measures the cost of the tasks of `config`.

    Networks that are yet to be trained get zeros for weights, which does not change the cost.

    Raises:
      DvinvError: as for `tasks.validated`, or the config optimizes no image and trains no network.
    """
    run = pipeline.validated(config)
    settings, mesh, teacher = run.settings, run.training_mesh, run.planned_teacher
    run.planned_teacher = teacher = dataclasses.replace(teacher, variables=_arrays(teacher.variables))
    pools = _pools(settings)
    synthesis = plan_synthesis(run, teacher, pools) if pools else None
    tasks = [task for task in settings.ordered_tasks if task in PLANNED]
    if settings.synthesis.method == 'adaptive' and 'synthesis' in settings.tasks and 'distillation' not in tasks:
        tasks.append('distillation')  # its student is trained while images are made
    jobs = [job for task in tasks for job in pipeline.MODULES[task].planned_trainings(run)]
    if not (synthesis or jobs):
        reason = f'pool is {settings.pool!r}' if settings.pool else f'synthesis.method is {settings.synthesis.method!r}'
        raise DvinvError(f'{reason} and no task trains a network: there is nothing to plan.')
    trainings = tuple(plan_training(job, settings.logging.every, mesh) for job in jobs)
    return Plan(synthesis, trainings, _devices(mesh.size, platform_of(mesh)))


def _pools(settings: Settings) -> float:
    """Returns the cost of the images of all tasks as a multiple of the cost of the run's pool."""
    tasks, method, pruning, continual = settings.tasks, settings.synthesis.method, settings.pruning, settings.continual
    pools = float('synthesis' in tasks and not settings.pool and method != 'noise')
    controls = [getattr(settings, task).controls for task in ('synthesis', 'distillation', 'pruning') if task in tasks]
    pools += any('prior_only' in names for names in controls)
    if 'pruning' in tasks:
        pools += pruning.steps * pruning.adaptive_batches * settings.synthesis.batch_size / settings.synthesis.images
    if 'continual' in tasks and method != 'noise':
        pools += pools_of(continual)
    return pools


def plan_synthesis(run: Run, teacher: Teacher, pools: float) -> SynthesisPlan:
    """Returns the cost of the pools of a run.

    Args:
      run: the run.
      teacher: the teacher, with arrays for weights (not only shapes).
      pools: see `SynthesisPlan`.
    """
    group, student = run.settings.synthesis, None
    if group.method == 'adaptive':
        module = run.student_module(teacher)
        weights = _arrays(shapes_of(module, teacher.image_shape))
        student = dataclasses.replace(teacher, apply_fn=apply_fn_of(module), variables=weights)

    settings, mesh = with_attention(teacher, run.settings.inversion_config()), run.mesh
    side_by_side = batches_side_by_side(run.settings, mesh.size)
    mesh = mesh if settings.bn_stats == 'global' else make_mesh(side_by_side)
    labels = np.stack([balanced_labels(i, group.batch_size, teacher.num_classes) for i in range(side_by_side)])
    programs = Programs(teacher, settings, mesh, student.apply_fn if student else None)
    networks = [teacher, student] if student else [teacher]
    stages = tuple(_time_stage(programs, stage, labels, networks) for stage in settings.stages)
    pool_bytes = group.images * (math.prod(teacher.image_shape) + 4 * teacher.num_classes)
    return SynthesisPlan(platform_of(mesh), mesh.size, group.images, group.batches, side_by_side, stages, pool_bytes, pools)


def _time_stage(programs: Programs, stage: Stage, labels: np.ndarray, networks: Sequence[Classifier]) -> StagePlan:
    """Returns the cost of a stage.

    Args:
      programs: the compiled programs of the inversion.
      stage: the stage.
      labels: the labels of the batches that are inverted side by side, int [batches, B].
      networks: the teacher, and the competitor if there is one.
    """
    height, width, channels = networks[0].image_shape
    view_shape = *stage.view_size(height, width), channels
    forward = sum(flops(dataclasses.replace(network, image_shape=view_shape)) for network in networks)

    iterations = min(programs.dispatch, stage.iterations)
    keys = jax.vmap(jax.random.key)(np.arange(len(labels)))
    state = programs.restart(stage, programs.begin(keys, labels.shape[1]))
    student_variables = programs.everywhere(networks[1].variables if len(networks) > 1 else None)
    arguments = programs.labels(labels), programs.variables, student_variables
    start = time.perf_counter()
    program = programs.advance(stage, iterations).lower(state, *arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = _median_seconds(lambda state: program(state, *arguments), state) / iterations
    size: Any = program.memory_analysis()  # CPUs, GPUs and TPUs all report it
    memory = size.argument_size_in_bytes + size.output_size_in_bytes + size.temp_size_in_bytes - size.alias_size_in_bytes
    gflops = 2 * forward * labels.size / 1e9
    return StagePlan(view_shape[0], stage.iterations, gflops, seconds, memory, compile_seconds)


def plan_training(planned: PlannedTraining, every: int, mesh: Mesh) -> TrainingPlan:
    """Returns the cost of the trainings of `planned` on `mesh`.

    Args:
      planned: the trainings.
      every: the number of updates between two lines of metrics, see `TrainJob.dispatch_length`.
      mesh: the devices of the training.
    """
    settings, like = planned.job.settings, planned.like
    step = TrainStep(planned.module, planned.job, like, mesh, planned.job.dispatch_length(every, platform_of(mesh)))
    rng, count = np.random.default_rng(0), min(planned.job.images, 2 * settings.batch_size)
    step.batches.load(
        rng.integers(0, 256, (count, *like.image_shape), np.uint8), np.arange(count, dtype=np.int32) % like.num_classes
    )
    shape = (step.updates, settings.batch_size) if step.updates > 1 else (settings.batch_size,)
    (batch,) = step.batches.each([rng.integers(0, count, shape, np.int32)])
    key = jax.random.key(0)
    state = step.place(step.initial_state(key))
    start = time.perf_counter()
    state, losses = step(state, batch, key)
    jax.block_until_ready(losses)
    compile_seconds = time.perf_counter() - start
    seconds = _median_seconds(lambda state: step(state, batch, key), state) / step.updates
    network = dataclasses.replace(like, apply_fn=apply_fn_of(planned.module), variables=state.variables)
    forward = 3 * flops(network) + (flops(planned.teacher) if planned.teacher else 0)
    gflops = forward * settings.batch_size / 1e9
    updates, batch_size = settings.updates, settings.batch_size
    return TrainingPlan(planned.name, planned.networks, updates, batch_size, gflops, seconds, compile_seconds)


def _median_seconds(step: Callable, state) -> float:
    """Returns the median seconds of `state, metrics = step(state)`, excluding the first call."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < TIMED_SECONDS:
        start = time.perf_counter()
        state, metrics = step(state)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def _devices(count: int, platform: str) -> str:
    return f'{count} {platform} device{"s" * (count > 1)}'


def _hours(seconds: float) -> str:
    return f'{seconds / 3600:,.2f} h ({duration(seconds)})'


def _arrays(variables):
    """Returns the variables with arrays of zeros in place of `jax.ShapeDtypeStruct` leaves."""

    def filled(leaf):
        return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree.map(filled, variables)
