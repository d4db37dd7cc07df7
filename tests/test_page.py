"""The page: balanced, self-contained, no text becomes markup."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import numbered

from dvinv.runtime.charts import line_chart
from dvinv.runtime.page import Picture, Section, Table, Tile, number, percent, render
from dvinv.runtime.pictures import class_grid

HOSTILE = '<script src="x">&\'</script>'


def _page(text='plain'):
    images, labels = numbered([0, 1, 1])
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
