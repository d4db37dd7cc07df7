"""The report of a run as one HTML file: without scripts or external resources, and with the same text for the same inputs.

It needs no other file, but may have links to files in its folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

import numpy as np
from PIL import Image

from dvinv.runtime.pictures import class_grid, name_of, png_data_uri, shown_classes

UNKNOWN = '–'
NARROW = 4  # most columns of a table that fits a phone (with two of text at most) and is placed next to a chart
FEW = 2  # most images per class at which a row per class would be nearly empty
LEAST = 0.0001  # smallest magnitude that is shown as a figure

# Tabular figures align the numbers of a column; charts take their colours from the same variables.
STYLESHEET = """
:root { color-scheme: light dark; --page: #fbfbf9; --surface: #fff; --ink: #1c2128; --muted: #667080; --line: #e4e5e1;
  --grid: #e9eae6; --accent: #2f6fde; --tint: #eef3fc; --shade: #1c212838; --series-1: #2f6fde;
  --series-2: #d9772b; --series-3: #1f9a70; --series-4: #8a5bd0; --series-5: #cf4a6c; --series-6: #7b8594; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --surface: #1a1e25; --ink: #e4e7ec; --muted: #98a2b1;
  --line: #2b313b; --grid: #2a3039; --accent: #76a5f7; --tint: #1d2838; --shade: #000c; --series-1: #76a5f7;
  --series-2: #eda164; --series-3: #57c79b; --series-4: #b795ee; --series-5: #ef8aa4; --series-6: #9aa4b3; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, "Segoe UI", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: clamp(1.75rem, 6vw, 4.5rem) clamp(1rem, 4vw, 2.5rem) 3rem; }
h1, h2 { overflow-wrap: anywhere; } p { margin: 0 0 .8em; } p:last-child { margin-bottom: 0; }
.eyebrow { font-size: .78rem; font-weight: 600; letter-spacing: .12em; text-transform: uppercase; color: var(--accent); }
h1 { margin: 0 0 1rem; font-size: clamp(1.75rem, 4.6vw, 2.7rem); font-weight: 650; line-height: 1.15;
  letter-spacing: -.022em; text-wrap: balance; }
h2 { margin: 0 0 .6rem; font-size: 1.4rem; font-weight: 620; letter-spacing: -.012em; line-height: 1.25; }
.summary, .text { max-width: 46rem; } .summary { font-size: 1.08rem; } .text { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: 1.4rem; font-size: .92rem; }
nav a { color: var(--accent); text-decoration: none; } nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .9rem; margin: 2.2rem 0 0; }
.tiles div, .plot, .picture .grid, .table { background-color: var(--surface); border: 1px solid var(--line);
  border-radius: 12px; }
.tiles div { padding: 1rem 1.1rem; } .tiles dd { margin: 0; } .tiles dt { font-size: .86rem; color: var(--muted); }
.tiles strong { display: block; font-size: 1.8rem; font-weight: 620; line-height: 1.35; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.bar { display: block; height: 4px; margin: .25rem 0 .55rem; border-radius: 2px; background: var(--grid); }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.note { display: block; font-size: .8rem; line-height: 1.4; color: var(--muted); }
section { margin-top: 3rem; padding-top: 2.2rem; border-top: 1px solid var(--line); }
.table { margin: 1.4rem 0 0; overflow: hidden; position: relative; }
.scroll, .plot { overflow-x: auto; scrollbar-width: thin; background:
  linear-gradient(to right, var(--surface) 1.5rem, transparent) 0 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--surface) 1.5rem, transparent) 100% 0 / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / 1rem 100% no-repeat scroll var(--surface); }
