"""The task `report`: what it puts on the page, checked on what a reader would see."""

import contextlib
import json
import re

import factories
import numpy as np
import pytest
from smoke import smoke_config, smoke_run
from tiny import numbered, saved

from dvinv.config import parse
from dvinv.data.pool import ImagePool
from dvinv.pipeline.run import Run
from dvinv.pruning.task import pruning_sentence
from dvinv.quantization.task import quantization_section
from dvinv.report import task as report
from dvinv.report.page import render
from dvinv.runtime.errors import DvinvError

TEACHER = {'test_accuracy': 0.9, 'verifier_test_accuracy': None, 'test_images': 360, 'parameters': 9, 'flops': 9}
MADE = {
    'images': 40,
    'batches': 2,
    'iterations': 5,
    'teacher_accuracy': 1.0,
    'verifier_accuracy': None,
    'verifier_top5_accuracy': None,
    'feature_loss_first': 9.0,
    'feature_loss_last': 1.0,
    'feature_loss_real': 2.0,
}
TAUGHT = {'test_accuracy': 0.8, 'parameters': 5, 'parameters_ratio': 0.5, 'flops': 5, 'updates': 20}
TERMS = ('cross-entropy', 'feature loss', 'total variation')


@pytest.fixture
def report_of(tmp_path):
    """`report_of(method, rounds=1, pool='', figures={}, made={}, **changes)`: the page of a run whose results are made up.

    A pool of two batches from the teacher factories:own, with their loss terms at the start and at the end.
    """

    def report_of(method, rounds=1, pool='', figures=(), made=(), **changes):
        none = {'verifier__network': '', 'distillation__controls': ()}
        config = smoke_config(teacher__factory='factories:own', pool=pool, **{**none, **changes})
        config.synthesis.update(method='deepinversion' if pool else method, images=2 * config.synthesis.batch_size)
        if method == 'adaptive':
            config.synthesis.update(batches_per_round=1)
            config.synthesis.weights.competition = config.distillation.updates_per_round = 1
        images, labels = numbered([0, 1], size=8)
        stored = ImagePool(pool or tmp_path / 'run' / 'pool', factories.own().digest())
        terms = {'loss': 3.0, 'cross_entropy': 1.0, 'feature': 2.0, 'total_variation': 3.0, 'l2': 4.0}
        if method == 'adaptive':
            terms['competition'] = 0.5
        for batch in range(2):
            curve = {term: [value / (step + batch + 1) for step in (0, 4)] for term, value in terms.items()}
            curve = {} if method == 'noise' else {'step': [0, 4], **curve}
            stored.write(batch, images, labels, np.zeros((2, 10)), {'config': {'method': method}, 'curve': curve})
        run = Run(parse(config), tmp_path / 'run')
        with contextlib.closing(run.open_workdir()) as workdir:
            workdir.metrics.append('distillation', 'student', [{'step': 20, 'loss': 1.0}])
            seconds = {'wall_seconds': 1.0}
            workdir.add_results('teacher', TEACHER | seconds)
            workdir.add_results('synthesis', MADE | seconds | {'rounds': rounds} | dict(made))
            workdir.add_results('distillation', TAUGHT | seconds | dict(figures))
            report.run(run)
        return (tmp_path / 'run' / 'report.html').read_text().split('<details')[0]

    return report_of


def _charts(page):
    """{title: names of its series} of the charts of a page."""
    return {
        re.search(r'chart-title"[^>]*>([^<]*)<', svg)[1]: re.findall(r'<tspan dx="6">([^<]*)<', svg)
        for svg in re.findall(r'<svg.*?</svg>', page, re.S)
    }


@pytest.mark.parametrize(
    ('method', 'words', 'terms'),
    [
        ('deepinversion', 'by DeepInversion, without any data: pixels were', [*TERMS]),
        ('adaptive', 'by Adaptive DeepInversion, without any data: pixels were', [*TERMS, 'competition']),
        ('prior_only', 'by DeepInversion without its feature term, without any data: pixels were', [*TERMS]),
        ('noise', 'by drawing noise, without any data: every inversion starts from it', None),
    ],
)
def test_the_page_tells_the_method_and_its_terms(report_of, method, words, terms):
    page = report_of(method)
    assert f'40 images were synthesized {words}' in page
    assert f'<figcaption>40 images, synthesized {words.split(", without any")[0]}.</figcaption>' in page
    charts = _charts(page)
    assert charts.pop('Loss terms, mean over batches, before weighting', None) == terms
    assert [title.split(',')[0] for title in charts] == ['Distillation loss']
    assert 'no data' not in page
    assert '<td class="words">Batches</td><td>2</td>' in page


