"""The section of the report about synthesized images: their classes as others see them, examples, and the loss terms."""

from collections.abc import Sequence

from dvinv.data.dataset import RealData
from dvinv.data.pool import ImagePool
from dvinv.report.charts import Chart, line_panels, mean_curves
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, number, percent

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
