"""The page: balanced, self-contained, no text becomes markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import numbered

from dvinv.data.export import class_grid
from dvinv.report.charts import line_chart
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, number, percent, render

HOSTILE = '<script src="x">&\'</script>'


def _page(text='plain'):
    images, labels = numbered([0, 1, 1])
    table = Table([text, 'b', 'c'], [[text, 0.5, 1], ['y', None, (text, text)]], caption=text, highlight=0)
    chart = line_chart({text: ([0, 1], [1, 2])}, text, text, text)
    pictures = [
        Picture(class_grid(images, labels, 2), text, [text, 1], wide=True),
        Picture(Image.new('L', (2, 2)), 'p'),
    ]
    sections = [Section(text, text, [table], [chart], pictures), Section('Empty')]
    facts = {text: text, 'files': [(text, text)]}
    return render(text, text, [Tile(text, text, text, 0.5), Tile('a', percent(None))], sections, text, facts)


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
        assert source.startswith(('data:image/png;base64,', '#s')) or source == 'plain'


def test_the_page_is_the_same_for_the_same_inputs():
    assert _page() == _page()


def test_links_lead_to_sections():
    page = _page()
    assert re.findall(r'href="#(s\d)"', page) == re.findall(r'<section id="(s\d)"', page) == ['s0', 's1']


def _render(*tables, tiles=()):
    return render('t', 's', tiles, sections=[Section('a', tables=tables)])


def test_rows_columns_and_tiles_of_unknown_values_are_left_out():
    rows = [['known', 0.5, None, '–'], ['unknown', None, float('nan'), '–'], ['partly', None, None, '3%']]
    page = _render(Table('abcd', rows, highlight=2), tiles=[Tile('known', '3%'), Tile('unknown', percent(None))])
    assert re.findall(r'<th(?: [^>]*)?>([^<]*)<', page) == ['a', 'b', 'd']
    assert re.findall(r'<tr( class="main")?><td class="words">([^<]*)<', page) == [
        ('', 'known'),
        (' class="main"', 'partly'),
    ]
    assert re.findall(r'<dt>([^<]*)<', page) == ['known']
    assert '<table' not in _render(Table('ab', [['unknown', None]]))
    assert 'only' in _render(Table('a', [['only']]))


def test_a_wide_table_is_stacked_on_a_phone_under_the_names_of_its_columns():
    wide = _render(Table(['a', 'bbbbbbbb', 'c', 'd'], [['x', 1, 2, 137_725_184]], caption='long'))
    assert '<td data-name="c">2</td>' in wide
    (width,) = re.findall(r'<table class="stack-(\d+)"', wide)
    assert f'@container (max-width: {width}rem) {{ .stack-{width} {{' in wide
    assert wide.index('<figcaption>long') < wide.index('<div class="scroll"') < wide.index('<table')
    for narrow in (Table('abcd', [['x', 1, 2, 3]]), Table('ab', [['x', 'words that go into several lines']])):
        assert 'data-name="' not in _render(narrow)
    assert 'data-name="' in _render(Table('abc', [['long', 'text', 'everywhere']], text_columns=3))
    many = Table([f'column{i}' for i in range(20)], [[0.25] * 20])
    assert many.stacking_width > 71  # rem of the page: it is a list on every screen


def test_charts_without_a_line_are_left_out():
    assert 'class="plot"' not in render('t', 's', sections=[Section('a', charts=[line_chart({}, 't', 'x', 'y')])])


def test_grids_name_their_classes():
    images, labels = numbered([0, 1, 1, 1])
    picture = class_picture(images, labels, 'c', ('ant', 'bee'), 4, wide=True)
    assert (picture.row_labels, picture.caption, picture.wide) == (['ant', 'bee'], 'c', True)
    assert class_picture(images, labels, 'c', (), 4).row_labels == ['0', '1']
    assert picture._repr_png_().startswith(b'\x89PNG')  # for a notebook


def test_classes_of_few_images_stand_side_by_side_and_real_ones_in_the_same_places():
    images, labels = numbered([5, 3, 4, 3])
    picture = class_picture(images, labels, 'c', (), 4)
    assert (picture.row_labels, picture.caption) == ((), 'c One per class, row by row: 3, 4, 5.')
    real, of = numbered([5] * 9 + [4] * 9 + [3] * 9 + [0])
    beside = class_picture(real, of, 'r', (), 4, labels)
    assert (beside.image.size, beside.caption) == (picture.image.size, 'r One per class, in the same places.')
    assert class_picture(real, of, 'r', (), 4, np.array([3, 7])).caption == 'r One per class, row by row: 3.'
    many = class_picture(images, labels, 'c', (), 4, of)  # rows, as the other set has
    assert many.row_labels == ['0', '3', '4', '5']


def test_unknown_values_are_a_dash_and_figures_are_readable():
    assert percent(None) == number(None) == number(float('nan')) == percent(float('nan')) == '–'
    assert percent(0.9917) == '99.2%'
    shown = [number(v) for v in (120_010, 2.13749, 40.0, 0.00012347, 12_345.67, 1e-9, 0.0, 100.0, np.float32(0.5))]
    assert shown == ['120,010', '2.137', '40', '0.0001235', '12,346', '<0.0001', '0', '100', '0.5']
    assert [number(v) for v in (-4.2e-7, 4.2e-7, -0.5, 1e7)] == ['0', '<0.0001', '-0.5', '1e+07']
    assert '<td class="words">y</td><td>–</td>' in _page()


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match='Row 0 of a table has 1 cells for 2 columns'):
        Table(['x', 'y'], [['only']])
