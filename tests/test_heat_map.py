"""The accuracy matrix of a report: a cell a share, well-formed, text escaped."""

import re
from xml.etree import ElementTree

from dvinv.report.heat_map import CELL, heat_map

HOSTILE = '<script src="x">&\'</script>'


def test_a_cell_a_share_darker_where_it_is_higher():
    svg = heat_map([[0.25], [1.0, None, 0.0]], HOSTILE, ['after 0', HOSTILE], ['0', '1', HOSTILE])
    ElementTree.fromstring(svg)
    assert '<script' not in svg
    cells = re.findall(r'<rect x="(\d+)" y="(\d+)".*?fill-opacity="([\d.]+)"><title>([^<]*)<', svg)
    assert [told.rpartition(' ')[2] for *_, told in cells] == ['25.0%', '100.0%', '0.0%']
    low, high, none = (float(opacity) for _, _, opacity, _ in cells)
    assert none < low < high
    (x0, y0), (x1, y1), (x2, y2) = ((int(x), int(y)) for x, y, *_ in cells)
    assert (x1 - x0, y1 - y0, x2 - x1, y2 - y1) == (0, CELL[1], 2 * CELL[0], 0)
    assert re.findall(r'text-anchor="middle">([\d.]+)<', svg) == ['25.0', '100.0', '0.0']


def test_many_columns_widen_the_chart():
    svg = heat_map([[0.5] * 20], 't', ['a'], [f'task {i}' for i in range(20)])
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert max(int(x) for x in re.findall(r'<rect x="(\d+)"', svg)) + CELL[0] <= width + 2
