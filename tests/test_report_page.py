"""The report: grids, charts, the page and what the task puts there, checked on what a reader would see."""

import base64
import contextlib
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import factories
import numpy as np
import pytest
from PIL import Image
from smoke import smoke_config

from dvinv import report
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.runtime.charts import LARGEST, MAX_BUCKETS, MAX_DOTS, line_chart
from dvinv.runtime.page import Picture, Section, Table, Tile, number, percent, render
from dvinv.runtime.pictures import class_grid, png_data_uri, shown_classes
from dvinv.runtime.workdir import Workdir

HOSTILE = '<script src="x">&\'</script>'


def _numbered(labels, channels=1, size=4):
    """Images [N, size, size, channels] whose every pixel is the index of the image plus one."""
    index = np.arange(1, len(labels) + 1, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.broadcast_to(index, (len(labels), size, size, channels)).copy(), np.array(labels)


def _points(svg):
    """The coordinates [N, 2] of each series path, its gaps ignored."""
    paths = re.findall(r'<path d="([^"]*)" fill="none"', svg)
    return [np.array(re.findall(r'[ML]([-\d.]+) ([-\d.]+)', path), dtype=float) for path in paths]


# Grids


@pytest.mark.parametrize('channels', [1, 3])
def test_a_row_is_a_class_and_columns_keep_their_order(channels):
    images, labels = _numbered([7, 2, 7, 2, 7], channels)
    grid = class_grid(images, labels, per_class=2, gap=3, width=43)
    assert grid.size == (43, 43)  # 2 cells of 4 px, grown 5 times, and a gap of 3
    pixels = np.asarray(grid)
    assert pixels.shape[-1] == channels + 1
    for row, column, value in [(0, 0, 2), (0, 1, 4), (1, 0, 1), (1, 1, 3)]:
        cell = pixels[23 * row : 23 * row + 20, 23 * column : 23 * column + 20]
        assert np.all(cell[..., :-1] == value)
        assert np.all(cell[..., -1] == 255)
    assert np.all(pixels[20:23, :, -1] == 0)
    assert np.all(pixels[:, 20:23, -1] == 0)


def test_pixels_of_an_image_are_neither_flipped_nor_smoothed():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1) * 40
    pixels = np.asarray(class_grid(image, np.zeros(1, int), per_class=1, width=12))
    np.testing.assert_array_equal(pixels[..., 0], np.kron(image[0, ..., 0], np.ones((4, 4), np.uint8)))


def test_colours_keep_their_channels():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 1] = (10, 20, 30)
    grid = class_grid(image, np.zeros(1, int), per_class=1, width=2)
    assert grid.getpixel((1, 0)) == (10, 20, 30, 255)


def test_a_class_with_too_few_images_leaves_its_cells_empty():
    images, labels = _numbered([0, 0, 1])
    pixels = np.asarray(class_grid(images, labels, per_class=2, gap=0, width=8))
    assert np.all(pixels[:4, :, 1] == 255)
    assert np.all(pixels[4:, :4, 1] == 255)
    assert np.all(pixels[4:, 4:, 1] == 0)


@pytest.mark.parametrize(('size', 'per_class'), [(8, 10), (28, 10), (32, 8), (224, 10), (512, 5)])
def test_grids_are_about_as_wide_as_a_page(size, per_class):
    images = np.zeros((per_class, size, size, 3), np.uint8)
    assert 700 <= class_grid(images, np.zeros(per_class, int), per_class).width <= 1000


def test_many_classes_are_limited_to_evenly_spaced_rows():
    labels = np.arange(1000)[::-1]
    assert shown_classes(labels, 4) == [0, 333, 666, 999]
    images = np.zeros((1000, 2, 2, 1), np.uint8)
    assert class_grid(images, labels, 1, max_classes=4, gap=1, width=2).size == (2, 4 * 2 + 3)


@pytest.mark.parametrize(
    ('images', 'labels'),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int)),
        (np.zeros((2, 4, 4, 2), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int)),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int)),
    ],
)
def test_what_is_no_grid_is_refused(images, labels):
    with pytest.raises(ValueError, match=r'\d'):
        class_grid(images, labels, 1)


