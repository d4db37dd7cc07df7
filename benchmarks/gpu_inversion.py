"""Stage 'inversion' of gpu.py: the inversion step in bfloat16 and float32, compared with PyTorch's."""

from pathlib import Path
from typing import NamedTuple

from contestants import Task, dvinv
from gpu_contest import Step, contest, fields
from gpu_report import Item
from torch_contestant import Torch


class Case(NamedTuple):
    """A network and its images; see `contestants.Task`."""

    network: str
    batch: int
    resolution: int
    level: int
    width: float = 1.0
    weights: str = ''  # a file of the data folder; '': drawn


CASES = {
    'resnet50_224': Case('resnet50', 84, 224, 1),
    'resnet50_112': Case('resnet50', 84, 112, 1),
    'cifar_resnet34_32': Case('cifar_resnet34', 256, 32, 2),
    'mobilenet_v1_224': Case('mobilenet_v1', 84, 224, 2, 0.75, 'imagenet_mobilenet_v1_075_224.npz'),
}
REHEARSED = {
    'resnet50_224': Case('vgg11_bn', 2, 32, 1, 1 / 16),
    'resnet50_112': Case('vgg11_bn', 2, 32, 1, 1 / 16),
    'cifar_resnet34_32': Case('vgg11_bn', 2, 32, 2, 1 / 16),
    'mobilenet_v1_224': Case('mobilenet_v1', 2, 48, 2, 1 / 16),
}
DISPATCH = 100  # iterations, as runs on a GPU have them by default


def items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns what the stage measures."""
    about = dict.fromkeys(('network', 'width', 'batch', 'resolution', 'weights', 'iterations_per_dispatch'))
    return {name: Item(case.level, 5 if rehearse else 60, {**about, **fields()}) for name, case in CASES.items()}


def measure(names: list[str], context) -> None:
    """Measures these items."""
    context.in_order(names, lambda name: _measure(name, context))


def _measure(name: str, context) -> None:
    settings = context.settings
    case = (REHEARSED if settings.rehearse else CASES)[name]
    dispatch = 2 if settings.rehearse else DISPATCH
    about = {'network': case.network, 'width': case.width, 'batch': case.batch, 'resolution': case.resolution}
    about |= {'weights': case.weights or 'drawn', 'iterations_per_dispatch': dispatch}
    context.report.record(name, about)
    weights = str(Path(settings.data) / case.weights) if case.weights else ''

    def task(precision: str) -> Task:
        shape = case.network, case.batch, case.resolution, case.width
        return Task(*shape, weights, 1, precision, settings.platform, dispatch, cached=settings.rehearse)

    def make_torch(variant, start, about):
        return Torch, (task('float32'), about, start, variant)

    contest(context, name, Step(lambda precision: (dvinv, (task(precision),)), make_torch, case.batch))
