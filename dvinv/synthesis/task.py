"""The task `synthesis`: fills the pool with numbered batches of images made from the teacher without data."""

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from dvinv.data.dataset import RealData
from dvinv.data.export import class_grid
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import student_of, validate_student
from dvinv.evaluation import among_top, logits_of, validate_fits
from dvinv.inversion import make_feature_loss
from dvinv.networks import Classifier
from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, line_panels, mean_curves
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, number, percent
from dvinv.runtime import preemption
from dvinv.runtime.files import write_atomic
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis.pools import controls_are_complete, missing_batches, open_pool
from dvinv.synthesis.synthesizer import control_pool, fill_in_competition, fill_pool, validate_stages, validate_synthesis
from dvinv.teacher import task as teacher
from dvinv.training.step import rounds_of

PER_CLASS, PER_CLASS_BESIDE = 16, 10  # images per row of a grid with the full width, or next to another
TERMS = {
    'cross_entropy': 'cross-entropy',
    'feature': 'feature loss',
    'total_variation': 'total variation',
    'competition': 'competition',
}
UNTIL = 'pixels were optimized until a trained network {}'
METHODS = {  # (name, description); the braces stand for the verdict of the network on the labels
    'deepinversion': ('DeepInversion', f'{UNTIL} and found the statistics of its BatchNorm inputs familiar'),
    'adaptive': (
        'Adaptive DeepInversion',
        f'{UNTIL}, found the statistics of its BatchNorm inputs familiar, and disagreed with the student that learns from '
        'them meanwhile',
    ),
    'prior_only': ('DeepInversion without its feature term', f'{UNTIL}, whatever the statistics of its BatchNorm inputs'),
    'noise': ('drawing noise', 'every inversion starts from it, and nothing was optimized'),
}
CONTROLS = {'prior_only': 'Made without the feature term.', 'noise': 'Noise: where every image starts.'}


def validate(run: Run) -> None:
    """Validates, before anything is written, that the images of the task can be made and judged.

    Raises:
      DvinvError: they cannot; the message names the field, its value and the remedy.
    """
    run.once(teacher.validate_verifier)
    run.once(validate_stages if run.settings.pool else validate_synthesis)
    if run.settings.synthesis.controls:
        run.once(validate_synthesis)
    if run.settings.trains_student:
        run.once(validate_student)


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
        fill_in_competition(run, run.teacher, pool, student_of(run, run.teacher), 'synthesis', method)
        return
    fill_pool(run, run.teacher, pool, method, 'synthesis', method)


def _judge(pool: ImagePool, verifier: Classifier | None) -> dict:
    """Returns the figures of the images of a finished pool; reads one shard at a time into memory."""
    numbers, feature_losses = pool.finished(), {'first': 0.0, 'last': 0.0}
    counts: Counter[str] = Counter()  # of images, and of those that each network classifies correctly
    for batch in numbers:
        preemption.leave_if_asked(single_process_only=True)
        sidecar, shard = pool.sidecar(batch), pool.read(batch)
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
    class_grid(pool.rows('images'), pool.rows('labels')[:], PER_CLASS).save(buffer, 'PNG')
    write_atomic(workdir.path / 'samples' / 'grid.png', buffer.getvalue())


