"""Stage 'training' of gpu.py: the train step of a student in bfloat16 and float32, compared with PyTorch's."""

import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from contestants import MEAN, STD, drawn, peak_memory_of_jax, set_up_jax
from gpu_contest import Step, contest, fields
from gpu_report import Item
from torch_contestant import Variant, on_device, peak_memory_of_torch, set_up_torch, synchronize

NAME = 'cifar_resnet34_to_cifar_resnet18'
SIZE, CLASSES, TEMPERATURE = 32, 10, 3.0


class Pair(NamedTuple):
    """Teacher and student, and how the student is trained."""

    teacher: str
    student: str
    width: float
    batch: int
    images: int  # of the pool, random pixels
    precision: str  # of dvinv
    platform: str
    dispatch: int  # updates that dvinv makes in one call of its program


def items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns what the stage measures."""
    about = dict.fromkeys(('teacher', 'student', 'width', 'batch', 'updates_per_dispatch'))
    return {NAME: Item(1, 5 if rehearse else 60, {**about, **fields()})}


def measure(names: list[str], context) -> None:
    """Measures these items."""
    context.in_order(names, lambda name: _measure(name, context))


def _measure(name: str, context) -> None:
    settings = context.settings
    pair = Pair('cifar_resnet34', 'cifar_resnet18', 1.0, 256, 25_600, '', settings.platform, 50)
    if settings.rehearse:
        pair = Pair('vgg11_bn', 'vgg11_bn', 1 / 16, 8, 32, '', settings.platform, 2)
    about = {field: getattr(pair, field) for field in ('teacher', 'student', 'width', 'batch')}
    context.report.record(name, {**about, 'updates_per_dispatch': pair.dispatch})

    def make_torch(variant, start, about):
        return TorchContestant, (pair, about, start, variant)

    contest(
        context, name, Step(lambda precision: (DvinvTraining, (pair._replace(precision=precision),)), make_torch, pair.batch)
    )


class DvinvTraining:
    """dvinv's train step, as its training loop calls it."""

    def __init__(self, pair: Pair):
        """Draws networks and images."""
        set_up_jax(1, pair.platform, cached=pair.platform == 'cpu')
        import jax

        from dvinv.config import default_config, parse
        from dvinv.distillation.student import hints_of, job_of
        from dvinv.inversion import from_linen
        from dvinv.networks import create, shapes_of
        from dvinv.networks.classifier import flatten, unflatten
        from dvinv.pipeline.run import Run
        from dvinv.runtime.devices import make_mesh
        from dvinv.training.step import Rounds, TrainStep

        config, shape = default_config('cifar10_crop'), (SIZE, SIZE, 3)
        config.student.update(network=pair.student, width=pair.width)
        config.distillation.update(**_recipe(pair), precision=pair.precision)
        modules = [create(network, CLASSES, pair.width) for network in (pair.teacher, pair.student)]
        variables = [unflatten(drawn(flatten(shapes_of(module, shape)))) for module in modules]
        self._teacher = from_linen(modules[0], variables[0], image_shape=shape, mean=MEAN, std=STD)
        self._student = from_linen(modules[1], variables[1], image_shape=shape, mean=MEAN, std=STD)
        run = Run(parse(config))
        self._job = job_of(run, self._teacher, Rounds(pair.images), hints_of(run, self._teacher))
        self._train_step = TrainStep(modules[1], self._job, self._teacher, make_mesh(1), pair.dispatch)
        self._images, labels = (
            np.random.default_rng(0).integers(0, 256, (pair.images, *shape), np.uint8),
            np.zeros(pair.images),
        )
        self._train_step.batches.load(self._images, labels.astype(np.int32))
        self._pair, self._step, self._key = pair, 0, self._train_step.place(jax.random.key(1))
        self._state = self._train_step.place(self._train_step.initial_state(jax.random.key(0), variables[1]))

    def start(self) -> dict:
        """Returns the augmented first batch, which another contestant needs to compute the same loss."""
        import jax

        from dvinv.inversion.augmentation import augmentation_of

        key, _ = jax.random.split(jax.random.fold_in(self._key, 0))
        images = self._images[self._job.rows(0, 0)]
        x = augmentation_of(self._job.settings)(key, self._teacher.normalise(images), self._teacher)
        return {'x': np.asarray(x), 'images': self._images}

    def first(self) -> dict:
        """Compiles and runs the first dispatch; see `contestants.Dvinv.first`."""
        begin = time.perf_counter()
        losses = self._advance(1)
        return {'terms': {'loss': float(np.ravel(losses)[0])}, 'seconds': time.perf_counter() - begin}

    def _advance(self, dispatches: int):
        import jax

        dispatch = self._pair.dispatch
        firsts = range(self._step, self._step + dispatches * dispatch, dispatch)
        rows = (np.stack([self._job.rows(0, first + i) for i in range(dispatch)]) for first in firsts)
        for chosen in self._train_step.batches.each(rows):
            self._state, losses = self._train_step(self._state, chosen, self._key)
        self._step += dispatches * dispatch
        return jax.block_until_ready(losses)

    def run(self, steps: int) -> float:
        """Returns seconds a step, of `steps` rounded to whole dispatches."""
        dispatches = max(1, round(steps / self._pair.dispatch))
        begin = time.perf_counter()
        self._advance(dispatches)
        return (time.perf_counter() - begin) / (dispatches * self._pair.dispatch)

    def about(self) -> dict:
        """Returns the weights, and the operations of a step: the teacher's forward pass, three times the student's."""
        from dvinv.evaluation import flops
        from dvinv.networks.classifier import flatten

        networks = {'teacher': self._teacher, 'student': self._student}
        return {
            **{
                name: {path: np.asarray(leaf) for path, leaf in flatten(network.variables).items()}
                for name, network in networks.items()
            },
            'flops': (flops(self._teacher) + 3 * flops(self._student)) * self._pair.batch,
        }

    def memory_mb(self) -> float:
        """Returns the peak memory of this process: the GPU's where one is used, else the host's."""
        return peak_memory_of_jax(self._pair.platform)


