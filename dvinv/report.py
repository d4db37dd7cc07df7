"""The task `report`: the whole run on one self-contained page, from what the other tasks left in the work directory."""

import json
from collections.abc import Iterable

from dvinv.configuration import TASKS
from dvinv.continual.section import continual_section, continual_tiles
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import accuracy
from dvinv.inversion import Teacher
from dvinv.pools import finished_pool, open_control
from dvinv.pruning.section import pruning_section, pruning_tile
from dvinv.quality import evenly, figures_of_sets, quality_table
from dvinv.quantization.section import quantization_section
from dvinv.runtime.charts import line_chart
from dvinv.runtime.files import write_atomic
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.page import Picture, Section, Table, Tile, number, percent, render
from dvinv.runtime.pictures import class_grid, shown_classes
from dvinv.runtime.workdir import Workdir, open_workdir, plain
from dvinv.teacher import load, load_verifier
from dvinv.verifiers import load_others, refuse_chance

PER_CLASS = 16  # images in a row of the grid
MOST_SCORED = 500  # real images that tell whether a verifier recognises anything
TERMS = {
    'cross_entropy': 'cross-entropy',
    'feature': 'feature loss',
    'total_variation': 'total variation',
    'competition': 'competition',
}
UNTIL = 'pixels were optimised until a trained network {}'
METHODS = {  # name, and what it does; the braces take how far the network went along with the labels
    'deepinversion': ('DeepInversion', f'{UNTIL} and found the statistics of its BatchNorm inputs familiar'),
    'adaptive': (
        'Adaptive DeepInversion',
        f'{UNTIL}, found the statistics of its BatchNorm inputs familiar, and disagreed with the student that learns from '
        'them meanwhile',
    ),
    'prior_only': ('DeepInversion without its feature term', f'{UNTIL}, whatever the statistics of its BatchNorm inputs'),
    'noise': ('drawing noise', 'every inversion starts from it, and nothing was optimised'),
}
CONTROLS = {'prior_only': 'Made without the feature term.', 'noise': 'Noise: where every image starts.'}
STUDENTS = {
    'student': 'Synthesized images',
    'real': 'Real training images (upper control)',
    'prior_only': 'Images without the feature term',
    'noise': 'Noise images',
}


def run(config, workdir) -> None:
    """Write report.html; tasks that have not run are left out of it."""
    workdir = open_workdir(workdir, config)
    results = workdir.results
    summary, sections = 'No images have been synthesized yet.', []
    if 'synthesis' in results:
        teacher = load(config, workdir)
        pool = finished_pool(config, workdir, teacher)
        method = pool.notes(pool.finished()[0])['config']['method']  # an existing pool's need not be the config's
        summary = _summary(results, *METHODS[method])
        pools = {'synthesized': pool, **_controls(workdir, teacher)}
        sections.append(_synthesis(pools, method, results['synthesis'], workdir.metrics))
        sections.append(_quality(config, workdir, teacher, pools))
    if 'distillation' in results:
        sections.append(_distillation(config, results, workdir.metrics))
    if 'pruning' in results:
        sections.append(pruning_section(workdir, results['pruning']))
    if 'continual' in results:
        sections.append(continual_section(config, workdir, results['continual']))
        summary = _summary_of_tasks(results['continual'], summary if 'synthesis' in results else '')
    if 'quantization' in results:
        sections.append(quantization_section(results['quantization']))
    if 'teacher' in results:
        sections.append(_networks(results))
    text = json.dumps(plain(config), indent=1, sort_keys=True)
    page = render(
        f'{config.data.name or config.teacher.factory}: images from a network alone',
        summary,
        _tiles(results),
        sections,
        configuration=text,
    )
    write_atomic(workdir.path / 'report.html', page.encode())


def _summary(results: dict, name: str, how: str) -> str:
    made, taught = results['synthesis'], results.get('distillation')
    verdict = 'was sure of them' if made['teacher_accuracy'] > 0.5 else 'leaned towards their class'
    text = f'{made["images"]:,} images were synthesized by {name}, without any data: {how.format(verdict)}.'
    if taught is None or taught['test_accuracy'] is None:
        return text
    return (
        f'{text}\n\nA student that never saw a real image learned from them, and reads '
        f'{percent(taught["test_accuracy"])} of the real test images right.'
    )


def _summary_of_tasks(found: dict, before: str) -> str:
    return (
        f'{before}\n\nIn {found["tasks"]} tasks a network learned ever more classes, and saw no real image of an old one '
        f'again: what it was to remember it recalled itself. It reads {percent(found["test_accuracy"])} of the real test '
        f'images of all classes right; after fine-tuning alone it would be {percent(found["finetune_test_accuracy"])}, with '
        f'real images of the old classes {percent(found["replay_test_accuracy"])}.'
    )