def synthesis_section(
    found: dict, pool: ImagePool, controls: dict[str, ImagePool], data: RealData | None, names: Sequence[str]
) -> Section:
    """Returns the section.

    Args:
      found: the figures of the task in results.json.
      pool: the images; a given pool may have another method than the config.
      controls: {method: pool} of the controls that have images.
      data: real data to show next to the images; None if there are none.
      names: the names of classes in the order of labels; () to show numbers.
    """
    method = pool.sidecar(pool.finished()[0])['config']['method']
    verified, real_loss = found['verifier_accuracy'], found['feature_loss_real']
    table = Table(
        ('', 'value'),
        [
            ['Teacher takes them for their class', percent(found['teacher_accuracy'])],
            ['Verifier takes them for their class', percent(verified)],
            ['Verifier, among its first five', percent(found['verifier_top5_accuracy'])],
            ['Statistics of the teacher that the images match', found.get('statistics', 'running statistics')],
            ['Feature loss of the initial noise', number(found['feature_loss_first'])],
            ['Feature loss of the finished images', number(found['feature_loss_last'])],
            ['Feature loss of real batches', number(real_loss)],
            ['Batches', found['batches']],
            ['Rounds of images and student training', found['rounds']],
            ['Iterations per batch', found['iterations']],
        ],
        caption=f'{found["images"]:,} images, synthesized by {METHODS[method][0]}.',
    )
    text = f'The teacher takes {percent(found["teacher_accuracy"])} of the {found["images"]:,} images for their class'
    text += f', a verifier that had no part in making them {percent(verified)}.' if verified is not None else '.'
    charts = [loss_terms(pool)]
    if method == 'adaptive' and found['rounds'] > 1:
        charts.append(loss_terms_by_batch(pool))
    note = f'from {number(found["feature_loss_first"])}'
    note += '' if real_loss is None else f'; real images {number(real_loss)}'
    return Section(
        'Synthesis',
        text,
        tables=[table],
        charts=charts,
        pictures=image_grids(pool, controls, data, names),
        tiles=[
            Tile('Verifier', percent(verified), 'of the images, judged independently', verified),
            Tile('Feature loss', number(found['feature_loss_last']), note),
        ],
        summary=_summary(found, *METHODS[method]),
    )


def loss_terms(pool: ImagePool) -> Chart | None:
    """Draws the loss terms by iteration, each in a panel, as means over the batches of a pool; None for noise."""
    curves = mean_curves(pool.measurements(), TERMS)
    named = {TERMS[term]: curve for term, curve in curves.items()}
    return line_panels(named, 'Loss terms, mean over batches, before weighting', 'iteration', log_y=True)


def loss_terms_by_batch(pool: ImagePool) -> Chart | None:
    """Draws the feature loss and the competition at the end of each batch of a pool; None for noise."""
    last = max((line['step'] for line in pool.measurements()), default=0)
    ends = (line for line in pool.measurements() if line['step'] == last)
    curves = mean_curves(ends, ('feature', 'competition'), 'batch')
    named = {TERMS[term]: curve for term, curve in curves.items()}
    return line_panels(named, 'Loss terms at the end of each batch, before weighting', 'batch', log_y=True)


def image_grids(
    pool: ImagePool,
    controls: dict[str, ImagePool] | None = None,
    data: RealData | None = None,
    names: Sequence[str] = (),
) -> list[Picture]:
    """Returns the first images of each class: of the pool, real ones of the same classes, and those of the controls.

    Args:
      pool, controls, data, names: see `synthesis_section`.
    """
    real = data and (data.train or data.test)
    per_class, labels = PER_CLASS_BESIDE if real else PER_CLASS, pool.rows('labels')[:]
    caption = 'Synthesized: the first images of each class.'
    pictures = [class_picture(pool.rows('images'), labels, caption, names, per_class, wide=not real)]
    if real:
        caption = 'Real images of the same classes, for comparison. No synthesized pixel depends on them.'
        pictures.append(class_picture(real.images, real.labels, caption, names, per_class, labels))
    for control, caption in CONTROLS.items():
        if other := (controls or {}).get(control):
            pictures.append(class_picture(other.rows('images'), other.rows('labels')[:], caption, names, per_class))
    return pictures


def _summary(found: dict, name: str, how: str) -> str:
    """Returns the sentence about the method, by its entry in `METHODS`."""
    verdict = 'was sure of them' if found['teacher_accuracy'] > 0.5 else 'leaned towards their class'
    source, statistics = 'without any data', found.get('statistics', '')
    if statistics.startswith('recorded'):
        source = f'from the network and {statistics}'
        how = how.replace('the statistics of its BatchNorm inputs', 'these moments')
    elif statistics == 'none':
        name, how = f'{name} without its feature term', UNTIL
    return f'{found["images"]:,} images were synthesized by {name}, {source}: {how.format(verdict)}.'
