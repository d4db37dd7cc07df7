"""The task `synthesis`: numbered batches of images from the teacher alone, into the pool."""

import dataclasses
import functools
import io

import jax
import numpy as np

import dvinv
from dvinv.configuration import inversion_config
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import logits_of, top_accuracy
from dvinv.inversion import Inversion, Teacher, balanced_labels, make_feature_loss, make_inverter
from dvinv.inversion.step import initial_images
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.files import write_atomic
from dvinv.runtime.pictures import class_grid
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir, open_workdir, plain
from dvinv.teacher import check_fits, load, load_verifier


def run(config, workdir) -> dict:
    """Fill the pool (or check the one that the config names) and judge it; returns the figures."""
    workdir = open_workdir(workdir, config)
    teacher, verifier = load(config, workdir), load_verifier(config, workdir)
    pool = open_pool(config, workdir, teacher)
    if not config.pool:
        fill_pool(config, workdir, teacher, pool, config.synthesis.method, 'synthesis', config.synthesis.method)
    images = pool.read_all()
    _write_samples(workdir, images)
    notes = [pool.notes(number) for number in pool.numbers()]
    verdict = logits_of(verifier, images['images']) if verifier else None
    return {
        'images': len(images['labels']),
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
    return bool(config.pool) or not _missing(config, ImagePool(workdir.path / 'pool', ''))


def _missing(config, pool: ImagePool) -> list[int]:
    """Numbers of the batches that the pool lacks."""
    return sorted({*range(config.synthesis.images // config.synthesis.batch_size)} - {*pool.numbers()})


def open_pool(config, workdir: Workdir, teacher: Teacher) -> ImagePool:
    """The pool of this run: an existing one where the config names it."""
    return ImagePool(config.pool or workdir.path / 'pool', teacher.digest())


def fill_pool(config, workdir: Workdir, teacher: Teacher, pool: ImagePool, method: str, task: str, series: str) -> None:
    """Synthesize the batches that the pool lacks.

    Batch i depends on the teacher, the config and fold_in(key(seed), i) alone: not on devices, nor on kills. No real image
    is read here.

    Args:
      method: 'deepinversion', 'prior_only' (no feature term) or 'noise' (the initial images themselves).
      task, series: what its metrics go by.
    """
    group, settings = config.synthesis, inversion_config(config, method)
    settings.check(teacher.image_shape)
    mesh = make_mesh(config.devices)
    at_once = 1 if settings.bn_stats == 'global' else min(mesh.size, group.images // group.batch_size)
    if settings.bn_stats == 'device':
        mesh = make_mesh(at_once)
    finished = pool.numbers()
    for number in finished:
        pool.notes(number)  # refuses another teacher's pool
    missing = _missing(config, pool)
    if not missing:
        return
    workdir.metrics.keep(task, series, lambda line: line['batch'] in finished)
    invert_batches = _make_noise(teacher) if method == 'noise' else make_inverter(teacher, settings, mesh)
    measure = make_feature_loss(teacher, settings.stages[-1])
    seed_key = jax.random.key(config.seed)
    iterations = 0 if method == 'noise' else settings.iterations
    weights = dataclasses.asdict(settings.weights)

    with Progress(f'{task}: {method}', len(missing) * max(1, iterations)) as progress:
        for start in range(0, len(missing), at_once):
            numbers = missing[start : start + at_once]
            padded = numbers + numbers[-1:] * (at_once - len(numbers))  # every device has work; repeats are dropped
            keys = jax.vmap(lambda i: jax.random.fold_in(seed_key, i))(np.asarray(padded))
            labels = np.stack([balanced_labels(i, group.batch_size, teacher.num_classes) for i in padded])
            inversion = invert_batches(
                keys, labels, on_chunk=functools.partial(_report, workdir, task, progress, start * iterations, len(numbers))
            )
            for row, number in enumerate(numbers):
                images = teacher.to_uint8(inversion.images[row])
                initial, view_key = initial_images(keys[row], group.batch_size, teacher.image_shape)
                workdir.metrics.append(task, series, _lines(number, row, inversion.metrics, config.logging.iterations))
                pool.write(
                    number,
                    images,
                    labels[row],
                    logits_of(teacher, images),
                    {
                        'batch': number,
                        'iterations': iterations,
                        'feature_loss_first': float(measure(teacher.variables, initial, view_key)),
                        'feature_loss_last': float(measure(teacher.variables, teacher.normalise(images), view_key)),
                        'config': {
                            **plain(group),
                            'seed': config.seed,
                            'bn_stats': config.bn_stats,
                            'method': method,
                            'weights': weights,
                        },
                        'version': dvinv.__version__,
                    },
                )
            progress.update((start + len(numbers)) * max(1, iterations))


def _report(workdir: Workdir, task: str, progress: Progress, before: int, abreast: int, done: int, terms: dict) -> None:
    """Progress in iterations of batches: `done` of each of the `abreast`, after `before` of earlier ones."""
    progress.update(before + abreast * done, **terms)
    workdir.tick(task)


def _make_noise(teacher: Teacher):
    """What `make_inverter` returns, for the control that ends where every inversion starts."""

    def run(keys, labels, on_chunk=None) -> Inversion:
        batch_size = np.shape(labels)[1]
        return Inversion(np.stack([initial_images(key, batch_size, teacher.image_shape)[0] for key in keys]), {})

    return run


def _lines(number: int, row: int, metrics: dict, every: int) -> list[dict]:
    """metrics.jsonl lines of one batch: every so many iterations, and the last."""
    if not metrics:
        return []
    last = len(metrics['loss'][row]) - 1
    return [
        {'step': i, 'batch': number, **{term: float(values[row][i]) for term, values in metrics.items()}}
        for i in range(last + 1)
        if i % every == 0 or i == last
    ]


def _real_feature_loss(config, teacher: Teacher, notes: list[dict]) -> float | None:
    """R_feature of real training batches of the pool's batch size, under the teacher's own augmentation where known.

    None without real data.

    For reference only, computed when the pool is finished: nothing that makes images sees it.
    """
    data = load_real(config.data.name, config.data.validation)
    if data is None:
        return None
    check_fits(teacher, data)
    stage = inversion_config(config).stages[-1]
    if not (config.teacher.factory or config.teacher.weights):
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