def _tiles(results: dict) -> list[Tile]:
    tiles = [pruning_tile(results['pruning'])] if 'pruning' in results else []
    tiles += continual_tiles(results['continual']) if 'continual' in results else []
    if taught := results.get('distillation'):
        if (agreement := taught.get('held_out_agreement')) is not None:
            tiles.append(Tile('Student', percent(agreement), 'agrees with the teacher, images unseen', agreement))
        else:
            tiles.append(Tile('Student', percent(taught['test_accuracy']), 'real test accuracy', taught['test_accuracy']))
    if teacher := results.get('teacher'):
        tiles.append(Tile('Teacher', percent(teacher['test_accuracy']), 'real test accuracy', teacher['test_accuracy']))
    if made := results.get('synthesis'):
        tiles.append(
            Tile(
                'Verifier',
                percent(made['verifier_accuracy']),
                'of the images, judged independently',
                made['verifier_accuracy'],
            )
        )
        tiles.append(
            Tile(
                'Feature loss',
                number(made['feature_loss_last']),
                f'from {number(made["feature_loss_first"])}; real images {number(made["feature_loss_real"])}',
            )
        )
    return tiles


def _synthesis(pools: dict[str, ImagePool], method: str, made: dict, metrics: Metrics) -> Section:
    table = Table(
        ('', 'value'),
        [
            ['Teacher takes them for their class', percent(made['teacher_accuracy'])],
            ['Verifier takes them for their class', percent(made['verifier_accuracy'])],
            ['Verifier, among its first five', percent(made['verifier_top5_accuracy'])],
            ['Feature loss of the initial noise', number(made['feature_loss_first'])],
            ['Feature loss of the finished images', number(made['feature_loss_last'])],
            ['Feature loss of real batches', number(made['feature_loss_real'])],
            ['Batches', made['batches']],
            ['Rounds in which they came to the student', made['rounds']],
            ['Iterations a batch', made['iterations']],
        ],
        caption=f'{made["images"]:,} images, synthesized by {METHODS[method][0]}.',
    )
    pictures = [_grid(pools['synthesized'], 'The first images of each class; rows are classes.', wide=True)]
    pictures += [_grid(pools[control], caption) for control, caption in CONTROLS.items() if control in pools]
    charts = _inversions(method, made['rounds'], metrics)
    return Section('Synthesis', tables=[table], charts=charts, pictures=pictures)


def _quality(config, workdir: Workdir, teacher: Teacher, pools: dict[str, ImagePool]) -> Section:
    """All sets of images that there are, and real ones, side by side; the figures go into quality.json too."""
    verifier = load_verifier(config, workdir, teacher)
    if verifier is None:
        text = 'The config names no verifier (verifier.network): no network but the teacher has judged these images.'
        return Section('Quality', text)
    others, real = load_others(config, teacher), load_real(config.data)
    for index, (name, other) in enumerate(others.items()):
        if real:
            rows = evenly(len(real.test.labels), MOST_SCORED)
            share = accuracy(other, real.test.images[rows], real.test.labels[rows])
            refuse_chance(share, len(rows), other, f'The verifier {name}', f'verifiers[{index}]', 'leave it out')
    found = figures_of_sets(verifier, others, pools, real)
    write_atomic(workdir.path / 'quality.json', (json.dumps(found, indent=1) + '\n').encode())
    return Section('Quality', tables=[quality_table(found, config.verifier.network)])


def _controls(workdir: Workdir, teacher: Teacher) -> dict[str, ImagePool]:
    """Those of the lesser methods' pools that there are."""
    pools = {name: open_control(workdir, name, teacher.digest()) for name in CONTROLS}
    return {name: pool for name, pool in pools.items() if pool.numbers()}


def _inversions(method: str, rounds: int, metrics: Metrics) -> list[str]:
    """Charts of what the inversions of this run told: nothing where the pool was there already, or is noise."""
    curves = _curves(metrics.lines('synthesis', method), TERMS)
    if not any(steps for steps, _ in curves.values()):
        return []
    named = {TERMS[term]: curve for term, curve in curves.items()}
    charts = [_losses(named, 'Loss terms, mean over batches, before weighting', 'iteration', 'value')]
    if method == 'adaptive' and rounds > 1:
        last = max(step for steps, _ in curves.values() for step in steps)
        ends = (line for line in metrics.lines('synthesis', method) if line['step'] == last)
        named = {TERMS[term]: curve for term, curve in _curves(ends, ('feature', 'competition'), 'batch').items()}
        charts.append(_losses(named, 'Loss terms at the end of each batch, before weighting', 'batch', 'value'))
    return charts


