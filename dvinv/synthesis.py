"""The task `synthesis`: numbered batches of images from the teacher alone, into the pool."""

import dataclasses
import io
from collections import Counter

import jax
import numpy as np

from dvinv import adaptive
from dvinv.configuration import inversion_config, is_trained_here, rounds_of
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import among_top, logits_of
from dvinv.inversion import Teacher, make_feature_loss
from dvinv.networks import Classifier
from dvinv.pools import controls_are_whole, missing_batches, open_pool, put_aside_damaged
from dvinv.runtime import preemption
from dvinv.runtime.files import write_atomic
from dvinv.runtime.pictures import class_grid
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import student_of
from dvinv.synthesizer import control_pool, fill_pool
from dvinv.teacher import check_fits, load, load_verifier, statistics_of


def run(config, workdir) -> dict:
    """Fill the pool (or check the one that the config names), then its controls, and judge it; returns the figures."""
    workdir = open_workdir(workdir, config)
    teacher = load(config, workdir)
    verifier = load_verifier(config, workdir, teacher)
    pool = open_pool(config, workdir, teacher)
    if not config.pool:  # which is finished elsewhere
        _fill(config, workdir, teacher, pool)
    for control in config.synthesis.controls:
        control_pool(config, workdir, teacher, control, 'synthesis')
    _write_samples(workdir, pool)
    return {
        **_judge(pool, verifier),
        'rounds': 1 if config.pool else rounds_of(config).count,
        'statistics': statistics_of(config, workdir, teacher),
        'feature_loss_real': _real_feature_loss(config, teacher, pool),
    }


def _fill(config, workdir: Workdir, teacher: Teacher, pool: ImagePool) -> None:
    """Make what the pool lacks, and what is damaged anew.

    Not what is damaged of a pool that was made against a student, which has learned on: whoever reads the images tells.
    """
    method = config.synthesis.method
    if method == 'adaptive':
        adaptive.fill_pool(config, workdir, teacher, pool, student_of(config, teacher), 'synthesis', method)
        return
    put_aside_damaged(pool, pool.check, 'synthesis')
    fill_pool(config, workdir, teacher, pool, method, 'synthesis', method)


def _judge(pool: ImagePool, verifier: Classifier | None) -> dict:
    """Figures of the images of a finished pool; one shard at a time is in memory."""
    numbers, totals = pool.finished(), Counter()
    for number in numbers:
        preemption.leave_if_asked(alone=True)
        notes, shard = pool.notes(number), pool.read(number)
        labels = shard['labels']
        totals['images'] += len(labels)
        totals['teacher'] += among_top(shard['logits'], labels).sum()
        if verifier:
            logits = logits_of(verifier, shard['images'])
            totals['verifier'] += among_top(logits, labels).sum()
            totals['verifier_top5'] += among_top(logits, labels, 5).sum()
        for end in ('first', 'last'):
            totals[end] += notes[f'feature_loss_{end}'] or 0.0
    matched = notes['feature_loss_last'] is not None  # else the teacher has no statistics
    judges = {'teacher': True, 'verifier': verifier, 'verifier_top5': verifier}
    return {
        'images': totals['images'],
        'batches': len(numbers),
        'iterations': pool.notes(numbers[0])['iterations'],
        **{f'{name}_accuracy': float(totals[name] / totals['images']) if there else None for name, there in judges.items()},
        **{f'feature_loss_{end}': totals[end] / len(numbers) if matched else None for end in ('first', 'last')},
    }


def complete(config, workdir: Workdir) -> bool:
    """Whether its pools have all that the task puts there: who finds a damaged shard puts it aside, controls may be new."""
    whole = bool(config.pool) or not missing_batches(config, ImagePool(workdir.path / 'pool', ''))
    return whole and controls_are_whole(config, workdir, config.synthesis.controls)


def _real_feature_loss(config, teacher: Teacher, pool: ImagePool) -> float | None:
    """R_feature of real training batches of the pool's batch size, under the teacher's own augmentation.

    That is `config.teacher.training`'s, also where the weights come from elsewhere; for a Teacher that a factory returned,
    the last stage's. None without real training images. For reference only, computed when the pool is finished: nothing
    that makes images sees it.
    """
    data = load_real(config.data)
    if data is None or data.train is None or not teacher.statistics(teacher.variables):
        return None
    check_fits(teacher, data)
    stage = inversion_config(config).stages[-1]
    if not config.teacher.factory or is_trained_here('teacher', config):
        recipe = config.teacher.training
        stage = dataclasses.replace(stage, augmentation='crop', jitter=recipe.shift, flip=recipe.flip, noise=recipe.noise)
    measure = make_feature_loss(teacher, stage)
    batches = pool.numbers()
    size = min(pool.notes(batches[0])['images'], len(data.train.labels))
    order = np.random.default_rng(config.seed).permutation(len(data.train.labels))
    losses = []
    for i in range(min(len(batches), len(order) // size)):
        images = data.train.images[order[i * size : (i + 1) * size]]
        losses.append(float(measure(teacher.variables, teacher.normalise(images), jax.random.key(i))))
    return float(np.mean(losses))


def _write_samples(workdir: Workdir, pool: ImagePool) -> None:
    buffer = io.BytesIO()
    class_grid(pool.rows('images'), pool.rows('labels')[:], 16).save(buffer, 'PNG')
    write_atomic(workdir.path / 'samples' / 'grid.png', buffer.getvalue())
