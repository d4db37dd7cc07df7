"""The page of a report: its parts as plain data, tables of image quality and of classes, and its rendering as one file.

It has no scripts and no external resources, and the same text for the same inputs; it may link to files in its folder.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from dvinv.data.dataset import RowArray
from dvinv.data.export import class_grid, class_name, png_data_uri, shown_classes
from dvinv.evaluation import MOST_POOL_IMAGES
from dvinv.report.charts import ENVIRONMENT, Chart, heat_map

UNKNOWN = '–'
NARROW = 4  # most columns of a table that is placed next to a chart (with two of text at most)
FEW_PER_CLASS = 2  # most images per class at which a row per class would be nearly empty
LEAST = 0.0001  # smallest magnitude that is shown as a figure
PHONE = 20  # the width of a table on a phone, in rem

Link: TypeAlias = tuple[str, str]
"""A text and a path relative to the page."""
Cell: TypeAlias = str | int | float | Link | None
"""Numbers are shown by `number`; None and NaN are an en dash."""

IMAGE_SETS = {
    'synthesized': 'Synthesized images',
    'prior_only': 'Without the feature term',
    'noise': 'Noise',
    'real': 'Real images',
}
QUALITY_COLUMNS = {
    'inception_score': 'inception score',
    'frechet_distance': 'Fréchet distance',
    'kernel_distance': 'kernel distance',
    'spread': 'spread',
    'nearest': 'nearest',
}
MOST_CLASSES = 20  # maximum number of classes in a table or a matrix; of more, those that differ most are shown


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

    @property
    def bar_length(self) -> float | None:
        """The length of the bar, in [0, 1]."""
        return None if self.fraction is None or not math.isfinite(self.fraction) else min(1.0, max(0.0, self.fraction))


@dataclass(frozen=True)
class Table:
    """A table with names in its first column and figures in the others."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """Each as long as `columns`. A row or a column of unknown figures alone is left out."""
    caption: str = ''
    highlight: int | None = None
    """The row that the others are compared with, from 0."""
    text_columns: int = 1
    """How many columns at the left are text and not figures."""

    def __post_init__(self):
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f'Row {index} of a table has {len(row)} cells for {len(self.columns)} columns: {row!r}.')

    @property
    def is_narrow(self) -> bool:
        """Whether the table is placed next to a chart."""
        return len(self.columns) <= NARROW and self.text_columns <= 2

    @property
    def stacking_width(self) -> int | None:
        """The width in rem up to which the table is shown as a list of its rows; None if it fits a phone.

        It is estimated from the longest word of each column, in a wide font.
        """
        needed = 1.3
        for index, name in enumerate(self.columns):
            words = max(_longest_word(row[index]) for row in self.rows)
            least = 6.0 if index < self.text_columns else 0.0
            needed += 0.9 + max(least, 0.58 * words, 0.55 * _longest_word(name))
        return math.ceil(needed) if needed > PHONE else None

    def shown(self) -> 'Table':
        """Returns the table without the rows and columns of unknown figures alone."""
        texts = self.text_columns
        rows = [row for row in self.rows if any(map(_is_known, row[texts:])) or len(row) == texts]
        kept = [i < texts or any(_is_known(row[i]) for row in rows) for i in range(len(self.columns))]
        highlighted = None if self.highlight is None else self.rows[self.highlight]
        return dataclasses.replace(
            self,
            columns=[*itertools.compress(self.columns, kept)],
            rows=[[*itertools.compress(row, kept)] for row in rows],
            highlight=next((i for i, row in enumerate(rows) if row is highlighted), None),
        )


@dataclass(frozen=True)
class Picture:
    """An image with its caption; a notebook shows the image."""

    image: Image.Image
    caption: str
    row_labels: Sequence[str | int] = ()
    """Names of the rows of a grid, from the top; see `data.export.shown_classes`."""
    wide: bool = False
    """Takes the whole width; those that do not stand side by side. All are above the charts."""

    def _repr_png_(self) -> bytes | None:
        return self.image._repr_png_()


@dataclass(frozen=True)
class Section:
    """A section of the report; empty parts are left out."""

    heading: str
    text: str = ''
    """Paragraphs, with an empty line between them."""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart | None] = ()
    pictures: Sequence[Picture] = ()
    tiles: Sequence[Tile] = ()
    """The key figures, which stand below the headline of the page."""
    summary: str = ''
    """What stands in the summary of the page; paragraphs, with an empty line between them."""


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


def reads_right(score: float | None, other: float | None, name: str) -> str:
    """Returns the end of a sentence about a network, with its accuracy and that of another network, as far as known."""
    if score is None:
        return '.'
    than = '' if other is None else f', {name} {percent(other)}'
    return f'; it reads {percent(score)} of the real test images right{than}.'


def class_picture(
    images: RowArray,
    labels: np.ndarray,
    caption: str,
    class_names: Sequence[str],
    per_class: int,
    beside: np.ndarray | None = None,
    wide: bool = False,
) -> Picture:
    """Returns a grid with one named row per class, or with one image per class side by side if classes have few images.

    Args:
      images, labels, per_class: see `data.export.class_grid`.
      caption: the caption of the picture.
      class_names: the names of classes in the order of labels; () to show numbers.
      beside: the labels of another set of images, to use the layout of its grid; None for the layout of `labels`.
      wide: whether the picture takes the whole width of the page.
    """
    placed = np.asarray(labels if beside is None else beside)
    present, counts = np.unique(placed, return_counts=True)
    if counts.max() > FEW_PER_CLASS or len(present) == 1:
        classes = shown_classes(placed)
        row_names = [class_name(label, class_names) for label in classes]
        return Picture(class_grid(images, labels, per_class, classes=classes), caption, row_names, wide)
    columns = (per_class + 1) // 2
    classes = shown_classes(placed, 8 * columns)
    first = [np.flatnonzero(np.asarray(labels) == label)[:1] for label in classes]
    places = np.array([place for place, found in enumerate(first) if len(found)], int)
    rows = range(-(-len(classes) // columns))
    grid = class_grid(images[np.concatenate(first)], places // columns, columns, classes=rows)
    names = ', '.join(class_name(classes[place], class_names) for place in places)
    same = beside is not None and len(places) == len(classes)
    which = 'in the same places' if same else f'row by row: {names}'
    return Picture(grid, f'{caption} One per class, {which}.', wide=wide)


def render(
    title: str,
    summary: str,
    tiles: Sequence[Tile] = (),
    sections: Sequence[Section] = (),
    configuration: str = '',
    facts: Mapping[str, str | Sequence[Link]] | None = None,
) -> str:
    """Renders the page as HTML.

    Args:
      title: the headline and the title of the browser tab.
      summary: the method and the results; paragraphs are separated by an empty line.
      tiles: the key figures, four to six. Tiles with an unknown value are left out.
      sections: the sections in the order of the page.
      configuration: the text of the run's configuration, shown unchanged in a part that opens on a click.
      facts: {name: text, or links} at the end, such as the command and versions.
    """
    parts = [_placed(section) for section in sections]
    tables = [table for part in parts for place in ('above', 'beside', 'below') for table in part[place]]
    return ENVIRONMENT.get_template('template.html.j2').render(
        title=title,
        summary=summary,
        tiles=[tile for tile in tiles if tile.value != UNKNOWN],
        sections=parts,
        configuration=configuration,
        facts={name: value for name, value in (facts or {}).items() if value},
        stacking_widths=sorted({table.stacking_width for table in tables if table.stacking_width}),
        number=number,
        png_data_uri=png_data_uri,
    )


def _placed(section: Section) -> dict[str, Any]:
    """Returns the parts of a section by place: tables from the first narrow one on stand beside or below the charts."""
    tables = [table for table in map(Table.shown, section.tables) if table.rows]
    above = [*itertools.takewhile(lambda table: not table.is_narrow, tables)]
    return {
        'heading': section.heading,
        'text': section.text,
        'above': above,
        'wide_pictures': [picture for picture in section.pictures if picture.wide],
        'pictures': [picture for picture in section.pictures if not picture.wide],
        'beside': [table for table in tables if table.is_narrow],
        'charts': [chart for chart in section.charts if chart],
        'below': [table for table in tables[len(above) :] if not table.is_narrow],
    }


def _is_known(value: Cell) -> bool:
    return value is not None and value != UNKNOWN and (isinstance(value, str | tuple) or not math.isnan(value))


def _longest_word(value: Cell) -> int:
    text = value if isinstance(value, str) else value[0] if isinstance(value, tuple) else number(value)
    return max(map(len, text.split()), default=0)


def quality_table(results: dict[str, dict], verifier: str) -> Table:
    """Returns the table for the report, with one row per set of images.

    Args:
      results: the result of `figures_of_sets`.
      verifier: the name of the network that judged the images.
    """
    accuracies = {name: _accuracies(quality, verifier) for name, quality in results.items()}
    rows = [
        [IMAGE_SETS[name], *map(percent, accuracies[name].values()), *(quality[key] for key in QUALITY_COLUMNS)]
        for name, quality in results.items()
    ]
    caption = (
        f'On at most {MOST_POOL_IMAGES:,} images each. Under the name of a network: its accuracy; top 5: the class is among '
        f'its first five answers. The other columns are measured with {verifier}. Inception score: higher is better. '
        'Distances to real images: lower is better, 0 for the same images. Spread within classes: 0 if all images of a '
        'class are equal. Nearest: the cosine to the most similar other image, 1 for copies.'
    )
    return Table(('Images', *accuracies['synthesized'], *QUALITY_COLUMNS.values()), rows, caption=caption)


def _accuracies(quality: dict[str, Any], verifier: str) -> dict[str, float]:
    """Returns {heading of a column: accuracy on a set of images} for every verifier."""
    accuracies: dict[str, float | None] = {}
    for network, figures in {verifier: quality, **quality['verifiers']}.items():
        accuracies |= {network: figures['recognised'], f'{network}, top 5': figures['recognised_top5']}
    return {heading: accuracy for heading, accuracy in accuracies.items() if accuracy is not None}


def class_section(comparison: dict, names: dict[str, str], class_names: Sequence[str]) -> Section:
    """Returns the section of the report.

    Args:
      comparison: the result of `evaluation.compare_by_class`.
      names: {name of a network: its name for readers}.
      class_names: the names of classes in the order of labels; () to show numbers.
    """
    labels, accuracy, confusion = comparison['classes'], comparison['accuracy'], comparison['confusion']
    networks, shows_all = [*confusion], len(labels) <= MOST_CLASSES
    indices, selection = [*range(len(labels))], ''
    if not shows_all:
        first = accuracy[networks[0]] if networks else np.zeros(len(labels))
        indices = np.argsort(np.subtract(first, accuracy['teacher']), kind='stable')[:MOST_CLASSES].tolist()
        criterion = f'the {names[networks[0]]} loses most' if networks else 'the teacher is best'
        selection = f'The {MOST_CLASSES} of {len(labels)} classes in which {criterion}. '
    rows = [
        [
            class_name(labels[i], class_names),
            comparison['test_images'][i],
            *(percent(accuracy[name][i]) for name in ('teacher', *networks)),
        ]
        for i in indices
    ]
    table = Table(
        ('Class', 'test images', 'teacher', *(names[name] for name in networks)),
        rows,
        caption=f'{selection}Fraction of {comparison["images"]:,} real test images that each network classifies correctly.',
    )
    tables, charts = [table], []
    for name in networks:
        if shows_all:
            charts.append(confusion_matrix(confusion[name], labels, names[name], class_names))
            continue
        differing = [pair for pair in confusion[name] if pair[0] != pair[1]][:MOST_CLASSES]
        tables.append(
            Table(
                ('The teacher says', f'the {names[name]} says', 'images'),
                [
                    [class_name(first, class_names), class_name(second, class_names), count]
                    for first, second, count in differing
                ],
                caption=f'The classes in which the {names[name]} most often differs from the teacher.',
                text_columns=2,
            )
        )
    text = ' '.join(
        f'The {names[name]} agrees with the teacher on {percent(_agreement(confusion[name]))} of the real test images.'
        for name in networks
    )
    if charts:
        text += (
            '\n\nEach row of a matrix is a class that the teacher predicts. Its cells are the percentages of those images '
            'that the other network assigns to each class.'
        )
    return Section('Class by class', text, tables, charts)


def agreement_table(agreement: Sequence[float | None], class_names: Sequence[str]) -> Table:
    """Returns the table of agreement by class: the fraction of images that student and teacher assign the same class.

    Args:
      agreement: the agreement for each class; None for a class without images.
      class_names: see `class_section`.
    """
    by_label = {label: value for label, value in enumerate(agreement) if value is not None}
    labels, selection = [*by_label], ''
    if len(labels) > MOST_CLASSES:
        labels = sorted(labels, key=lambda label: by_label[label])[:MOST_CLASSES]
        selection = f', for the {MOST_CLASSES} of {len(by_label)} classes where it is lowest'
    return Table(
        ('Class', 'agrees with the teacher'),
        [[class_name(label, class_names), percent(by_label[label])] for label in labels],
        caption=f'On synthesized images that no student was trained on{selection}.',
    )


def _agreement(pairs: list[list[int]]) -> float:
    """Returns the fraction of images that both networks assign the same class."""
    return sum(count for first, second, count in pairs if first == second) / sum(count for *_, count in pairs)


def confusion_matrix(pairs: list[list[int]], labels: list[int], name: str, class_names: Sequence[str]) -> Chart:
    """Draws a confusion matrix; a row sums to 100%, less answers in classes that have no test image.

    Args:
      pairs: the confusion of a network, see `evaluation.compare_by_class`.
      labels: the classes, see `evaluation.compare_by_class`.
      name: the name of the network for readers.
      class_names: see `class_section`.
    """
    counts = {(first, second): count for first, second, count in pairs}
    totals = dict.fromkeys(labels, 0)
    for first, _, count in pairs:
        totals[first] = totals.get(first, 0) + count
    rows = [[counts[row, column] / totals[row] if (row, column) in counts else None for column in labels] for row in labels]
    headings = [class_name(label, class_names) for label in labels]
    return heat_map(rows, f'Teacher (rows) and {name} (columns)', headings, headings)