def _distillation(config, results: dict, metrics: Metrics) -> Section:
    taught = results['distillation']
    students = {name: STUDENTS[name] for name in STUDENTS if name == 'student' or name in config.distillation.controls}
    rows = [
        [label, percent(taught['test_accuracy' if name == 'student' else f'{name}_test_accuracy'])]
        for name, label in students.items()
    ]
    if 'teacher' in results:
        rows.append(['The teacher itself', percent(results['teacher']['test_accuracy'])])
    held_out = taught.get('held_out_images')
    if held_out:  # there are no real images to score on
        rows = [
            [label, percent(taught.get(f'{prefix}held_out_agreement')), number(taught.get(f'{prefix}held_out_kl'))]
            for name, label in students.items()
            for prefix in ('' if name == 'student' else f'{name}_',)
        ]
    layers, stages = taught.get('hinted_layers'), taught.get('hinted_stages')
    hints = f', with hints from {layers} BatchNorm layers of the teacher' if layers else ''
    hints = f', with hints from {len(stages)} stages of the teacher' if stages else hints
    table = Table(
        ('Student distilled from', *(('agrees with the teacher', 'KL') if held_out else ('real test accuracy',))),
        rows,
        highlight=0,
        caption=f'The same student ({taught["parameters"]:,} parameters, {taught["parameters_ratio"]:.2f} of the '
        f"teacher's), {taught['updates']:,} updates each{hints}; last update, never the best."
        + (f' Compared on {held_out:,} synthesized images that no student learned from.' if held_out else ''),
    )
    curves = {label: _curves(metrics.lines('distillation', name), ['loss'])['loss'] for name, label in students.items()}
    title = f'Distillation loss, T² KL to the teacher{" and hints" if hints else ""} on its own images'
    chart = _losses(curves, title, 'update', 'loss')
    tables, charts = _by_image_count(config.distillation.counts, taught)
    if stages:
        header = 'Resolution', 'teacher', 'student', 'projection'
        tables.append(Table(header, stages, caption='Stages after which student and teacher are compared.'))
    return Section('Distillation', tables=[table, *tables], charts=[chart, *charts])


def _by_image_count(counts: tuple[int, ...], taught: dict) -> tuple[list[Table], list[str]]:
    """The curve of accuracy against image count, as far as it was measured."""
    scores = {count: taught.get(f'test_accuracy_of_{count}_images') for count in sorted(counts)}
    points = {count: score for count, score in scores.items() if score is not None}
    if not points:
        return [], []
    table = Table(
        ('Images', 'real test accuracy'),
        [[number(count), percent(score)] for count, score in points.items()],
        caption='Students of the first so many images alone, all there from the start; as many updates each.',
    )
    curve = {'Student': (list(points), list(points.values()))}
    return [table], [line_chart(curve, 'Student accuracy against image count', 'images', 'real test accuracy', log_x=True)]


def _networks(results: dict) -> Section:
    teacher, student = results['teacher'], results.get('distillation', {})
    rows = [
        ['Teacher', teacher['parameters'], teacher['flops'], percent(teacher['test_accuracy'])],
        ['Verifier', None, None, percent(teacher['verifier_test_accuracy'])],
    ]
    if student:
        rows.insert(1, ['Student', student['parameters'], student['flops'], percent(student['test_accuracy'])])
    times = Table(
        ('Task', 'seconds'),
        [[task, results[task]['wall_seconds']] for task in TASKS if task in results],
        caption='Wall time, compilation included.',
    )
    return Section(
        'Networks and time',
        tables=[
            Table(
                ('Network', 'parameters', 'FLOPs an image', 'real test accuracy'),
                rows,
                caption=f'{number(teacher["test_images"])} real test images; two FLOPs a multiply-add.',
            ),
            times,
        ],
    )


def _grid(pool: ImagePool, caption: str, wide: bool = False) -> Picture:
    labels = pool.rows('labels')[:]
    return Picture(class_grid(pool.rows('images'), labels, PER_CLASS), caption, shown_classes(labels), wide)


def _curves(lines: Iterable[dict], values: Iterable[str], x: str = 'step') -> dict[str, tuple[list, list]]:
    """{value: (x, its mean there)} over the lines that tell it, ascending in x; none of the lines is held."""
    totals = {value: {} for value in values}  # {value: {x: [sum, count]}}
    for line in lines:
        for value in line.keys() & totals.keys():
            total = totals[value].setdefault(line[x], [0.0, 0])
            total[0] += line[value]
            total[1] += 1
    return {
        value: (sorted(at), [at[position][0] / at[position][1] for position in sorted(at)]) for value, at in totals.items()
    }


def _losses(curves: dict[str, tuple[list, list]], *words: str) -> str:
    """A chart of the curves that have points; title and labels of the axes by `words`."""
    return line_chart({name: curve for name, curve in curves.items() if curve[0]}, *words, log_y=True)
