"""The task `synthesis`: numbered batches of images from the teacher alone, into the pool."""

import dataclasses
import io

import jax
import numpy as np

from dvinv import adaptive
from dvinv.configuration import inversion_config, rounds_of
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import logits_of, top_accuracy
from dvinv.inversion import Teacher, make_feature_loss
from dvinv.runtime.files import write_atomic
from dvinv.runtime.pictures import class_grid
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.sharing import await_batches, drop_measurements
from dvinv.synthesizer import all_batches, fill_pool, missing_batches, open_pool
from dvinv.teacher import check_fits, load, load_verifier


def run(config, workdir) -> dict:
    """Fill the pool (or check the one that the config names) and judge it; returns the figures."""
    workdir = open_workdir(workdir, config)
    teacher = load(config, workdir)
    verifier = load_verifier(config, workdir, teacher)
    pool = open_pool(config, workdir, teacher)
    method = config.synthesis.method
    if config.pool:
        pass  # finished elsewhere
    elif method == 'adaptive':
        adaptive.fill_pool(config, workdir, teacher, pool)
    else:
        fill_pool(config, workdir, teacher, pool, method, 'synthesis', method, workdir.processes)
        await_batches(workdir, pool, all_batches(config), method)
    drop_measurements(workdir)
    images = pool.read_all()
    _write_samples(workdir, images)
    notes = [pool.notes(number) for number in pool.numbers()]
    verdict = logits_of(verifier, images['images']) if verifier else None
    return {
        'images': len(images['labels']),
        'batches': len(notes),
        'rounds': 1 if config.pool else rounds_of(config).count,
        'iterations': notes[0]['iterations'],
        'teacher_accuracy': top_accuracy(images['logits'], images['labels']),
        'verifier_accuracy': top_accuracy(verdict, images['labels']) if verifier else None,
        'verifier_top5_accuracy': top_accuracy(verdict, images['labels'], 5) if verifier else None,
        'feature_loss_first': float(np.mean([note['feature_loss_first'] for note in notes])),
        'feature_loss_last': float(np.mean([note['feature_loss_last'] for note in notes])),
        'feature_loss_real': _real_feature_loss(config, teacher, notes),
    }


def complete(config, workdir: Workdir) -> bool:
    """Whether the pool still has all that the finished task put there: a damaged shard is deleted by its owner."""
    return bool(config.pool) or not missing_batches(config, ImagePool(workdir.path / 'pool', ''))


def _real_feature_loss(config, teacher: Teacher, notes: list[dict]) -> float | None:
    """R_feature of real training batches of the pool's batch size, under the teacher's own augmentation.

    That is `config.teacher.training`'s, also where the weights come from elsewhere; for a factory's teacher, the last
    stage's. None without real training images. For reference only, computed when the pool is finished: nothing that makes
    images sees it.
    """
    data = load_real(config.data)
    if data is None or data.train is None:
        return None
    check_fits(teacher, data)
    stage = inversion_config(config).stages[-1]
    if not config.teacher.factory:
        recipe = config.teacher.training
        stage = dataclasses.replace(stage, augmentation='crop', jitter=recipe.shift, flip=recipe.flip, noise=recipe.noise)
    measure = make_feature_loss(teacher, stage)
    size = min(notes[0]['images'], len(data.train.labels))
    order = np.random.default_rng(config.seed).permutation(len(data.train.labels))
    losses = []
    for i in range(min(len(notes), len(order) // size)):
        images = data.train.images[order[i * size : (i + 1) * size]]
        losses.append(float(measure(teacher.variables, teacher.normalise(images), jax.random.key(i))))
    return float(np.mean(losses))


def _write_samples(workdir: Workdir, images: dict) -> None:
    buffer = io.BytesIO()
    class_grid(images['images'], images['labels'], 16).save(buffer, 'PNG')
    write_atomic(workdir.path / 'samples' / 'grid.png', buffer.getvalue())
