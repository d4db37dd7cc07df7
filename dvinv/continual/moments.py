"""Recorded moments of the networks that learn the tasks of `continual`, for a first network with recorded moments.

The moments of the first network do not describe the networks that follow it. The moments of those are recorded right after
each task but the last, from the images that the network has just learned from: synthesized ones of the old classes, and real
ones of the new classes. No real image of an old class is needed.
"""

import numpy as np

from dvinv.continual.chains import name_of, synthesizing
from dvinv.data.rows import RowArray
from dvinv.inversion import Teacher
from dvinv.networks.classifier import MOMENTS
from dvinv.pipeline.run import Run
from dvinv.runtime.processes import is_primary, meet
from dvinv.teacher.task import record_balanced

IMAGES = 100  # the number of images that moments are recorded from, unless the teacher's settings name another


def names_of_moments(run: Run, teacher: Teacher, number: int) -> dict[str, str]:
    """Returns {chain: name of the file of its moments} for the chains that record moments after task `number`."""
    settings = run.settings.continual
    if MOMENTS not in teacher.variables or number == len(settings.steps):
        return {}
    return {chain: f'moments_{name_of(settings, chain, number)}' for chain in synthesizing(settings)}


def with_recorded(run: Run, chain: str, number: int, current: Teacher) -> Teacher:
    """Returns a network with moments to match by images, or as it is if the first network has no recorded moments.

    Args:
      chain: the chain of the network.
      number: the task that the images are made for.
      current: the network of the chain before that task.
    """
    if MOMENTS not in run.teacher.variables:
        return current
    if number == 1:
        return current.with_variables({MOMENTS: run.teacher.variables[MOMENTS]})
    return current.with_moments(run.workdir.network(names_of_moments(run, run.teacher, number - 1)[chain]))


def record(run: Run, network: Teacher, name: str, images: RowArray, labels: np.ndarray) -> None:
    """Records the moments of a network at the places of the teacher's, and writes them to the work directory.

    Args:
      network: the network.
      name: the name of the file of moments; nothing happens if it exists.
      images: the images that the network has learned from, uint8 [N, H, W, C].
      labels: their labels, int [N].
    """
    if run.workdir.has_network(name):
        return
    settings = run.settings
    count = settings.teacher.moments_images or IMAGES
    layers = tuple(run.teacher.variables[MOMENTS])
    moments = record_balanced(network, images, labels, count, settings.continual, settings.seed, layers)
    if is_primary():
        moments.save(run.workdir.network(name))
    meet(f'the moments {name}')
