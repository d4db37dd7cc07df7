"""What step_time.py measures: the inversion step of dvinv, and a loop in PyTorch, each in a process of its own.

So their thread pools and their memory are kept apart. A process sleeps until it is asked for something.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import sys
import time
from typing import NamedTuple

import numpy as np

from dvinv.runtime.errors import DvinvError

# Neither JAX nor PyTorch here: a process imports its own, when it starts.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS = {32: ('cifar10_paper', 10), 224: ('imagenet_2k', 1000)}  # of a network for such images: preset, classes
MATRIX = 2048  # rows and columns of the matrices whose product tells the machine's peak


class Task(NamedTuple):
    """The step to measure."""

    network: str
    batch: int
    resolution: int  # height and width of the images; 0: what the network is made for
    width: float  # of the network
    weights: str  # a file; '': drawn
    devices: int  # of dvinv; on a CPU virtual ones, which share the batch
    precision: str  # of dvinv
    platform: str = 'cpu'  # 'cpu' or 'gpu'
    dispatch: int = 1  # iterations that dvinv runs in one call of its program
    cached: bool = False  # whether dvinv's programs may come from JAX's compilation cache


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, name: str, make, *arguments):
        """Starts the process, which calls `make(*arguments)` for the object that methods are called on."""
        context = multiprocessing.get_context('spawn')
        self._name, (self._pipe, theirs) = name, context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments, within: float | None = None):
        """Calls a method of the contestant and returns its result; see `send` and `receive`."""
        self.send(method, *arguments)
        return self.receive(within)

    def send(self, method: str, *arguments) -> None:
        """Starts a method of the contestant; `receive` returns its result, or says that the process has ended."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send((method, arguments))

    def receive(self, within: float | None = None):
        """Waits for the result of the method that was started last.

        Args:
          within: seconds after which the process is killed; None: no limit.

        Raises:
          DvinvError: the contestant's own error, the process has ended, or it was killed.
        """
        try:
            if within is not None and not self._pipe.poll(max(0.0, within)):
                self.kill()
                raise DvinvError(f'The process of {self._name} gave no result within {within:.0f} s and was killed.')
            refusal, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise DvinvError(
                f'The process of {self._name} ended with status {self._process.exitcode} (-9: most likely for want of '
                'memory); a smaller --batch takes less.'
            ) from None
        if refusal:
            raise DvinvError(refusal)
        return answer

    def kill(self) -> None:
        """Ends the process at once, which frees its memory."""
        self._process.kill()
        self._process.join()


def _serve(pipe, make, arguments) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it this
    try:
        contestant = make(*arguments)
        while True:
            method, arguments = pipe.recv()
            pipe.send((None, getattr(contestant, method)(*arguments)))
    except EOFError:  # the parent is gone
        pass
    except DvinvError as error:
        pipe.send((str(error), None))


def best_of(multiply, times: int = 3) -> float:
    """GFLOP/s of the quickest of a few products of two square matrices, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - begin)
    return 2 * MATRIX**3 / min(seconds[1:]) / 1e9


def matrices() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(0).normal(size=(2, MATRIX, MATRIX)).astype(np.float32))


def host_memory_mb() -> float:
    """Of this process so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def peak_memory_of_jax(platform: str) -> float:
    """Returns MiB: the most that JAX used of the GPU's memory, or this process of the host's."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() if platform == 'gpu' else None
    return statistics['peak_bytes_in_use'] / 2**20 if statistics else host_memory_mb()


# dvinv


def set_up_jax(devices: int, platform: str = 'cpu', cached: bool = False) -> None:
    """Selects JAX's platform, with `devices` virtual devices on a CPU; unless `cached`, every program is compiled afresh."""
    import jax

    from dvinv.runtime.devices import set_cpu_devices

    jax.config.update('jax_platforms', 'cuda,cpu' if platform == 'gpu' else 'cpu')
    jax.config.update('jax_enable_compilation_cache', cached)
    if platform == 'cpu':
        set_cpu_devices(devices)


def drawn(shapes: dict) -> dict:
    """Variables of these shapes as training might leave them: with them activations stay of order 1 in any network.

    A residual block adds little to what it is given, or activations would double with every block.
    """
    rng = np.random.default_rng(0)
    draw = {
        'kernel': lambda shape: rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])),
        'scale': lambda shape: rng.uniform(0.25, 0.75, shape),
        'bias': lambda shape: 0.3 * rng.normal(size=shape),
        'mean': lambda shape: 0.3 * rng.normal(size=shape),
        'var': lambda shape: rng.uniform(0.5, 1.5, shape),
    }
    return {path: draw[path.rpartition('/')[2]](leaf.shape).astype(np.float32) for path, leaf in sorted(shapes.items())}


def teacher_of(task: Task):
    """(the Teacher, its InversionConfig): one batch, split over the devices."""
    from dvinv.config import PRESETS
    from dvinv.inversion import from_linen
    from dvinv.networks import create, image_shape, shapes_of
    from dvinv.networks.classifier import flatten, unflatten
    from dvinv.networks.weights import count_classes, import_weights, read_state_dict

    size, _, channels = image_shape(task.network)
    if size not in SETTINGS:
        raise DvinvError(
            f'{task.network} is made for images of {size} px; choose a network for {" or ".join(map(str, SETTINGS))}.'
        )
    preset, classes = SETTINGS[size]
    shape = (task.resolution or size, task.resolution or size, channels)
    if task.weights:
        state = read_state_dict(task.weights)
        classes = count_classes(lambda n: create(task.network, n, task.width), shape, state)
    module = create(task.network, classes, task.width)
    shapes = flatten(shapes_of(module, shape))
    variables = import_weights(module, shape, state) if task.weights else unflatten(drawn(shapes))
    config = dataclasses.replace(PRESETS[preset], bn_stats='global', precision=task.precision)
    config.validate_for(shape)
    return from_linen(module, variables, image_shape=shape, mean=MEAN, std=STD), config


