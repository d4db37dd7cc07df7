"""The networks of a run class by class on real test images: what each gets right, and where it departs from the teacher.

The figures go into by_class.json, tables and matrices of them into the report.
"""

from collections.abc import Sequence

import numpy as np

from dvinv.data.dataset import Split
from dvinv.evaluation.quality import evenly
from dvinv.evaluation.scoring import logits_of
from dvinv.networks import Classifier
from dvinv.report.heat_map import heat_map
from dvinv.report.page import Section, Table, percent
from dvinv.runtime.pictures import name_of

MOST = 5_000  # test images, evenly spaced
MOST_CLASSES = 20  # in a table or a matrix; of more, those that differ most


def compare(teacher: Classifier, networks: dict[str, Classifier], test: Split) -> dict:
    """Computes accuracies by class, and how often a network answers one class where the teacher answers another.

    Args:
      networks: {name: network}, of the teacher's classes.
      test: real images; at most `MOST` are scored.

    Returns:
      'images': how many were looked at; 'classes': the labels that they have; 'test_images': how many of each; 'accuracy':
      {name: a share a class}, of 'teacher' too; 'confusion': {name: [[class by the teacher, class by the network, images]]},
      the most frequent first.
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
      found: of `compare`.
      names: {network: what the reader knows it by}.
      class_names: in the order of labels; (): numbers stand for them.
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
            charts.append(_matrix(found['confusion'][name], labels, names[name], class_names))
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
    """Returns the table of the shares, a class each, of images that student and teacher put into one class."""
    known = [label for label, share in enumerate(shares) if share is not None]
    shown = known if len(known) <= MOST_CLASSES else sorted(known, key=lambda label: shares[label])[:MOST_CLASSES]
    which = '' if shown == known else f', of {len(known)} classes the {MOST_CLASSES} where it is lowest'
    return Table(
        ('Class', 'agrees with the teacher'),
        [[name_of(label, class_names), percent(shares[label])] for label in shown],
        caption=f'On synthesized images that no student learned from{which}.',
    )


def _agreed(pairs: list[list[int]]) -> float:
    """Returns the share of images that both put into one class."""
    return sum(count for first, second, count in pairs if first == second) / sum(count for *_, count in pairs)


def _matrix(pairs: list[list[int]], labels: list[int], name: str, class_names: Sequence[str]) -> str:
    """Returns the chart of a confusion matrix. A row sums to 100%, less answers that no test image is of."""
    counts = {(first, second): count for first, second, count in pairs}
    totals = dict.fromkeys(labels, 0)
    for first, _, count in pairs:
        totals[first] = totals.get(first, 0) + count
    rows = [[counts[row, column] / totals[row] if (row, column) in counts else None for column in labels] for row in labels]
    known = [name_of(label, class_names) for label in labels]
    return heat_map(rows, f'Teacher (rows) and {name} (columns)', known, known)