def test_a_data_uri_decodes_to_the_same_pixels():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    grid = class_grid(images, np.arange(4), 1, width=5)
    head, data = png_data_uri(grid).split(',')
    assert head == 'data:image/png;base64'
    back = Image.open(io.BytesIO(base64.b64decode(data)))
    assert back.mode == grid.mode
    np.testing.assert_array_equal(np.asarray(back), np.asarray(grid))


# Charts


def _ticks(svg):
    """What stands below the x axis."""
    return re.findall(r'text-anchor="middle" style="[^"]*">([\d,.]+)</text>', svg)


@pytest.mark.parametrize(('log_y', 'log_x'), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    'y',
    [
        [],
        [3.0],
        [0.0],
        [2.0] * 5,
        [0.0] * 5,
        [-1.0, -2.0],
        [float('nan')] * 4,
        [1.0, None, 2.0],
        [1.0, float('inf'), 2.0, -float('inf')],
        [1e-12, 1e12],
        [1e308, -1e308, 5.0],
        [5e-324, 1e-310],
        [1e-299],
        [1e299],
        [1e-299, 1e299],
        [1e6, 1e6 + 1e-3],
        [0.0, 1e-9, 4.0],
    ],
)
def test_any_values_make_a_well_formed_chart_of_finite_coordinates(y, log_y, log_x):
    svg = line_chart({'loss': (list(range(len(y))), y)}, 't', 'x', 'y', log_y, log_x)
    ElementTree.fromstring(svg)
    assert not re.search(r'\b(nan|inf)\b', svg)
    for points in _points(svg):
        assert np.all((points >= 0) & (points <= 520))


def test_no_series_says_so():
    svg = line_chart({}, 't', 'x', 'y', log_y=True)
    ElementTree.fromstring(svg)
    assert 'no data' in svg


def test_a_gap_breaks_the_line_and_leaves_a_lone_point_visible():
    many = [1.0] * MAX_DOTS
    svg = line_chart({'a': (range(MAX_DOTS + 4), [*many, None, 3, float('nan'), 5])}, 't', 'x', 'y')
    (path,) = re.findall(r'<path d="([^"]*)" fill="none"', svg)
    assert re.sub(r'[-\d. ]', '', path) == f'M{"L" * (MAX_DOTS - 1)}MM'
    assert svg.count('r="2.6"') == 2  # the lone point, and the last one


def test_few_points_are_dots():
    few, many = range(MAX_DOTS), range(MAX_DOTS + 1)
    assert line_chart({'a': (few, few)}, 't', 'x', 'y').count('r="2.6"') == MAX_DOTS
    assert line_chart({'a': (many, many)}, 't', 'x', 'y').count('r="2.6"') == 1


def test_lines_lie_where_their_values_say():
    ((first, second, third),) = _points(line_chart({'a': ([0, 10, 20], [0.0, 5.0, 10.0])}, 't', 'x', 'y'))
    np.testing.assert_allclose(second, (first + third) / 2, atol=0.1)
    assert first[0] < third[0]
    assert first[1] > third[1]
    ((first, second, third),) = _points(line_chart({'a': ([0, 1, 2], [0.1, 1, 10])}, 't', 'x', 'y', log_y=True))
    np.testing.assert_allclose(second, (first + third) / 2, atol=0.1)
    ((first, second, third),) = _points(line_chart({'a': ([16, 64, 256], [1, 2, 3])}, 't', 'x', 'y', log_x=True))
    np.testing.assert_allclose(second, (first + third) / 2, atol=0.1)


@pytest.mark.parametrize(
    ('counts', 'ticks'),
    [
        ((256, 1024, 4096), ['500', '1,000', '2,000']),
        ((64, 256_000), ['100', '1,000', '10,000', '100,000']),
        ((256, 512), ['300', '400', '500']),
        ((1024,), ['1,000', '1,500', '2,000']),
    ],
)
def test_a_log_axis_of_counts_has_plain_numbers(counts, ticks):
    svg = line_chart({'a': (counts, counts)}, 't', 'images', 'y', log_x=True)
    assert _ticks(svg) == ticks
    assert '>images, log scale<' in svg
    assert f'<title>a: {counts[-1]:.4g} at {counts[-1]:,}</title>' in svg


