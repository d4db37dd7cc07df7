"""Charts: well-formed for any values, lines where the values say, a cell a share, text escaped."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dvinv.report import charts
from dvinv.report.charts import CELL, LARGEST, MAX_BUCKETS, MAX_DOTS, PANEL_HEIGHT, bars

HOSTILE = '<script src="x">&\'</script>'


def line_chart(*args, **kwargs):
    """The markup of a line chart."""
    return charts.line_chart(*args, **kwargs).svg


def line_panels(*args, **kwargs):
    """The markup of a chart of panels."""
    return charts.line_panels(*args, **kwargs).svg


def heat_map(*args):
    """The markup of a heat map."""
    return charts.heat_map(*args).svg


def _points(svg):
    """The coordinates [N, 2] of each series path, its gaps ignored."""
    paths = re.findall(r'<path d="([^"]*)" fill="none"', svg)
    return [np.array(re.findall(r'[ML]([-\d.]+) ([-\d.]+)', path), dtype=float) for path in paths]


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
    chart = charts.line_chart({'loss': (list(range(len(y))), y)}, 't', 'x', 'y', log_y, log_x)
    if not np.isfinite(np.array(y, float)).any():
        assert chart is None
        return
    svg = chart.svg
    ElementTree.fromstring(svg)
    assert not re.search(r'\b(nan|inf)\b', svg)
    for points in _points(svg):
        assert np.all((points >= 0) & (points <= 520))


@pytest.mark.parametrize('series', [{}, {'a': ([], [])}, {'a': ([1, 2], [None, None])}])
def test_nothing_is_drawn_of_no_points(series):
    assert charts.line_chart(series, 't', 'x', 'y', log_y=True) is charts.line_panels(series, 't', 'x', log_y=True) is None


def test_panels_have_an_axis_each_so_that_small_values_are_seen():
    series = {'small': ([0, 5, 10], [0.01, 0.02, 0.03]), 'large': ([0, 5, 10], [900.0, 950.0, 1000.0]), 'none': ([], [])}
    svg = line_panels(series, 'terms', 'iteration')
    ElementTree.fromstring(svg)
    small, large = _points(svg)
    for points in (small, large):
        np.testing.assert_allclose(points[0, 1] - points[2, 1], PANEL_HEIGHT / 1.1, atol=0.2)  # less 5% at both ends
    assert small[:, 1].max() < large[:, 1].min()
    np.testing.assert_array_equal(small[:, 0], large[:, 0])
    assert re.findall(r'<tspan dx="6">([^<]*)<', svg) == ['small', 'large']
    assert 'series-1' in svg
    assert 'series-2' in svg
    assert _ticks(svg) == ['0', '2', '4', '6', '8', '10']  # the x axis, once


def test_a_panel_that_has_no_place_on_a_log_axis_has_a_linear_one():
    svg = line_panels({'loss': ([0, 1], [1.0, 100.0]), 'zero': ([0, 1], [0.0, -1.0])}, 't', 'x', log_y=True)
    assert [len(points) for points in _points(svg)] == [2, 2]
    assert 'not shown' not in svg


@pytest.mark.parametrize('decades', [0.5, 2, 4, 12, 40])
def test_a_panel_has_room_for_its_ticks(decades):
    svg = line_panels({'a': ([0, 1], [1.0, 10.0**decades])}, 't', 'x', log_y=True)
    heights = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end"', svg))
    assert 1 <= len(heights) <= 6
    assert np.all(np.diff(heights) >= 11)


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


def test_a_cell_a_share_darker_where_it_is_higher():
    svg = heat_map([[0.25], [1.0, None, 0.0]], HOSTILE, ['after 0', HOSTILE], ['0', '1', HOSTILE])
    ElementTree.fromstring(svg)
    assert '<script' not in svg
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)".*?fill-opacity="([\d.]+)"><title>([^<]*)<', svg)
    assert [title.rpartition(' ')[2] for *_, title in cells] == ['25.0%', '100.0%', '0.0%']
    low, high, none = (float(opacity) for _, _, opacity, _ in cells)
    assert none < low < high
    (x0, y0), (x1, y1), (x2, y2) = ((int(x), int(y)) for x, y, *_ in cells)
    assert (x1 - x0, y1 - y0, x2 - x1, y2 - y1) == (0, CELL[1], 2 * CELL[0], 0)
    assert re.findall(r'text-anchor="middle">([\d.]+)<', svg) == ['25.0', '100.0', '0.0']


def test_many_columns_widen_the_chart():
    svg = heat_map([[0.5] * 20], 't', ['a'], [f'task {i}' for i in range(20)])
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert max(int(x) for x in re.findall(r'<rect x="(\d+)"', svg)) + CELL[0] <= width + 2


def test_bars_show_what_is_left_of_what():
    svg = bars({HOSTILE: (16, 4), 'b': (8.0, 8.0)}, HOSTILE, 'channels').svg
    ElementTree.fromstring(svg)
    assert '<script' not in svg
    before, after, *_ = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg))
    assert before == pytest.approx(4 * after, rel=0.01)
    assert '<title>b: 8 of 8 channels</title>' in svg


def test_a_notebook_shows_a_chart():
    chart = charts.line_chart({'a': ([0, 1], [0, 1])}, 't', 'x', 'y')
    assert chart.svg in chart._repr_html_()


def test_means_over_lines_that_have_the_value():
    lines = [{'step': 2, 'loss': 4.0}, {'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 2.0, 'other': 3.0}]
    curves = charts.mean_curves(lines, ('loss', 'other', 'none'))
    assert curves == {'loss': ([1, 2], [1.0, 3.0]), 'other': ([2], [3.0]), 'none': ([], [])}
