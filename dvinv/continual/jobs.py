"""The training of a chain of `continual` on one task: the network with more classes, the batches and the loss."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dvinv.continual.losses import (
    always_be_dreaming_terms,
    cross_entropy,
    deepinversion_terms,
    lwf_mc_terms,
    total,
)
from dvinv.data.dataset import Split
from dvinv.data.rows import Joined, RowArray
from dvinv.inversion import Teacher, from_linen
from dvinv.inversion.execution import in_precision
from dvinv.inversion.modules import with_classes
from dvinv.inversion.teacher import teacher_of
from dvinv.networks import create, shapes_of
from dvinv.networks.inheritance import head_of
from dvinv.pipeline.run import Run
from dvinv.training.sampling import Rounds
from dvinv.training.step import TrainJob


def network_of(run: Run, teacher: Teacher, num_classes: int) -> Teacher:
    """Returns the teacher's network with `num_classes` classes, and with shapes in place of weights."""
    user_module = run.user_module(teacher)
    make: Callable[..., Teacher]
    if user_module is None:
        module, make = create(run.settings.teacher.network, num_classes, run.settings.teacher.width), from_linen
    else:
        module, make = with_classes(user_module, teacher.image_shape, num_classes), teacher_of
    shapes = shapes_of(module, teacher.image_shape)
    return make(module, shapes, image_shape=teacher.image_shape, mean=teacher.mean, std=teacher.std)


def job_of(
    run: Run, loss: str, current: Teacher, new: Split, old: tuple[RowArray, np.ndarray] | None
) -> tuple[TrainJob, RowArray, np.ndarray]:
    """Returns (job, images, labels) of a task, on new images, and on old ones if there are any.

    All losses get the same number of new images per batch: without old images, a batch is half as large.

    Args:
      loss: the name of the loss.
      current: the network before the task.
      new: the images of the new classes.
      old: the images uint8 [N, H, W, C] of the old classes and their labels int [N], or None.
    """
    settings = run.settings.continual
    loss_fn, head = loss_of(run, loss, current)
    rounds = Rounds(len(new.labels))
    if old is None:
        half = dataclasses.replace(settings, batch_size=settings.batch_size // 2)
        return TrainJob(half, loss_fn, rounds, current.variables, head=head), new.images, new.labels
    old_images, old_labels = old
    job = TrainJob(settings, loss_fn, rounds, current.variables, Rounds(len(old_labels)), head)
    return job, Joined(new.images, old_images), np.concatenate([new.labels, old_labels])


def loss_of(run: Run, name: str, old: Teacher) -> tuple[Callable, str]:
    """Returns (loss of a `TrainJob`, path of the layer to capture or ''); the argument `frozen` is the old network."""
    settings = run.settings.continual
    old = in_precision(old, settings.precision)
    head = head_path(run, old) if name == 'always_be_dreaming' else ''

    def loss(logits, features, x, labels, frozen, progress):
        if name in ('finetune', 'joint'):
            return cross_entropy(logits, labels)
        old_logits = old.apply_fn(frozen, x)
        if name == 'lwf_mc':
            return total(lwf_mc_terms(logits, old_logits, labels), {})
        if name == 'deepinversion':
            terms = deepinversion_terms(logits, old_logits, labels, settings.temperature)
        else:
            ((inputs, head_logits),) = features[head]
            old_head = frozen['params']
            for part in head.split('/'):
                old_head = old_head[part]
            terms = always_be_dreaming_terms(logits, head_logits, inputs, old_logits, labels, old_head)
        return total(terms, settings.weights)

    return loss, head


def head_path(run: Run, teacher: Teacher) -> str:
    """Returns the path of the head, the last layer, of the teacher's network."""
    group, user_module = run.settings.teacher, run.user_module(teacher)
    if user_module is not None:
        return with_classes(user_module, teacher.image_shape, teacher.num_classes + 1).head
    return head_of(lambda classes: create(group.network, classes, group.width), teacher.image_shape)