def test_a_log_axis_counts_what_it_cannot_show():
    svg = line_chart({'a': (range(4), [0, 0, 1, 10])}, 't', 'x', 'y', log_y=True)
    assert '2 values ≤ 0 not shown' in svg
    assert len(_points(svg)[0]) == 2
    assert 'log scale' not in line_chart({'a': ([0, 1], [0, 0])}, 't', 'x', 'y', log_y=True)
    svg = line_chart({'a': ([0, -1, 1, 10], [0, 1, 2, 3])}, 't', 'x', 'y', log_x=True)
    assert '2 values ≤ 0 not shown' in svg
    assert len(_points(svg)[0]) == 2
    assert 'log scale' not in line_chart({'a': ([-1, 0], [1, 2])}, 't', 'x', 'y', log_x=True)


def test_a_long_series_is_thinned_but_keeps_its_spike_ends_and_gap():
    x, y = np.arange(100_000), np.ones(100_000)
    y[54_321] = 7.0
    y[70_000:80_000] = np.nan
    svg = line_chart({'a': (x, y)}, 't', 'x', 'y')
    (points,) = _points(svg)
    assert len(points) <= 2 * MAX_BUCKETS + 2
    assert len(svg) < 30_000
    assert points[:, 1].min() < points[0, 1] - 100
    np.testing.assert_array_equal(points[-1, 0], 520 - 16)
    (path,) = re.findall(r'<path d="([^"]*)" fill="none"', svg)
    assert path.count('M') == 2


def test_tooltips_tell_the_values():
    svg = line_chart({'student': ([10, 20], [0.5, 0.25])}, 't', 'x', 'y')
    assert '<title>student: 0.5 at 10</title>' in svg
    assert '<title>student: 0.25 at 20</title>' in svg


def test_series_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="'a' has 2 x values but 3 y values"):
        line_chart({'a': ([1, 2], [1, 2, 3])}, 't', 'x', 'y')


def test_chart_text_is_escaped():
    svg = line_chart({HOSTILE: ([1, 2], [1, LARGEST])}, HOSTILE, HOSTILE, HOSTILE)
    ElementTree.fromstring(svg)
    assert '<script' not in svg
    assert svg.count('&lt;script') >= 5


# Page


def _page(text='plain'):
    images, labels = _numbered([0, 1, 1])
    table = Table([text, 'b'], [[text, 0.5], ['y', None]], caption=text, highlight=0)
    chart = line_chart({text: ([0, 1], [1, 2])}, text, text, text)
    pictures = [
        Picture(class_grid(images, labels, 2), text, [text, 1], wide=True),
        Picture(Image.new('L', (2, 2)), 'p'),
    ]
    sections = [Section(text, text, [table], [chart], pictures), Section('Empty')]
    return render(text, text, [Tile(text, text, text, 0.5), Tile('a', percent(None))], sections, text, text, text)


class _Balance(HTMLParser):
    """Checks that each element is closed in its order, and collects the tags."""

    VOID = ('meta', 'img')

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize('text', ['plain', HOSTILE])
def test_the_page_is_balanced_and_no_text_becomes_markup(text):
    page = _page(text)
    parser = _Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert 'script' not in parser.tags
    assert '<script' not in page
    assert parser.tags.count('img') == 2
    assert parser.tags.count('svg') == 1
    assert 'details' in parser.tags


def test_the_page_refers_to_nothing_outside():
    page = _page().replace('xmlns="http://www.w3.org/2000/svg"', '')
    assert 'http://' not in page
    assert 'https://' not in page
    assert 'url(' not in page
    assert '@import' not in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith(('data:image/png;base64,', '#s'))


def test_the_page_is_the_same_for_the_same_inputs():
    assert _page() == _page()


def test_links_lead_to_sections():
    page = _page()
    assert re.findall(r'href="#(s\d)"', page) == re.findall(r'<section id="(s\d)"', page) == ['s0', 's1']


def test_unknown_values_are_a_dash_and_figures_are_readable():
    assert percent(None) == number(None) == number(float('nan')) == percent(float('nan')) == '–'
    assert percent(0.9917) == '99.2%'
    shown = [number(v) for v in (120_010, 2.13749, 40.0, 0.00012347, 12_345.67, 1e-9, 0.0, 100.0, np.float32(0.5))]
    assert shown == ['120,010', '2.137', '40', '0.0001235', '12,346', '1e-09', '0', '100', '0.5']
    assert '<td class="words">y</td><td>–</td>' in _page()


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match='Row 0 of a table has 1 cells for 2 columns'):
        render('t', 's', sections=[Section('a', tables=[Table(['x', 'y'], [['only']])])])


