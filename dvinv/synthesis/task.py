"""The task `synthesis`: fills the pool with numbered batches of images made from the teacher without data."""

import dataclasses
import io
from collections import Counter

import jax
import numpy as np

from dvinv.data.grids import class_grid
from dvinv.data.pool import ImagePool
from dvinv.distillation import student
from dvinv.evaluation.scoring import among_top, logits_of, validate_fits
from dvinv.inversion import make_feature_loss
from dvinv.networks import Classifier
from dvinv.pipeline.run import Run
from dvinv.runtime import preemption
from dvinv.runtime.files import write_atomic
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis.adaptive import fill_in_competition, synthesizer
from dvinv.synthesis.pools import controls_are_complete, missing_batches, open_pool
from dvinv.synthesis.synthesizer import control_pool, fill_pool
from dvinv.teacher import task as teacher
from dvinv.training.sampling import rounds_of


def validate(run: Run) -> None:
    """Validates, before anything is written, that the images of the task can be made and judged.

    Raises:
      DvinvError: they cannot; the message names the field, its value and the remedy.
    """
    run.once(teacher.validate_verifier)
    run.once(synthesizer.validate_stages if run.settings.pool else synthesizer.validate)
    if run.settings.synthesis.controls:
        run.once(synthesizer.validate)
    if run.settings.trains_student:
        run.once(student.validate)


def run(run: Run) -> dict:
    """Fills the pool (or checks the one that the settings name) and the pools of the controls; returns the figures."""
    pool = open_pool(run)
    if not run.settings.pool:  # a pool that the settings name was finished elsewhere
        _fill(run, pool)
    for control in run.settings.synthesis.controls:
        control_pool(run, control, 'synthesis')
    _write_samples(run.workdir, pool)
    return {
        **_judge(pool, run.verifier),
        'statistics': teacher.statistics_of(run),
        'rounds': 1 if run.settings.pool else rounds_of(run.settings).count,
        'feature_loss_real': _real_feature_loss(run, pool),
    }


def _fill(run: Run, pool: ImagePool) -> None:
    """Makes the missing batches of the pool, and the damaged ones again.

    Damaged batches of an adaptive pool are not made again here, because the student has been trained further since. The code
    that reads the images reports the damage.
    """
    method = run.settings.synthesis.method
    if method == 'adaptive':
        fill_in_competition(run, run.teacher, pool, student.student_of(run, run.teacher), 'synthesis', method)
        return
    fill_pool(run, run.teacher, pool, method, 'synthesis', method)


def _judge(pool: ImagePool, verifier: Classifier | None) -> dict:
    """Returns the figures of the images of a finished pool; reads one shard at a time into memory."""
    numbers, feature_losses = pool.finished(), {'first': 0.0, 'last': 0.0}
    counts: Counter[str] = Counter()  # of images, and of those that each network classifies correctly
    for number in numbers:
        preemption.leave_if_asked(single_process_only=True)
        sidecar, shard = pool.sidecar(number), pool.read(number)
        labels = shard['labels']
        counts['images'] += len(labels)
        counts['teacher'] += among_top(shard['logits'], labels).sum()
        if verifier:
            logits = logits_of(verifier, shard['images'])
            counts['verifier'] += among_top(logits, labels).sum()
            counts['verifier_top5'] += among_top(logits, labels, 5).sum()
        for end in feature_losses:
            feature_losses[end] += sidecar[f'feature_loss_{end}'] or 0.0
    matched = sidecar['feature_loss_last'] is not None  # otherwise the teacher has no statistics
    accuracies = {name: float(count / counts['images']) for name, count in counts.items()}
    return {
        'images': counts['images'],
        'batches': len(numbers),
        'iterations': pool.sidecar(numbers[0])['iterations'],
        **{f'{name}_accuracy': accuracies.get(name) for name in ('teacher', 'verifier', 'verifier_top5')},
        **{f'feature_loss_{end}': total / len(numbers) if matched else None for end, total in feature_losses.items()},
    }


def complete(run: Run) -> bool:
    """Returns whether the pools of the task are complete; shards may be in quarantine, and controls may have been added."""
    synthesis = run.settings.synthesis
    complete = bool(run.settings.pool) or not missing_batches(synthesis, ImagePool(run.workdir.path / 'pool', ''))
    return complete and controls_are_complete(run, synthesis.controls)


def _real_feature_loss(run: Run, pool: ImagePool) -> float | None:
    """Returns R_feature of real training batches of the pool's batch size, under the augmentation of the teacher's training.

    The augmentation is that of `teacher.training`, also if the weights are given; for a Teacher that a factory returned, it
    is that of the last stage. The value is None without real training images or without statistics. It is for reference
    only and is computed when the pool is finished; the synthesis does not use it.
    """
    data, network = run.data, run.teacher
    if data is None or data.train is None or not network.statistics(network.variables):
        return None
    validate_fits(network, data)
    stage = run.settings.inversion_config().stages[-1]
    if not run.settings.teacher.factory or run.is_trained_here('teacher'):
        training = run.settings.teacher.training
        stage = dataclasses.replace(
            stage, augmentation='crop', jitter=training.shift, flip=training.flip, noise=training.noise
        )
    measure = make_feature_loss(network, stage)
    batches = pool.numbers()
    size = min(pool.sidecar(batches[0])['images'], len(data.train.labels))
    order = np.random.default_rng(run.settings.seed).permutation(len(data.train.labels))
    losses = []
    for i in range(min(len(batches), len(order) // size)):
        images = data.train.images[order[i * size : (i + 1) * size]]
        losses.append(float(measure(network.variables, network.normalise(images), jax.random.key(i))))
    return float(np.mean(losses))


def _write_samples(workdir: Workdir, pool: ImagePool) -> None:
    buffer = io.BytesIO()
    class_grid(pool.rows('images'), pool.rows('labels')[:], 16).save(buffer, 'PNG')
    write_atomic(workdir.path / 'samples' / 'grid.png', buffer.getvalue())
