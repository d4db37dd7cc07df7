"""The task `report`: shows the run on one self-contained page, from the files of the other tasks in the work directory."""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from dvinv.config import TASKS, DistillationSettings, Settings, nested
from dvinv.continual.section import continual_section, continual_tiles
from dvinv.data.dataset import RealData
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import student_of
from dvinv.evaluation.by_class import agreement_table, class_section, compare
from dvinv.evaluation.quality import evenly, figures_of_sets, quality_table
from dvinv.evaluation.scoring import accuracy, flops
from dvinv.networks import load_classifier
from dvinv.networks.quantized.network import load_quantized
from dvinv.pipeline.run import Run
from dvinv.pruning.section import pruning_section, pruning_sentence, pruning_tile
from dvinv.quantization.section import quantization_section, quantization_sentence, quantization_tile, smallest
from dvinv.report.charts import line_chart, line_panels
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, number, percent, render
from dvinv.runtime import versions
from dvinv.runtime.banner import device_names
from dvinv.runtime.files import write_atomic
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.progress import duration
from dvinv.synthesis.pools import finished_pool, open_control
from dvinv.teacher.verifiers import load_more, refuse_chance

PER_CLASS, PER_CLASS_BESIDE = 16, 10  # images per row of a grid with the full width, or next to another
MOST_SCORED = 500  # maximum number of real images on which a verifier is checked to be better than chance
TERMS = {
    'cross_entropy': 'cross-entropy',
    'feature': 'feature loss',
    'total_variation': 'total variation',
    'competition': 'competition',
}
UNTIL = 'pixels were optimised until a trained network {}'
METHODS = {  # (name, description); the braces stand for the verdict of the network on the labels
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
HEADLINES = {  # the headline for the last task of a run
    'teacher': 'a trained network',
    'synthesis': 'images from the network alone',
    'distillation': 'a student from images of the network alone',
    'pruning': 'a smaller network without data',
    'continual': 'new classes, old ones from memory',
    'quantization': 'few bits without data',
}
FILES = 'results.json', 'config.json', 'versions.json', 'metrics.jsonl', 'quality.json', 'by_class.json', 'pruning.json'
COMPARED = {'distillation': ('student', 'student'), 'pruning': ('pruned', 'pruned network')}  # (file, name in text) by task
STUDENTS = {
    'student': 'Synthesized images',
    'real': 'Real training images (upper control)',
    'prior_only': 'Images without the feature term',
    'noise': 'Noise images',
}


def validate(run: Run) -> None:
    """Validates the verifiers that only the report needs."""
    load_more(run.settings.verifiers, run.planned_teacher, say=True)


def run(run: Run) -> None:
    """Writes report.html; tasks without results are left out."""
    workdir, results, data = run.workdir, run.workdir.results, run.data
    names = (data.class_names if data else ()) or run.settings.data.class_names
    summary, sections = [], []
    if 'synthesis' in results:
        pool = finished_pool(run)
        method = pool.sidecar(pool.finished()[0])['config']['method']  # a given pool may have another method than the config
        summary.append(_summary(results, *METHODS[method]))
        pools = {'synthesized': pool, **_controls(run)}
        sections.append(_synthesis(pools, method, results['synthesis'], data, names))
        sections.append(_quality(run, pools))
    if 'distillation' in results:
        sections.append(_distillation(run.settings.distillation, results, workdir.metrics, names))
    if 'pruning' in results:
        sections.append(pruning_section(workdir, results['pruning']))
        summary.append(pruning_sentence(results['pruning']))
    if 'continual' in results:
        sections.append(continual_section(run, results['continual']))
        summary.append(_summary_of_tasks(results['continual']))
    if 'quantization' in results:
        sections.append(quantization_section(results['quantization']))
        summary.append(quantization_sentence(results['quantization']))
    if data and (section := _classes(run, data, names)):
        sections.append(section)
    if 'teacher' in results:
        sections.append(_teacher(run, results['teacher']))
        sections.append(_networks(run))
    page = render(
        _title(run.settings, results),
        '\n\n'.join(summary) or 'No images have been synthesized yet.',
        _tiles(results),
        sections,
        configuration=json.dumps(nested(run.settings), indent=1, sort_keys=True),
        facts=_facts(run, results),
    )
    write_atomic(workdir.path / 'report.html', page.encode())


def _title(settings: Settings, results: dict) -> str:
    """Returns the headline: the network, its data, and the headline of the last task."""
    group, path = settings.teacher, Path(settings.data.path)
    data = path.stem if settings.data.name in ('npz', 'folders') else settings.data.name
    what = [headline for task, headline in HEADLINES.items() if task in results]
    return (group.factory or group.network) + (f' on {data}' if data else '') + (f': {what[-1]}' if what else '')


def _facts(run: Run, results: dict) -> dict:
    """Returns the facts about the run (date, command, device, versions, time) and links to its files."""
    workdir = run.workdir
    seconds = sum(results[task]['wall_seconds'] for task in TASKS if task in results)
    networks = sorted((workdir.path / 'networks').glob('*.safetensors'))
    files = [(workdir.path / name) for name in FILES if (workdir.path / name).exists()]
    return {
        'Made': f'{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}',
        'Command': versions.command(),
        'Device': device_names(run.settings.devices),
        'Versions': versions.packages(),
        'Time': duration(seconds) + ' for all tasks, compilation included' if seconds else '',
        'Networks': [(f'{file.stem} ({file.stat().st_size / 1e6:.2f} MB)', f'networks/{file.name}') for file in networks],
        'Figures': [(file.name, file.name) for file in files],
    }


def _summary(results: dict, name: str, how: str) -> str:
    made, distilled = results['synthesis'], results.get('distillation')
    verdict = 'was sure of them' if made['teacher_accuracy'] > 0.5 else 'leaned towards their class'
    source, statistics = 'without any data', made.get('statistics', '')
    if statistics.startswith('recorded'):
        source = f'from the network and {statistics}'
        how = how.replace('the statistics of its BatchNorm inputs', 'these moments')
    elif statistics == 'none':
        name, how = f'{name} without its feature term', UNTIL
    text = f'{made["images"]:,} images were synthesized by {name}, {source}: {how.format(verdict)}.'
    if distilled is None:
        return text
    if distilled['test_accuracy'] is None:
        return text + (
            f'\n\nA student that learned from them {_agrees(distilled)}' if distilled.get('held_out_images') else ''
        )
    return (
        f'{text}\n\nA student that never saw a real image learned from them, and reads '
        f'{percent(distilled["test_accuracy"])} of the real test images right.'
    )


def _summary_of_tasks(found: dict) -> str:
    return (
        f'In {found["tasks"]} tasks a network learned ever more classes, and saw no real image of an old one '
        f'again: what it was to remember it recalled itself. It reads {percent(found["test_accuracy"])} of the real test '
        f'images of all classes right; after fine-tuning alone it would be {percent(found["finetune_test_accuracy"])}, with '
        f'real images of the old classes {percent(found["replay_test_accuracy"])}.'
    )


def _tiles(results: dict) -> list[Tile]:
    tiles = [pruning_tile(results['pruning'])] if 'pruning' in results else []
    tiles += continual_tiles(results['continual']) if 'continual' in results else []
    tiles += [quantization_tile(results['quantization'])] if 'quantization' in results else []
    if distilled := results.get('distillation'):
        if (agreement := distilled.get('held_out_agreement')) is not None:
            tiles.append(Tile('Student', percent(agreement), 'agrees with the teacher, synthesized images', agreement))
        else:
            tiles.append(
                Tile('Student', percent(distilled['test_accuracy']), 'real test accuracy', distilled['test_accuracy'])
            )
    if teacher := results.get('teacher'):
        tiles.append(Tile('Teacher', percent(teacher['test_accuracy']), 'real test accuracy', teacher['test_accuracy']))
    if made := results.get('synthesis'):
        share, real = made['verifier_accuracy'], made['feature_loss_real']
        tiles.append(Tile('Verifier', percent(share), 'of the images, judged independently', share))
        note = f'from {number(made["feature_loss_first"])}' + ('' if real is None else f'; real images {number(real)}')
        tiles.append(Tile('Feature loss', number(made['feature_loss_last']), note))
    return tiles


def _synthesis(
    pools: dict[str, ImagePool], method: str, made: dict, data: RealData | None, names: tuple[str, ...]
) -> Section:
    table = Table(
        ('', 'value'),
        [
            ['Teacher takes them for their class', percent(made['teacher_accuracy'])],
            ['Verifier takes them for their class', percent(made['verifier_accuracy'])],
            ['Verifier, among its first five', percent(made['verifier_top5_accuracy'])],
            ['Statistics of the teacher that they are drawn to', made.get('statistics', 'running statistics')],
            ['Feature loss of the initial noise', number(made['feature_loss_first'])],
            ['Feature loss of the finished images', number(made['feature_loss_last'])],
            ['Feature loss of real batches', number(made['feature_loss_real'])],
            ['Batches', made['batches']],
            ['Rounds in which they came to the student', made['rounds']],
            ['Iterations a batch', made['iterations']],
        ],
        caption=f'{made["images"]:,} images, synthesized by {METHODS[method][0]}.',
    )
    verified = made['verifier_accuracy']
    text = f'The teacher takes {percent(made["teacher_accuracy"])} of the {made["images"]:,} images for their class'
    text += f', a verifier that had no part in making them {percent(verified)}.' if verified is not None else '.'
    others = {control: caption for control, caption in CONTROLS.items() if control in pools}
    real = data and (data.train or data.test)
    per_class = PER_CLASS_BESIDE if real else PER_CLASS
    pictures = [_grid(pools['synthesized'], 'Synthesized: the first images of each class.', names, per_class, wide=not real)]
    if real:
        like = pools['synthesized'].rows('labels')[:]
        caption = 'Real images of the same classes, for comparison. No synthesized pixel depends on them.'
        pictures.append(class_picture(real.images, real.labels, caption, names, per_class, like))
    pictures += [_grid(pools[control], caption, names, per_class) for control, caption in others.items()]
    charts = _inversions(method, made['rounds'], pools['synthesized'])
    return Section('Synthesis', text, tables=[table], charts=charts, pictures=pictures)


def _quality(run: Run, pools: dict[str, ImagePool]) -> Section:
    """Returns the section that compares all sets of images, and real ones; also writes the figures to quality.json."""
    verifier = run.verifier
    if verifier is None:
        text = 'The config names no verifier (verifier.network): no network but the teacher has judged these images.'
        return Section('Quality', text)
    others, real = load_more(run.settings.verifiers, run.teacher), run.data
    for index, (name, other) in enumerate(others.items()):
        if real:
            rows = evenly(len(real.test.labels), MOST_SCORED)
            share = accuracy(other, real.test.images[rows], real.test.labels[rows])
            refuse_chance(share, len(rows), other, f'The verifier {name}', f'verifiers[{index}]', 'leave it out')
    found = figures_of_sets(verifier, others, pools, real)
    write_atomic(run.workdir.path / 'quality.json', (json.dumps(found, indent=1) + '\n').encode())
    return Section('Quality', tables=[quality_table(found, run.settings.verifier.network)])


def _controls(run: Run) -> dict[str, ImagePool]:
    """Returns the pools of the controls that have any images."""
    pools = {name: open_control(run.workdir, name, run.teacher.digest()) for name in CONTROLS}
    return {name: pool for name, pool in pools.items() if pool.numbers()}


def _inversions(method: str, rounds: int, pool: ImagePool) -> list[str]:
    """Returns charts of the loss terms of the batches of a pool; none for noise."""
    curves = _curves(pool.measurements(), TERMS)
    if not any(steps for steps, _ in curves.values()):
        return []
    named = {TERMS[term]: curve for term, curve in curves.items()}
    charts = [line_panels(named, 'Loss terms, mean over batches, before weighting', 'iteration', log_y=True)]
    if method == 'adaptive' and rounds > 1:
        last = max(step for steps, _ in curves.values() for step in steps)
        ends = (line for line in pool.measurements() if line['step'] == last)
        named = {TERMS[term]: curve for term, curve in _curves(ends, ('feature', 'competition'), 'batch').items()}
        charts.append(line_panels(named, 'Loss terms at the end of each batch, before weighting', 'batch', log_y=True))
    return charts


def _distillation(settings: DistillationSettings, results: dict, metrics: Metrics, names: tuple[str, ...]) -> Section:
    distilled = results['distillation']
    students = {name: STUDENTS[name] for name in STUDENTS if name == 'student' or name in settings.controls}
    rows = [
        [label, percent(distilled['test_accuracy' if name == 'student' else f'{name}_test_accuracy'])]
        for name, label in students.items()
    ]
    if 'teacher' in results:
        rows.append(['The teacher itself', percent(results['teacher']['test_accuracy'])])
    held_out = distilled.get('held_out_images')
    if held_out:  # there are no real images to score on
        rows = [
            [label, percent(distilled.get(f'{prefix}held_out_agreement')), number(distilled.get(f'{prefix}held_out_kl'))]
            for name, label in students.items()
            for prefix in ('' if name == 'student' else f'{name}_',)
        ]
    layers, stages = distilled.get('hinted_layers'), distilled.get('hinted_stages')
    hints = f', with hints from {layers} BatchNorm layers of the teacher' if layers else ''
    hints = f', with hints from {len(stages)} stages of the teacher' if stages else hints
    table = Table(
        ('Student distilled from', *(('agrees with the teacher', 'KL') if held_out else ('real test accuracy',))),
        rows,
        highlight=0,
        caption=f'The same student ({distilled["parameters"]:,} parameters, {distilled["parameters_ratio"]:.2f} of the '
        f"teacher's), {distilled['updates']:,} updates each{hints}; last update, never the best."
        + (f' Compared on {held_out:,} synthesized images that no student learned from.' if held_out else ''),
    )
    curves = {label: _curves(metrics.lines('distillation', name), ['loss'])['loss'] for name, label in students.items()}
    title = f'Distillation loss, T² KL{" and hints" if hints else " to the teacher"} on its own images'
    chart = _losses(curves, title, 'update', 'loss')
    tables, charts = _by_image_count(settings.counts, distilled)
    if stages:
        header = 'Resolution', 'teacher', 'student', 'projection'
        tables.append(Table(header, stages, caption='Stages after which student and teacher are compared.', text_columns=4))
    if shares := distilled.get('held_out_class_agreement'):
        tables.append(agreement_table(shares, names))
    text = f"The student has {distilled['parameters_ratio']:.2f} of the teacher's parameters and learned from it alone"
    if distilled.get('held_out_images'):
        text += f'; it {_agrees(distilled)}'
    else:
        text += _and_reads(distilled['test_accuracy'], results.get('teacher', {}).get('test_accuracy'), 'the teacher')
    return Section('Distillation', text, tables=[table, *tables], charts=[chart, *charts])


def _agrees(distilled: dict) -> str:
    """Returns the end of a sentence about a student that is compared with the teacher without real images."""
    agreement = percent(distilled['held_out_agreement'])
    return (
        f'agrees with the teacher on {agreement} of {distilled["held_out_images"]:,} synthesized images that it '
        'did not learn from. How many real images it reads right only real images can tell: often far fewer.'
    )


def _and_reads(score: float | None, other: float | None, name: str) -> str:
    """Returns the end of a sentence about a network, with its accuracy and that of another network, as far as known."""
    if score is None:
        return '.'
    return f'; it reads {percent(score)} of the real test images right' + (
        '.' if other is None else f', {name} {percent(other)}.'
    )


def _by_image_count(counts: tuple[int, ...], distilled: dict) -> tuple[list[Table], list[str]]:
    """Returns the table and the chart of accuracy against image count, for the counts that were measured."""
    scores = {count: distilled.get(f'test_accuracy_of_{count}_images') for count in sorted(counts)}
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


def _classes(run: Run, data: RealData, names: tuple[str, ...]) -> Section | None:
    """Returns the section on the networks class by class, and writes by_class.json; None if there is no teacher yet."""
    if not run.has_teacher:
        return None
    teacher, workdir, networks, titles = run.teacher, run.workdir, {}, {}
    for name, (file, title) in COMPARED.items():
        if name in workdir.results and workdir.network(file).exists():
            own = student_of(run, teacher).own if name == 'distillation' else run.own_module()
            networks[file], titles[file] = load_classifier(workdir.network(file), own), title
    if 'quantization' in workdir.results:
        setting = smallest(workdir.results['quantization'])
        path = workdir.network(f'quantized_{setting}')
        if path.exists():
            networks[path.stem], titles[path.stem] = load_quantized(path, teacher), f'network of {setting}'
    digests = {name: network.digest() for name, network in {'teacher': teacher, **networks}.items()}
    found = workdir.read_json('by_class.json', {})
    if found.get('networks') != digests:  # unchanged networks keep their figures
        found = {'networks': digests, **compare(teacher, networks, data.test)}
        write_atomic(workdir.path / 'by_class.json', (json.dumps(found) + '\n').encode())
    return class_section(found, titles, names)


def _teacher(run: Run, found: dict) -> Section:
    """Returns the section on the teacher: its source, its accuracy, and its losses if this run trained it."""
    group = run.settings.teacher
    name = group.factory or group.network
    source = f'was read from {group.weights}' if group.weights else f'came from the function {group.factory}'
    if trained := run.is_trained_here('teacher'):
        source = f'was trained here in {group.training.updates:,} updates'
    text = f'{name}, of {found["parameters"]:,} parameters, {source}'
    text += _and_reads(found['test_accuracy'], found['verifier_test_accuracy'], 'the verifier')
    curves = {}
    if trained:
        for role in ('teacher', 'verifier'):
            curves[role.capitalize()] = _curves(run.workdir.metrics.lines('teacher', role), ['loss'])['loss']
    chart = _losses(curves, 'Loss of the trainings on real images', 'update', 'cross-entropy')
    return Section('Teacher', text, charts=[chart])


def _networks(run: Run) -> Section:
    workdir, results = run.workdir, run.workdir.results
    teacher, student, pruned = (results.get(task) for task in ('teacher', 'distillation', 'pruning'))
    rows = [
        ['Teacher', teacher['parameters'], teacher['flops'], percent(teacher['test_accuracy'])],
    ]
    if student:
        rows.append(['Student', student['parameters'], student['flops'], percent(student['test_accuracy'])])
    if pruned:
        cost = round(pruned['flops_ratio'] * teacher['flops'])
        rows.append(['Pruned network', pruned['parameters'], cost, percent(pruned['test_accuracy'])])
    if teacher['verifier_test_accuracy'] is not None and (
        run.settings.verifier.weights or workdir.network('verifier').exists()
    ):
        verifier = run.verifier
        rows.append(['Verifier', verifier.parameters, flops(verifier), percent(teacher['verifier_test_accuracy'])])
    times = [[task, results[task]['wall_seconds']] for task in TASKS if task in results]
    tested = teacher['test_images']
    return Section(
        'Networks and time',
        tables=[
            Table(
                ('Network', 'parameters', 'FLOPs an image', 'real test accuracy'),
                rows,
                caption=('' if tested is None else f'{tested:,} real test images. ') + 'Two FLOPs a multiply-add.',
            ),
            Table(('Task', 'seconds'), times, caption='Wall time, compilation included.'),
        ],
    )


def _grid(pool: ImagePool, caption: str, names: tuple[str, ...], per_class: int, wide: bool = False) -> Picture:
    return class_picture(pool.rows('images'), pool.rows('labels')[:], caption, names, per_class, wide=wide)


def _curves(lines: Iterable[dict], values: Iterable[str], x: str = 'step') -> dict[str, tuple[list, list]]:
    """Returns {value: (list of x, list of means at x)} over the lines that have the value, ascending in x.

    Lines are consumed one at a time and are not kept in memory.
    """
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
    """Returns a chart of the curves that have points; `words` are the title and the labels of the axes."""
    return line_chart({name: curve for name, curve in curves.items() if curve[0]}, *words, log_y=True)