# The task


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
    """`report_of(method, rounds=1, pool='', figures={}, **changes)`: the page of a run whose results are made up.

    A pool of one batch from the teacher factories:own; a line of metrics at the start and at the end of two batches.
    """

    def report_of(method, rounds=1, pool='', figures=(), **changes):
        config = smoke_config(teacher__factory='factories:own', distillation__controls=(), pool=pool, **changes)
        config.synthesis.method = 'deepinversion' if pool else method
        images, labels = _numbered([0, 1], size=8)
        made = ImagePool(pool or tmp_path / 'run' / 'pool', factories.own().digest())
        made.write(0, images, labels, np.zeros((2, 10)), {'config': {'method': method}})
        terms = {'loss': 3.0, 'cross_entropy': 1.0, 'feature': 2.0, 'total_variation': 3.0, 'l2': 4.0}
        if method == 'adaptive':
            terms['competition'] = 0.5
        with contextlib.closing(Workdir(tmp_path / 'run', config)) as workdir:
            if method != 'noise' and not pool:
                for batch in (1, 0):  # one that was lost stands last
                    lines = [
                        {'step': step, 'batch': batch, **{term: value / (step + batch + 1) for term, value in terms.items()}}
                        for step in (0, 4)
                    ]
                    workdir.metrics.append('synthesis', method, lines)
            workdir.metrics.append('distillation', 'student', [{'step': 20, 'loss': 1.0}])
            seconds = {'wall_seconds': 1.0}
            workdir.add_results('teacher', TEACHER | seconds)
            workdir.add_results('synthesis', MADE | seconds | {'rounds': rounds})
            workdir.add_results('distillation', TAUGHT | seconds | dict(figures))
            report.run(config, workdir)
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
    assert f'<caption>40 images, synthesized {words.split(", without any")[0]}.</caption>' in page
    charts = _charts(page)
    assert charts.pop('Loss terms, mean over batches, before weighting', None) == terms
    assert [title.split(',')[0] for title in charts] == ['Distillation loss']
    assert 'no data' not in page
    assert '<td class="words">Batches</td><td>2</td>' in page


def test_rounds_of_competition_are_drawn_by_batch(report_of):
    page = report_of('adaptive', rounds=2)
    assert '<td class="words">Rounds in which they came to the student</td><td>2</td>' in page
    assert _charts(page)['Loss terms at the end of each batch, before weighting'] == ['feature loss', 'competition']
    assert re.findall(r'<title>competition: (\S+) at (\d)</title>', page)[-2:] == [('0.1', '0'), ('0.08333', '1')]


def test_an_existing_pool_is_told_by_its_own_method(report_of, tmp_path):
    page = report_of('adaptive', pool=str(tmp_path / 'pool'))
    assert 'by Adaptive DeepInversion' in page
    assert [title.split(',')[0] for title in _charts(page)] == ['Distillation loss']


def test_an_empty_pool_is_refused(report_of, tmp_path):
    report_of('deepinversion')
    (tmp_path / 'run' / 'pool' / 'shard-000000.json').unlink()
    config = smoke_config(teacher__factory='factories:own', distillation__controls=())
    with (
        contextlib.closing(Workdir(tmp_path / 'run', config)) as workdir,
        pytest.raises(DvinvError, match='There is no image in the pool'),
    ):
        report.run(config, workdir)


def test_the_curve_by_image_count_shows_what_was_measured(report_of):
    figures = {f'test_accuracy_of_{count}_images': score for count, score in ((1024, 0.75), (40, None), (256, 0.5))}
    page = report_of('adaptive', figures=figures.items(), distillation__counts=(1024, 40, 256, 7))
    assert _charts(page)['Student accuracy against image count'] == ['Student']
    assert re.findall(r'<title>Student: (\S+) at (\S+)</title>', page) == [('0.5', '256'), ('0.75', '1,024')]
    assert re.findall(r'<td class="words">([\d,]+)</td><td>([\d.%]+)</td>', page) == [('256', '50.0%'), ('1,024', '75.0%')]


@pytest.mark.parametrize('counts', [(), (20, 40)])
def test_no_curve_without_figures(report_of, counts):
    page = report_of('adaptive', figures={f'test_accuracy_of_{count}_images': None for count in counts}.items())
    assert 'image count' not in page
    assert 'Noise images' not in page  # nor a row of a control that was not asked for