class TorchContestant:
    """The same step in PyTorch."""

    def __init__(self, pair: Pair, about: dict, start: dict, variant: Variant):
        """Builds the networks; `about` and `start` are what dvinv's methods of these names return."""
        import torch
        import torch_networks
        from torch_distillation import TorchDistillation

        set_up_torch(pair.platform)
        self._device, networks = torch.device(on_device(pair.platform)), []
        for role in ('teacher', 'student'):
            network = torch_networks.create(getattr(pair, role), CLASSES, pair.width)
            torch_networks.load(network, about[role])
            networks.append(network.to(self._device))
        recipe = SimpleNamespace(**_recipe(pair))
        self._training = TorchDistillation(*networks, start['images'], MEAN, STD, recipe, variant)
        self._x = start['x']

    def first(self) -> dict:
        """Takes the first step on dvinv's batch; `seconds` includes torch.compile's."""
        begin = time.perf_counter()
        loss = self._training.step(self._x).item()
        return {'terms': {'loss': loss}, 'seconds': time.perf_counter() - begin}

    def run(self, steps: int) -> float:
        """Returns seconds a step."""
        synchronize(self._device)
        begin = time.perf_counter()
        for _ in range(steps):
            self._training.step()
        synchronize(self._device)
        return (time.perf_counter() - begin) / steps

    def about(self) -> dict:
        """Returns how the networks were compiled."""
        return {'compile_mode': self._training.compile_mode}

    def memory_mb(self) -> float:
        """Returns the peak memory of this process: the GPU's where one is used, else the host's."""
        return peak_memory_of_torch(self._device)


def _recipe(pair: Pair) -> dict:
    """Returns what both frameworks train with, by the names of the config."""
    return {
        'updates': 10**6,
        'batch_size': pair.batch,
        'optimizer': 'sgd',
        'learning_rate': 0.01,
        'weight_decay': 5e-4,
        'shift': 4,
        'flip': True,
        'temperature': TEMPERATURE,
    }