table { width: 100%; border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
figcaption { font-size: .86rem; line-height: 1.5; color: var(--muted); padding: .6rem .2rem 0; max-width: 46rem; }
.table figcaption { padding: .8rem 1.1rem .2rem; max-width: 60rem; }
th, td { padding: .55rem 1.1rem; text-align: right; border-top: 1px solid var(--line); }
td { white-space: nowrap; } th { font-size: .82rem; font-weight: 600; color: var(--muted); border-top: 0;
  vertical-align: bottom; line-height: 1.35; }
.words { text-align: left; white-space: normal; min-width: 6rem; } td.words { overflow-wrap: anywhere; }
.many th, .many td { padding-left: .7rem; padding-right: .7rem; }
.many .words { min-width: 8rem; padding-left: 1.1rem; } td:last-child, th:last-child { padding-right: 1.1rem; }
.main td { background: var(--tint); font-weight: 600; }
figure { margin: 0; min-width: 0; } .wide { margin-top: 1.4rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.4rem;
  margin-top: 1.4rem; align-items: start; } .columns > :only-child { max-width: 42rem; }
.columns .table { margin: 0; } .plot { padding: 1.1rem 1.1rem .7rem; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart .hit:hover { opacity: 1; }
.picture .grid { display: flex; justify-content: center; gap: .7rem; padding: .9rem; }
.picture .rows { display: flex; flex-direction: column; font-size: .8rem; line-height: 1; color: var(--muted);
  font-variant-numeric: tabular-nums; text-align: right; }
.picture .rows span { flex: 1 1 0; display: flex; align-items: center; justify-content: flex-end; min-height: 0; }
.picture .rows b { font-weight: 400; line-height: 1.15; max-width: 7.5rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.picture img { display: block; min-width: 0; max-width: 100%; height: auto; flex: 0 1 auto; align-self: start;
  image-rendering: pixelated; }
footer { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); font-size: .86rem;
  color: var(--muted); }
summary { cursor: pointer; font-weight: 600; } details { margin-bottom: 1rem; }
pre { margin: .8rem 0 0; padding: 1rem 1.1rem; overflow-x: auto; font: .82rem/1.55 ui-monospace, monospace;
  color: var(--ink); background: var(--surface); border: 1px solid var(--line); border-radius: 12px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.4rem; margin: 0 0 1.2rem; }
.facts dt { font-weight: 600; } .facts dd { margin: 0; overflow-wrap: anywhere; } .facts a, td a { color: var(--accent); }
code { font: .92em ui-monospace, monospace; }
@media (max-width: 44rem) { .chart:not(.dense) { font-size: 16px; } .chart .chart-title { font-size: 17px; }
  .tiles { grid-template-columns: 1fr 1fr; } .plot { padding: .9rem .8rem .5rem; }
  table { font-size: .88rem; } th { font-size: .76rem; } th, td { padding: .5rem .4rem; }
  .table figcaption, td:first-child, th:first-child, .many .words { padding-left: .9rem; }
  td:last-child, th:last-child { padding-right: .9rem; }
  .facts { grid-template-columns: 1fr; gap: .1rem; } .facts dd { margin-bottom: .5rem; }
  .picture .rows b { max-width: 4.5rem; }
  .stack thead { display: none; } .stack tr, .stack td { display: block; }
  .stack tr { padding: .5rem 0; border-top: 1px solid var(--line); } .stack .main { background: var(--tint); }
  table.stack td { display: flex; justify-content: space-between; gap: 1rem; padding: .15rem .9rem; border: 0; }
  .stack td::before { content: attr(data-name); color: var(--muted); font-weight: 400; text-align: left;
  overflow-wrap: normal; }
  .stack td:first-child { font-weight: 600; } .stack td:first-child::before { content: none; } }
@media print { section, figure, .table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Tile:
    """A key figure below the headline."""

    label: str
    """What was measured, in two or three words."""
    value: str
    """As shown; see `percent` and `number`."""
    note: str = ''
    """On what it was measured."""
    fraction: float | None = None
    """In [0, 1]: draws a bar of that length under the value. None draws no bar."""


@dataclass(frozen=True)
class Table:
    """A table with names in its first column and figures in the others."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | tuple[str, str] | None]]
    """Each as long as `columns`. Numbers are shown by `number`; None and NaN are an en dash, and a row or a column of
    these alone is left out; (text, path relative to the page) is a link."""
    caption: str = ''
    highlight: int | None = None
    """The row that the others are compared with, from 0."""
    text_columns: int = 1
    """How many columns at the left are text and not figures."""


@dataclass(frozen=True)
class Picture:
    """An image with its caption."""

    image: Image.Image
    caption: str
    row_labels: Sequence[str | int] = ()
    """Names of the rows of a grid, from the top; see `pictures.shown_classes`."""
    wide: bool = False
    """Takes the whole width; those that do not stand side by side. All are above the charts."""


@dataclass(frozen=True)
class Section:
    """A section of the report; empty parts are left out."""

    heading: str
    text: str = ''
    """Paragraphs, with an empty line between them."""
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()
    """SVG elements from `charts.line_chart`; they go into the page unescaped. '' is left out."""
    pictures: Sequence[Picture] = ()


def percent(value: float | None, digits: int = 1) -> str:
    """Formats a fraction in [0, 1] as per cent; None and NaN as an en dash."""
    return UNKNOWN if value is None or math.isnan(value) else f'{100 * value:.{digits}f}%'


def number(value: float | None) -> str:
    """Formats integers in full with separators, other numbers to four significant digits; None and NaN as an en dash.

    Positive values below 0.0001 are shown as '<0.0001', negative values of that magnitude (rounding errors) as '0'.
    """
    if value is None or math.isnan(value):
        return UNKNOWN
    if isinstance(value, int):
        return f'{value:,}'
    if LEAST <= abs(value) < 1e6:
        shown = f'{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}'
        return shown.rstrip('0').rstrip('.') if '.' in shown else shown
    if 0 < abs(value) < LEAST:
        return f'<{LEAST}' if value > 0 else '0'
    return f'{value:.3g}'


def class_picture(
    images: np.ndarray,
    labels: np.ndarray,
    caption: str,
    class_names: Sequence[str],
    per_class: int,
    beside: np.ndarray | None = None,
    wide: bool = False,
) -> Picture:
    """Returns a grid with one named row per class, or with one image per class side by side if classes have few images.

    Args:
      images, labels, per_class: see `pictures.class_grid`.
      caption: the caption of the picture.
      class_names: the names of classes in the order of labels; () to show numbers.
      beside: the labels of another set of images, to use the layout of its grid; None for the layout of `labels`.
      wide: whether the picture takes the whole width of the page.
    """
    placed = np.asarray(labels if beside is None else beside)
    classes, counts = np.unique(placed, return_counts=True)
    if counts.max() > FEW or len(classes) == 1:
        classes = shown_classes(placed)
        names = [name_of(label, class_names) for label in classes]
        return Picture(class_grid(images, labels, per_class, classes=classes), caption, names, wide)
    columns = (per_class + 1) // 2
    classes = shown_classes(placed, 8 * columns)
    first = [np.flatnonzero(np.asarray(labels) == label)[:1] for label in classes]
    places = np.array([place for place, found in enumerate(first) if len(found)], int)
    grid = class_grid(
        images[np.concatenate(first)], places // columns, columns, classes=[*range(-(-len(classes) // columns))]
    )
    names = ', '.join(name_of(classes[place], class_names) for place in places)
    same = beside is not None and len(places) == len(classes)
    which = 'in the same places' if same else f'row by row: {names}'
    return Picture(grid, f'{caption} One a class, {which}.', wide=wide)


def render(
    title: str,
    summary: str,
    tiles: Sequence[Tile] = (),
    sections: Sequence[Section] = (),
    configuration: str = '',
    eyebrow: str = 'dvinv',
    footer: str = '',
    facts: Mapping[str, str | Sequence[tuple[str, str]]] | None = None,
) -> str:
    """Renders the page as HTML.

    Args:
      title: the headline and the title of the browser tab.
      summary: the method and the results; paragraphs are separated by an empty line.
      tiles: the key figures, four to six. Tiles with an unknown value are left out.
      sections: the sections in the order of the page.
      configuration: the text of the run's configuration, shown unchanged in a part that opens on a click.
      eyebrow: the line above the headline.
      footer: one line at the end.
      facts: {name: text, or links as (text, path relative to the page)} at the end, such as the command and versions.
    """
    tiles = [tile for tile in tiles if tile.value != UNKNOWN]
    links = ''.join(f'<a href="#s{i}">{escape(part.heading)}</a>' for i, part in enumerate(sections))
    body = [
        '<header>',
        f'<p class="eyebrow">{escape(eyebrow)}</p>',
        f'<h1>{escape(title)}</h1>',
        f'<div class="summary">{_paragraphs(summary)}</div>',
        f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 1 else '',
        '</header>',
        f'<dl class="tiles">{"".join(_tile(tile) for tile in tiles)}</dl>' if tiles else '',
        *(_section(i, part) for i, part in enumerate(sections)),
        '<footer>',
        _facts(facts) if facts else '',
        _configuration(configuration) if configuration else '',
        f'<p>{escape(footer)}</p>' if footer else '',
        '</footer>',
    ]
    content = '\n'.join(part for part in body if part)
    # The policy forbids scripts and external resources even if the chart of a caller contains them.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLESHEET}</style>
</head>
<body>
<main>
{content}
</main>
</body>
</html>
"""


def _facts(facts: Mapping[str, str | Sequence[tuple[str, str]]]) -> str:
    def shown(value):
        if isinstance(value, str):
            return escape(value)
        return ', '.join(map(_cell, value))

    items = ''.join(f'<dt>{escape(name)}</dt><dd>{shown(value)}</dd>' for name, value in facts.items() if value)
    return f'<dl class="facts">{items}</dl>'


def _configuration(text: str) -> str:
    return f'<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>'


def _paragraphs(text: str) -> str:
    return ''.join(f'<p>{escape(part.strip())}</p>' for part in text.split('\n\n') if part.strip())


def _tile(tile: Tile) -> str:
    bar = ''
    if tile.fraction is not None and math.isfinite(tile.fraction):
        filled = 100 * min(1.0, max(0.0, tile.fraction))
        bar = f'<span class="bar"><span style="width:{filled:.1f}%"></span></span>'
    note = f'<span class="note">{escape(tile.note)}</span>' if tile.note else ''
    return f'<div><dt>{escape(tile.label)}</dt><dd><strong>{escape(tile.value)}</strong>{bar}{note}</dd></div>'


def _section(index: int, section: Section) -> str:
    charts = ''.join(f'<figure class="plot">{chart}</figure>' for chart in section.charts if chart)
    wide = ''.join(_picture(picture) for picture in section.pictures if picture.wide)
    first = next((i for i, table in enumerate(section.tables) if _is_narrow(table)), len(section.tables))
    tables = ''.join(_table(table) for table in section.tables if _is_narrow(table))
    narrow = ''.join(_picture(picture) for picture in section.pictures if not picture.wide)
    parts = [
        f'<section id="s{index}">',
        f'<h2>{escape(section.heading)}</h2>',
        f'<div class="text">{_paragraphs(section.text)}</div>' if section.text else '',
        *map(_table, section.tables[:first]),
        wide,
        f'<div class="columns">{narrow}</div>' if narrow else '',
        f'<div class="columns">{tables}{charts}</div>' if tables or charts else '',
        *(_table(table) for table in section.tables[first:] if not _is_narrow(table)),
        '</section>',
    ]
    return '\n'.join(part for part in parts if part)


def _is_narrow(table: Table) -> bool:
    return len(table.columns) <= NARROW and table.text_columns <= 2


def _table(table: Table) -> str:
    for index, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ValueError(f'Row {index} of a table has {len(row)} cells for {len(table.columns)} columns: {row!r}.')
    texts = range(table.text_columns)
    kept_rows = [
        i for i, row in enumerate(table.rows) if any(map(_is_known, row[table.text_columns :])) or len(row) == len(texts)
    ]
    columns = [i for i in range(len(table.columns)) if i in texts or any(_is_known(table.rows[row][i]) for row in kept_rows)]
    if not kept_rows:
        return ''

    def cell(tag, column, value):
        kind = ' class="words"' if column in texts else ''
        name = f' data-name="{escape(table.columns[column])}"' if tag == 'td' and stacked else ''
        return f'<{tag}{kind}{name}>{_cell(value)}</{tag}>'

    stacked = not _is_narrow(table)
    kind = ' class="stack many"' if len(columns) > 6 else ' class="stack"' if stacked else ''
    rows = []
    for index in kept_rows:
        mark = ' class="main"' if index == table.highlight else ''
        rows.append(f'<tr{mark}>{"".join(cell("td", i, table.rows[index][i]) for i in columns)}</tr>')
    caption = f'<figcaption>{escape(table.caption)}</figcaption>' if table.caption else ''
    head = f'<thead><tr>{"".join(cell("th", i, table.columns[i]) for i in columns)}</tr></thead>'
    body = f'<table{kind}>{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<figure class="table">{caption}<div class="scroll" tabindex="0">{body}</div></figure>'


def _is_known(value) -> bool:
    return value is not None and value != UNKNOWN and (isinstance(value, str | tuple) or not math.isnan(value))


def _cell(value: str | float | tuple[str, str] | None) -> str:
    if isinstance(value, tuple):
        text, path = value
        return f'<a href="{escape(quote(path))}">{escape(text)}</a>'
    return escape(value if isinstance(value, str) else number(value))


def _picture(picture: Picture) -> str:
    image, caption = picture.image, escape(picture.caption)
    labels = ''.join(f'<span><b>{escape(str(label))}</b></span>' for label in picture.row_labels)
    rows = f'<div class="rows" aria-hidden="true">{labels}</div>' if labels else ''
    size = f'width="{image.width}" height="{image.height}"'
    return (
        f'<figure class="{"picture wide" if picture.wide else "picture"}"><div class="grid">{rows}'
        f'<img src="{png_data_uri(image)}" {size} alt="{caption}"></div><figcaption>{caption}</figcaption></figure>'
    )
