"""The task `report`: the whole run on one self-contained page, from what the other tasks left in the work directory."""

import json

from dvinv.configuration import TASKS
from dvinv.data.pool import ImagePool
from dvinv.runtime.charts import line_chart
from dvinv.runtime.files import write_atomic
from dvinv.runtime.page import Picture, Section, Table, Tile, number, percent, render
from dvinv.runtime.pictures import class_grid, shown_classes
from dvinv.runtime.workdir import Workdir, open_workdir, plain
from dvinv.synthesizer import open_pool
from dvinv.teacher import load

PER_CLASS = 16  # images in a row of the grid
TERMS = {'cross_entropy': 'cross-entropy', 'feature': 'feature loss', 'total_variation': 'total variation'}
STUDENTS = {
    'student': 'Synthesized images',
    'real': 'Real training images (upper control)',
    'prior_only': 'Images without the feature term',
    'noise': 'Noise images',
}


def run(config, workdir) -> None:
    """Write report.html; tasks that have not run are left out of it."""
    workdir = open_workdir(workdir, config)
    results, lines = workdir.results, workdir.metrics.read()
    sections = []
    if 'synthesis' in results:
        sections.append(_synthesis(config, workdir, results['synthesis'], lines))
    if 'distillation' in results:
        sections.append(_distillation(config, workdir, results, lines))
    if 'teacher' in results:
        sections.append(_networks(results))
    text = json.dumps(plain(config), indent=1, sort_keys=True)
    page = render(
        f'{config.data.name or config.teacher.factory}: images from a network alone',
        _summary(results),
        _tiles(results),
        sections,
        configuration=text,
    )
    write_atomic(workdir.path / 'report.html', page.encode())


def _summary(results: dict) -> str:
    made, taught = results.get('synthesis'), results.get('distillation')
    if made is None:
        return 'No images have been synthesized yet.'
    text = (
        f'{made["images"]} images were synthesized from a trained network, without any data: pixels were optimised until '
        'the network was sure of them and found the statistics of its BatchNorm inputs familiar.'
    )
    if taught is None or taught['test_accuracy'] is None:
        return text
    return (
        f'{text}\n\nA student that never saw a real image learned from them, and reads '
        f'{percent(taught["test_accuracy"])} of the real test images right.'
    )


def _tiles(results: dict) -> list[Tile]:
    tiles = []
    if taught := results.get('distillation'):
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


def _synthesis(config, workdir: Workdir, made: dict, lines: list[dict]) -> Section:
    teacher = load(config, workdir)
    pool = open_pool(config, workdir, teacher)
    table = Table(
        ('', 'value'),
        [
            ['Teacher takes them for their class', percent(made['teacher_accuracy'])],
            ['Verifier takes them for their class', percent(made['verifier_accuracy'])],
            ['Verifier, among its first five', percent(made['verifier_top5_accuracy'])],
            ['Feature loss of the initial noise', number(made['feature_loss_first'])],
            ['Feature loss of the finished images', number(made['feature_loss_last'])],
            ['Feature loss of real batches', number(made['feature_loss_real'])],
            ['Iterations a batch', made['iterations']],
        ],
        caption=f'{made["images"]} synthesized images.',
    )
    pictures = [_grid(pool, 'The first synthesized images of each class; rows are classes.', wide=True)]
    for method, caption in (('prior_only', 'Made without the feature term.'), ('noise', 'Noise: where every image starts.')):
        control = ImagePool(workdir.path / 'controls' / method, teacher.digest())
        if control.numbers():
            pictures.append(_grid(control, caption))
    chart = line_chart(
        {name: _mean_over_batches(lines, config.synthesis.method, term) for term, name in TERMS.items()},
        'Loss terms, mean over batches, before weighting',
        'iteration',
        'value',
        log_y=True,
    )
    return Section('Synthesis', tables=[table], charts=[chart], pictures=pictures)


def _distillation(config, workdir: Workdir, results: dict, lines: list[dict]) -> Section:
    taught = results['distillation']
    rows = [
        [label, percent(taught['test_accuracy' if name == 'student' else f'{name}_test_accuracy'])]
        for name, label in STUDENTS.items()
    ]
    if 'teacher' in results:
        rows.append(['The teacher itself', percent(results['teacher']['test_accuracy'])])
    table = Table(
        ('Student distilled from', 'real test accuracy'),
        rows,
        highlight=0,
        caption=f'The same student ({taught["parameters"]:,} parameters, {taught["parameters_ratio"]:.2f} of the '
        f"teacher's), {taught['updates']} updates each; last update, never the best.",
    )
    curves = {label: _series(lines, 'distillation', name, 'loss') for name, label in STUDENTS.items()}
    chart = line_chart(
        {label: curve for label, curve in curves.items() if curve[0]},
        'Distillation loss, T² KL to the teacher on its own images',
        'update',
        'loss',
        log_y=True,
    )
    return Section('Distillation', tables=[table], charts=[chart])


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
    images = pool.read_all()
    return Picture(class_grid(images['images'], images['labels'], PER_CLASS), caption, shown_classes(images['labels']), wide)


def _series(lines: list[dict], task: str, series: str, value: str) -> tuple[list, list]:
    chosen = [line for line in lines if line['task'] == task and line['series'] == series and value in line]
    return [line['step'] for line in chosen], [line[value] for line in chosen]


def _mean_over_batches(lines: list[dict], method: str, term: str) -> tuple[list, list]:
    steps, values = _series(lines, 'synthesis', method, term)
    by_step = {}
    for step, value in zip(steps, values, strict=True):
        by_step.setdefault(step, []).append(value)
    return list(by_step), [sum(values) / len(values) for values in by_step.values()]