class Dvinv:
    """The compiled program of `task.dispatch` iterations, called as dvinv's driver calls it."""

    def __init__(self, task: Task):
        import jax

        from dvinv.inversion.programs import Programs
        from dvinv.runtime.devices import make_mesh

        self._task, (self._teacher, self._config) = task, teacher_of(task)
        (self._stage,) = self._config.stages
        self._mesh = make_mesh(task.devices)
        self._programs = Programs(self._teacher, self._config, self._mesh)
        self._labels = np.arange(task.batch, dtype=np.int32) % self._teacher.num_classes
        self._state = self._programs.restart(self._stage, self._programs.begin(jax.random.key(1)[None], task.batch))
        self._step = self._programs.advance(self._stage, task.dispatch)
        self._arguments = self._programs.labels(self._labels[None]), self._programs.variables, None

    def start(self) -> dict:
        """Returns what another contestant needs to take the same first step; compiles no step."""
        offset, mirrored = self._view()
        return {'images': np.array(self._state.parameters), 'labels': self._labels, 'offset': offset, 'mirrored': mirrored}

    def first(self) -> dict:
        """Compiles and runs the first dispatch.

        Returns:
          terms: {name: value} of the loss and its terms at the first iteration.
          gradient: [B, H, W, C] at the first iteration; None where a dispatch has more than one.
          seconds: of the dispatch, with its compilation.
        """
        begin = time.perf_counter()
        metrics = self._advance()
        return {
            'terms': {name: float(values[0]) for name, values in metrics.items()},
            # Adam's first moment, after one step, is this times the gradient.
            'gradient': np.array(self._state.opt_state[0].mu) / (1 - self._stage.beta1)
            if self._task.dispatch == 1
            else None,
            'seconds': time.perf_counter() - begin,
        }

    def _view(self) -> tuple[tuple[int, int], bool]:
        """(roll, flip) of the coming step: read off a picture whose every pixel is its number."""
        import jax

        from dvinv.inversion.augmentation import augmentation_of

        size = self._teacher.image_shape[0]
        numbers = np.arange(size * size, dtype=np.int32).reshape(1, size, size, 1)
        key = jax.random.fold_in(self._state.key, self._state.iteration)
        shown = np.asarray(augmentation_of(self._stage)(key, numbers, self._teacher))[0, :, :, 0]
        ((row, column),) = np.argwhere(shown == 0)
        mirrored = bool(shown[row, column - 1] == 1)
        return (int(row), int(size - 1 - column if mirrored else column)), mirrored

    def _advance(self, dispatches: int = 1) -> dict:
        import jax

        for _ in range(dispatches):
            self._state, metrics = self._step(self._state, *self._arguments)
        jax.block_until_ready(self._state)
        return metrics

    def run(self, steps: int) -> float:
        """Returns seconds a step, of `steps` rounded to whole dispatches."""
        dispatches = max(1, round(steps / self._task.dispatch))
        begin = time.perf_counter()
        self._advance(dispatches)
        return (time.perf_counter() - begin) / (dispatches * self._task.dispatch)

    def about(self) -> dict:
        """What the other contestants are to have alike, and what a step costs."""
        import jax

        from dvinv.evaluation import flops
        from dvinv.networks.classifier import flatten

        return {
            'variables': {path: np.asarray(leaf) for path, leaf in flatten(self._teacher.variables).items()},
            'classes': self._teacher.num_classes,
            'settings': dataclasses.asdict(self._config),
            # Forward, and the gradient with respect to the images, which needs as many.
            'flops': 2 * flops(self._teacher) * self._task.batch,
            'resolution': self._teacher.image_shape[0],
            'version': jax.__version__,
        }

    def peak_gflops(self) -> float:
        """Of a product of matrices, its rows split over the devices."""
        import jax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        from dvinv.runtime.devices import AXIS

        a, b = matrices()
        a = a[: MATRIX - MATRIX % self._mesh.size]  # a little less work than is counted, where they do not divide it
        a, b = (jax.device_put(m, NamedSharding(self._mesh, spec)) for m, spec in ((a, P(AXIS)), (b, P())))
        multiply = jax.jit(lambda a, b: a @ b)
        return best_of(lambda: multiply(a, b).block_until_ready()) * len(a) / MATRIX

    def memory_mb(self) -> float:
        """Returns the peak memory of this process: the GPU's where one is used, else the host's."""
        return peak_memory_of_jax(self._task.platform)


class Sizes:
    """dvinv's step at several sizes, which take turns in one process."""

    def __init__(self, tasks: list[Task]):
        self._steps = [Dvinv(task) for task in tasks]

    def flops(self) -> list[int]:
        """Of a step, a size; compiles them all."""
        for step in self._steps:
            step.run(1)
        return [step.about()['flops'] for step in self._steps]

    def run(self, index: int, steps: int) -> float:
        """Seconds a step of the size at `index`."""
        return self._steps[index].run(steps)

    def about(self) -> dict:
        """As of one step."""
        return self._steps[0].about()


def dvinv(task: Task) -> Dvinv:
    """Makes the contestant in a process of its own."""
    set_up_jax(task.devices, task.platform, task.cached)
    return Dvinv(task)


def sizes(tasks: list[Task]) -> Sizes:
    """For a process of its own."""
    set_up_jax(tasks[0].devices)
    return Sizes(tasks)