@pytest.mark.parametrize(('accuracy', 'verdict'), [(0.98, 'was sure of them'), (0.23, 'leaned towards their class')])
def test_the_page_claims_no_more_than_the_teacher_says_of_the_images(report_of, accuracy, verdict):
    page = report_of('deepinversion', made={'teacher_accuracy': accuracy})
    assert f'pixels were optimized until a trained network {verdict} and found' in page


def test_rounds_of_competition_are_drawn_by_batch(report_of):
    page = report_of('adaptive', rounds=2)
    assert '<td class="words">Rounds of images and student training</td><td>2</td>' in page
    assert _charts(page)['Loss terms at the end of each batch, before weighting'] == ['feature loss', 'competition']
    assert re.findall(r'<title>competition: (\S+) at (\d)</title>', page)[-2:] == [('0.1', '0'), ('0.08333', '1')]


def test_an_existing_pool_is_told_by_its_own_method(report_of, tmp_path):
    page = report_of('adaptive', pool=str(tmp_path / 'pool'))
    assert 'by Adaptive DeepInversion' in page
    assert 'competition' in _charts(page)['Loss terms, mean over batches, before weighting']


def test_the_page_names_the_network_the_command_and_the_files(report_of, tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['/x/dvinv/main.py', '--config', 'c.py'])
    (tmp_path / 'run' / 'networks').mkdir(parents=True)
    (tmp_path / 'run' / 'networks' / 'other one.safetensors').write_bytes(bytes(20_000))
    page = report_of('deepinversion', data__class_names=())
    assert '<h1>factories:own on digits: a student from images of the network alone</h1>' in page
    facts = dict(re.findall('<dt>(.*?)</dt><dd>(.*?)</dd>', page[page.index('<dl class="facts">') :]))
    assert {*facts} == {'Made', 'Command', 'Device', 'Versions', 'Time', 'Networks', 'Figures'}
    assert (facts['Command'], facts['Time']) == (
        'python -m dvinv.main --config c.py',
        '3 s for all tasks, compilation included',
    )
    assert facts['Networks'] == '<a href="networks/other%20one.safetensors">other one (0.02 MB)</a>'
    assert '<a href="by_class.json">' in facts['Figures']


def test_a_report_that_is_made_anew_compares_classes_once(report_of, monkeypatch):
    first = report_of('deepinversion')
    monkeypatch.setattr(report, 'compare_by_class', None)
    matrices = [
        page[page.index('<h2>Class by class') : page.index('<h2>Teacher')] for page in (first, report_of('deepinversion'))
    ]
    assert matrices[0] == matrices[1]


def test_every_task_has_its_sentence(report_of):
    page = report_of('deepinversion')
    texts = dict(re.findall('<h2>(.*?)</h2>\n<div class="text"><p>(.*?)</p>', page))
    assert texts['Synthesis'] == 'The teacher takes 100.0% of the 40 images for their class.'
    assert texts['Distillation'].startswith('The student has 0.50 of the teacher')
    assert texts['Distillation'].endswith('it reads 80.0% of the real test images right, the teacher 90.0%.')
    assert texts['Teacher'].startswith(
        'factories:own, of 9 parameters, came from the function factories:own; it reads 90.0%'
    )


def test_real_images_stand_beside_synthesized_ones(report_of):
    captions = re.findall('<figcaption>(.*?)</figcaption></figure>', report_of('deepinversion'))
    assert captions[0].startswith('Synthesized: the first images of each class.')
    assert captions[1].startswith('Real images of the same classes, for comparison.')


def test_without_data_nothing_empty_is_shown(report_of):
    none = {'test_accuracy': None}
    made = {'feature_loss_real': None, 'verifier_accuracy': None}
    figures = {**none, 'held_out_images': 4, 'held_out_agreement': 0.75, 'held_out_class_agreement': [0.5, 1.0]}
    page = report_of('deepinversion', made=made, figures=figures, data__name='', data__class_names=('ant', 'bee'))
    assert '<h1>factories:own: a student' in page
    assert re.findall('<dt>([^<]*)</dt><dd><strong>', page) == ['Student', 'Teacher', 'Feature loss']
    assert 'from 9</span>' in page
    assert 'row by row: ant, bee.' in page
    told = 'agrees with the teacher on 75.0% of 4 synthesized images that it did not learn from.'
    assert f'<p>A student that learned from them {told} How many real images' in page
    assert f'learned from it alone; it {told} How many real images' in page
    assert '<td class="words">bee</td><td>100.0%</td>' in page
    assert 'Class by class' not in page
    assert 'Real images' not in page


def _quantized(score, **others):
    figures = {'test_accuracy': score, 'test_agreement': score, 'test_kl': score, 'mse_test_accuracy': score}
    of = {'bytes': 10, 'bytes_ratio': 0.1, 'distilled': False, **figures}
    return {'w2a2': of, 'w2a4': of, 'w8a8': {**of, 'bytes': 40}, 'float_bytes': 100, 'float_test_accuracy': score, **others}


