"""The task `report`: shows the run on one self-contained page, from the files of the other tasks in the work directory."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dvinv.config import TASKS, Settings, nested
from dvinv.continual.task import continual_section
from dvinv.data.dataset import RealData
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import student_of
from dvinv.distillation.task import distillation_section
from dvinv.evaluation import accuracy, compare_by_class, evenly, figures_of_sets, flops
from dvinv.networks import Classifier, load_classifier
from dvinv.networks.quantized import load_quantized
from dvinv.pipeline.run import Run
from dvinv.pruning.task import pruning_section
from dvinv.quantization.task import quantization_section, smallest
from dvinv.report.page import Link, Section, Table, class_section, percent, quality_table, render
from dvinv.runtime.files import write_atomic
from dvinv.runtime.progress import device_names, duration
from dvinv.runtime.workdir import FINAL_NETWORKS, command, network_files, package_text, quantized_name
from dvinv.synthesis.pools import finished_pool, open_control
from dvinv.synthesis.task import CONTROLS, synthesis_section
from dvinv.teacher.networks import load_more_verifiers, refuse_chance
from dvinv.teacher.task import teacher_section

MOST_SCORED = 500  # maximum number of real images on which a verifier is checked to be better than chance
# The order of the key figures: what the run was for comes first.
TILES = 'pruning', 'continual', 'quantization', 'distillation', 'teacher', 'synthesis'
HEADLINES = {  # the headline for the last task of a run
    'teacher': 'a trained network',
    'synthesis': 'images from the network alone',
    'distillation': 'a student from images of the network alone',
    'pruning': 'a smaller network without data',
    'continual': 'new classes, old ones from memory',
    'quantization': 'few bits without data',
}
FILES = 'results.json', 'config.json', 'versions.json', 'metrics.jsonl', 'quality.json', 'by_class.json', 'pruning.json'
COMPARED = {'distillation': 'student', 'pruning': 'pruned network'}  # what the text calls the final network of a task


def validate(run: Run) -> None:
    """Validates the verifiers that only the report needs."""
    load_more_verifiers(run.settings.verifiers, run.planned_teacher, report=True)


def run(run: Run) -> None:
    """Writes report.html; tasks without results are left out."""
    workdir, results = run.workdir, run.workdir.results
    sections = _sections(run)
    page = render(
        _title(run.settings, results),
        '\n\n'.join(section.summary for section in sections.values()).strip() or 'No images have been synthesized yet.',
        [tile for task in TILES if task in sections for tile in sections[task].tiles],
        [*sections.values()],
        configuration=json.dumps(nested(run.settings), indent=1, sort_keys=True),
        facts=_facts(run, results),
    )
    write_atomic(workdir.path / 'report.html', page.encode())


def _sections(run: Run) -> dict[str, Section]:
    """Returns {task or topic: section} in the order of the page."""
    workdir, results, data, sections = run.workdir, run.workdir.results, run.data, {}
    names = (data.class_names if data else ()) or run.settings.data.class_names
    if 'synthesis' in results:
        pool, controls = finished_pool(run), _controls(run)
        sections['synthesis'] = synthesis_section(results['synthesis'], pool, controls, data, names)
        sections['quality'] = _quality(run, {'synthesized': pool, **controls})
    if 'distillation' in results:
        sections['distillation'] = distillation_section(run.settings.distillation, results, workdir.metrics, names)
    if 'pruning' in results:
        sections['pruning'] = pruning_section(workdir, results['pruning'])
    if 'continual' in results:
        sections['continual'] = continual_section(run, results['continual'])
    if 'quantization' in results:
        sections['quantization'] = quantization_section(results['quantization'])
    if data and run.has_teacher:
        sections['classes'] = _classes(run, data, names)
    if 'teacher' in results:
        sections['teacher'] = teacher_section(run, results['teacher'])
        sections['networks'] = _networks(run)
    return sections


def _title(settings: Settings, results: dict) -> str:
    """Returns the headline: the network, its data, and the headline of the last task."""
    group, path = settings.teacher, Path(settings.data.path)
    data = path.stem if settings.data.name in ('npz', 'folders') else settings.data.name
    what = [headline for task, headline in HEADLINES.items() if task in results]
    return (group.factory or group.network) + (f' on {data}' if data else '') + (f': {what[-1]}' if what else '')


def _facts(run: Run, results: dict) -> dict[str, str | list[Link]]:
    """Returns the facts about the run (date, command, device, versions, time) and links to its files."""
    workdir = run.workdir
    seconds = sum(results[task]['wall_seconds'] for task in TASKS if task in results)
    networks = network_files(workdir.path).values()
    files = [(workdir.path / name) for name in FILES if (workdir.path / name).exists()]
    return {
        'Made': f'{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}',
        'Command': command(),
        'Device': device_names(run.settings.devices),
        'Versions': package_text(),
        'Time': duration(seconds) + ' for all tasks, compilation included' if seconds else '',
        'Networks': [(f'{file.stem} ({file.stat().st_size / 1e6:.2f} MB)', f'networks/{file.name}') for file in networks],
        'Figures': [(file.name, file.name) for file in files],
    }


def _quality(run: Run, pools: dict[str, ImagePool]) -> Section:
    """Returns the section that compares all sets of images, and real ones; also writes the figures to quality.json."""
    verifier = run.verifier
    if verifier is None:
        text = 'The config names no verifier (verifier.network): no network but the teacher has judged these images.'
        return Section('Quality', text)
    others, real = load_more_verifiers(run.settings.verifiers, run.teacher), run.data
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


def _classes(run: Run, data: RealData, names: Sequence[str]) -> Section:
    """Returns the section on the networks class by class; also writes by_class.json."""
    teacher, workdir = run.teacher, run.workdir
    networks: dict[str, Classifier] = {}
    titles: dict[str, str] = {}
    for name, title in COMPARED.items():
        file = FINAL_NETWORKS[name]
        if name in workdir.results and workdir.network(file).exists():
            user_module = student_of(run, teacher).user_module if name == 'distillation' else run.user_module()
            networks[file], titles[file] = load_classifier(workdir.network(file), user_module), title
    if 'quantization' in workdir.results:
        setting = smallest(workdir.results['quantization'])
        path = workdir.network(quantized_name(setting))
        if path.exists():
            networks[path.stem], titles[path.stem] = load_quantized(path, teacher), f'network of {setting}'
    digests = {name: network.digest() for name, network in {'teacher': teacher, **networks}.items()}
    found = workdir.read_json('by_class.json', {})
    if found.get('networks') != digests:  # unchanged networks keep their figures
        found = {'networks': digests, **compare_by_class(teacher, networks, data.test)}
        write_atomic(workdir.path / 'by_class.json', (json.dumps(found) + '\n').encode())
    return class_section(found, titles, names)


def _networks(run: Run) -> Section:
    """Returns the section on the size, the cost and the accuracy of all networks, and the time of all tasks."""
    workdir, results = run.workdir, run.workdir.results
    teacher, student, pruned = results['teacher'], results.get('distillation'), results.get('pruning')
    rows = [['Teacher', teacher['parameters'], teacher['flops'], percent(teacher['test_accuracy'])]]
    if student:
        rows.append(['Student', student['parameters'], student['flops'], percent(student['test_accuracy'])])
    if pruned:
        cost = round(pruned['flops_ratio'] * teacher['flops'])
        rows.append(['Pruned network', pruned['parameters'], cost, percent(pruned['test_accuracy'])])
    score, tested = teacher['verifier_test_accuracy'], teacher['test_images']
    readable = run.settings.verifier.weights or workdir.network('verifier').exists()
    if score is not None and readable and (verifier := run.verifier):
        rows.append(['Verifier', verifier.parameters, flops(verifier), percent(score)])
    caption = ('' if tested is None else f'{tested:,} real test images. ') + 'Two FLOPs per multiply-add.'
    times = [[task, results[task]['wall_seconds']] for task in TASKS if task in results]
    return Section(
        'Networks and time',
        tables=[
            Table(('Network', 'parameters', 'FLOPs per image', 'real test accuracy'), rows, caption=caption),
            Table(('Task', 'seconds'), times, caption='Wall time, compilation included.'),
        ],
    )
