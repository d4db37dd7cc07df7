"""What the report shows class by class: accuracies, confusion with the teacher, agreement on held-out images."""

from collections.abc import Sequence

import numpy as np

from dvinv.data.grids import name_of
from dvinv.report.charts import Chart, heat_map
from dvinv.report.page import Section, Table, percent

MOST_CLASSES = 20  # maximum number of classes in a table or a matrix; of more, those that differ most are shown


def class_section(comparison: dict, names: dict[str, str], class_names: Sequence[str]) -> Section:
    """Returns the section of the report.

    Args:
      comparison: the result of `evaluation.by_class.compare`.
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
            name_of(labels[i], class_names),
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
                [[name_of(first, class_names), name_of(second, class_names), count] for first, second, count in differing],
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
        [[name_of(label, class_names), percent(by_label[label])] for label in labels],
        caption=f'On synthesized images that no student was trained on{selection}.',
    )


def _agreement(pairs: list[list[int]]) -> float:
    """Returns the fraction of images that both networks assign the same class."""
    return sum(count for first, second, count in pairs if first == second) / sum(count for *_, count in pairs)


def confusion_matrix(pairs: list[list[int]], labels: list[int], name: str, class_names: Sequence[str]) -> Chart:
    """Draws a confusion matrix; a row sums to 100%, less answers in classes that have no test image.

    Args:
      pairs: the confusion of a network, see `evaluation.by_class.compare`.
      labels: the classes, see `evaluation.by_class.compare`.
      name: the name of the network for readers.
      class_names: see `class_section`.
    """
    counts = {(first, second): count for first, second, count in pairs}
    totals = dict.fromkeys(labels, 0)
    for first, _, count in pairs:
        totals[first] = totals.get(first, 0) + count
    rows = [[counts[row, column] / totals[row] if (row, column) in counts else None for column in labels] for row in labels]
    headings = [name_of(label, class_names) for label in labels]
    return heat_map(rows, f'Teacher (rows) and {name} (columns)', headings, headings)