def test_a_quantization_has_its_tile_its_sentence_and_a_place_a_setting():
    section = quantization_section(_quantized(0.5))
    (tile,) = section.tiles
    assert (
        section.text
        == 'In w2a2 the network takes 10.0% of its bytes and reads 50.0% of the real test images right, in float32 50.0%.'
    )
    assert (tile.label, tile.value, tile.note) == ('w2a2', '50.0%', 'real test accuracy in 10% of the bytes')
    assert re.findall(r'<title>real images: \S+ at (\S+)</title>', section.charts[0].svg) == []
    assert re.findall(r'<title>pool, least error: \S+ at (\S+)</title>', section.charts[0].svg) == ['2', '3', '8']


def test_a_quantization_without_data_shows_bytes_alone():
    section = quantization_section(_quantized(None))
    page = render('t', 's', section.tiles, [section])
    assert '–' not in page
    assert '<svg' not in page
    assert section.text == 'In w2a2 the network takes 10.0% of its bytes.'
    assert '<strong>10%</strong>' in page


@pytest.mark.parametrize(
    ('score', 'told'),
    [
        (0.9, 'the network reads 90.0% of the real test images right, 95.0% before.'),
        (None, 'the network was fine-tuned on synthesized images alone.'),
    ],
)
def test_a_pruning_has_its_sentence(score, told):
    found = {'flops_ratio': 0.5, 'parameters_ratio': 0.25, 'test_accuracy': score, 'unpruned_test_accuracy': 0.95}
    assert pruning_sentence(found) == f'With 50% of its FLOPs and 25% of its parameters left, {told}'


def test_without_a_verifier_the_page_tells_why_it_has_no_figures_of_quality(report_of):
    assert '<h2>Quality</h2>\n<div class="text"><p>The config names no verifier' in report_of('noise')


def test_a_pool_that_lacks_a_batch_is_refused(report_of, tmp_path):
    report_of('deepinversion')
    (tmp_path / 'run' / 'pool' / 'shard-000000.json').unlink()
    own = {'teacher__factory': 'factories:own', 'verifier__network': '', 'distillation__controls': ()}
    run = smoke_run(tmp_path / 'run', **own, synthesis__images=40)
    with (
        contextlib.closing(run.open_workdir()),
        pytest.raises(DvinvError, match=r'Batch 0 is missing from .*; run the task synthesis first'),
    ):
        report.run(run)


def test_the_curve_by_image_count_shows_what_was_measured(report_of):
    figures = {f'test_accuracy_of_{count}_images': score for count, score in ((36, 0.75), (12, None), (24, 0.5))}
    page = report_of('adaptive', figures=figures.items(), distillation__counts=(36, 12, 24, 7))
    assert _charts(page)['Student accuracy against image count'] == ['Student']
    assert re.findall(r'<title>Student: (\S+) at (\S+)</title>', page) == [('0.5', '24'), ('0.75', '36')]
    found = re.findall(r'<td class="words">([\d,]+)</td><td>([\d.%]+)</td></tr>', page)
    assert found == [('24', '50.0%'), ('36', '75.0%')]


@pytest.mark.parametrize('counts', [(), (20, 40)])
def test_no_curve_without_figures(report_of, counts):
    page = report_of('adaptive', figures={f'test_accuracy_of_{count}_images': None for count in counts}.items())
    assert 'image count' not in page
    assert 'Noise images' not in page  # nor a row of a control that was not asked for


@pytest.mark.parametrize('hinted', [0, 19])
def test_hints_are_told_where_there_were_some(report_of, hinted):
    page = report_of('noise', figures={'hinted_layers': hinted})
    assert ('with hints from 19 BatchNorm layers of the teacher; last update' in page) == bool(hinted)
    assert ('T² KL and hints on its own images' in page) == bool(hinted)
    assert ('and hints' in page) == bool(hinted)


@pytest.mark.slow
def test_the_page_and_quality_json_tell_all_verifiers(report_of, tmp_path):
    networks = [
        {'network': name, 'weights': saved(tmp_path / f'{name}.safetensors', name, 10, (8, 8, 1))}
        for name in ('small_convnet', 'small_resnet')
    ]
    first = {f'verifier__{field}': value for field, value in {**networks[0], 'width': 0.125}.items()}
    page = report_of('noise', **first, verifiers=(networks[1],))
    heads = re.findall(r'<th[^>]*>([^<]*)</th>', page[page.index('<h2>Quality') :])
    assert heads[1:6] == ['small_convnet', 'small_convnet, top 5', 'small_resnet', 'small_resnet, top 5', 'inception score']
    told = json.loads((tmp_path / 'run' / 'quality.json').read_text())
    assert [(name, *of['verifiers']) for name, of in told.items()] == [
        ('synthesized', 'small_resnet'),
        ('real', 'small_resnet'),
    ]
