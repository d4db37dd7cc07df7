"""Compares the networks of a run class by class on real test images: accuracies, and differences from the teacher.

The figures are written to by_class.json; the report shows them as tables and matrices.
"""

from collections.abc import Sequence

import numpy as np

from dvinv.data.dataset import Split
from dvinv.evaluation.quality import evenly
from dvinv.evaluation.scoring import logits_of
from dvinv.networks import Classifier
from dvinv.report.charts import Chart, heat_map
from dvinv.report.page import Section, Table, percent
from dvinv.runtime.pictures import name_of

MOST = 5_000  # maximum number of test images, evenly spaced
MOST_CLASSES = 20  # maximum number of classes in a table or a matrix; if there are more, those that differ most are shown


def compare(teacher: Classifier, networks: dict[str, Classifier], test: Split) -> dict:
    """Computes accuracies by class, and confusion counts between the teacher and each network.

    Args:
      teacher: the network that the others are compared with.
      networks: {name: network}, with the classes of the teacher.
      test: real images; at most `MOST` are scored.

    Returns:
      A dict with these entries:
        'images': the number of scored images;
        'classes': the labels that occur among them, ascending;
        'test_images': the number of images of each of these classes;
        'accuracy': {name: list of accuracies, one per class}, including 'teacher';
        'confusion': {name: list of [class by the teacher, class by the network, number of images]}, most frequent first.
    """
    rows = evenly(len(test.labels), MOST)
    images, labels = test.images[rows], np.asarray(test.labels[rows])
    answers = {name: logits_of(network, images).argmax(1) for name, network in {'teacher': teacher, **networks}.items()}
    classes, counts = np.unique(labels, return_counts=True)
    return {
        'images': len(labels),
        'classes': classes.tolist(),
        'test_images': counts.tolist(),
        'accuracy': {
            name: [float((answer[labels == label] == label).mean()) for label in classes] for name, answer in answers.items()
        },
        'confusion': {name: _pairs(answers['teacher'], answers[name]) for name in networks},
    }


def _pairs(first: np.ndarray, second: np.ndarray) -> list[list[int]]:
    pairs, counts = np.unique(np.stack([first, second], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return [[*pairs[i].tolist(), int(counts[i])] for i in order]


def class_section(found: dict, names: dict[str, str], class_names: Sequence[str]) -> Section:
    """Returns the section of the report.

    Args:
      found: the result of `compare`.
      names: {name of a network: its name for readers}.
      class_names: the names of classes in the order of labels; () to show numbers.
    """
    labels, networks, accuracy = found['classes'], [*found['confusion']], found['accuracy']
    few, shown = len(labels) <= MOST_CLASSES, range(len(labels))
    if not few:
        first = accuracy[networks[0]] if networks else np.zeros(len(labels))
        shown = np.argsort(np.subtract(first, accuracy['teacher']), kind='stable')[:MOST_CLASSES]
    rows = [
        [
            name_of(labels[i], class_names),
            found['test_images'][i],
            *(percent(accuracy[name][i]) for name in ('teacher', *networks)),
        ]
        for i in shown
    ]
    lost = f'the {names[networks[0]]} loses most' if networks else 'the teacher is best'
    which = '' if few else f'The {MOST_CLASSES} of {len(labels)} classes in which {lost}. '
    table = Table(
        ('Class', 'test images', 'teacher', *(names[name] for name in networks)),
        rows,
        caption=f'{which}Share of {found["images"]:,} real test images that each network puts into their class.',
    )
    tables, charts = [table], []
    for name in networks:
        if few:
            charts.append(confusion_matrix(found['confusion'][name], labels, names[name], class_names))
            continue
        apart = [pair for pair in found['confusion'][name] if pair[0] != pair[1]][:MOST_CLASSES]
        tables.append(
            Table(
                ('The teacher says', f'the {names[name]} says', 'images'),
                [[name_of(first, class_names), name_of(second, class_names), count] for first, second, count in apart],
                caption=f'Where the {names[name]} most often departs from the teacher.',
                text_columns=2,
            )
        )
    text = ' '.join(
        f'The {names[name]} agrees with the teacher on {percent(_agreed(found["confusion"][name]))} of the real test images.'
        for name in networks
    )
    if charts:
        text += '\n\nA row of a matrix is of the images that the teacher puts into this class, and has the shares, in per '
        text += 'cent, that the other network puts into each.'
    return Section('Class by class', text, tables, charts)


def agreement_table(shares: Sequence[float | None], class_names: Sequence[str]) -> Table:
    """Returns the table of agreement by class: the fraction of images that student and teacher assign the same class.

    Args:
      shares: the agreement for each class; None for a class without images.
      class_names: see `class_section`.
    """
    known = [label for label, share in enumerate(shares) if share is not None]
    shown = known if len(known) <= MOST_CLASSES else sorted(known, key=lambda label: shares[label])[:MOST_CLASSES]
    which = '' if shown == known else f', of {len(known)} classes the {MOST_CLASSES} where it is lowest'
    return Table(
        ('Class', 'agrees with the teacher'),
        [[name_of(label, class_names), percent(shares[label])] for label in shown],
        caption=f'On synthesized images that no student learned from{which}.',
    )


def _agreed(pairs: list[list[int]]) -> float:
    """Returns the fraction of images that both networks assign the same class."""
    return sum(count for first, second, count in pairs if first == second) / sum(count for *_, count in pairs)


def confusion_matrix(pairs: list[list[int]], labels: list[int], name: str, class_names: Sequence[str]) -> Chart:
    """Draws a confusion matrix; a row sums to 100%, less answers in classes that have no test image.

    Args:
      pairs: the confusion of a network, see `compare`.
      labels: the classes, see `compare`.
      name: the name of the network for readers.
      class_names: see `class_section`.
    """
    counts = {(first, second): count for first, second, count in pairs}
    totals = dict.fromkeys(labels, 0)
    for first, _, count in pairs:
        totals[first] = totals.get(first, 0) + count
    rows = [[counts[row, column] / totals[row] if (row, column) in counts else None for column in labels] for row in labels]
    known = [name_of(label, class_names) for label in labels]
    return heat_map(rows, f'Teacher (rows) and {name} (columns)', known, known)
