"""Networks class by class: who is right on which class, and where a network departs from the teacher."""

import json
import re

import numpy as np
import pytest

from dvinv.data.dataset import Split
from dvinv.evaluation import compare_by_class
from dvinv.networks import Classifier
from dvinv.report.page import MOST_CLASSES, agreement_table, class_section, render

NAMES = {'student': 'student'}


def says(answers, classes):
    """A network that answers with `answers[v]` to an image of the value v."""
    logits = np.eye(classes, dtype=np.float32)[answers]

    def apply_fn(variables, x):
        return variables['params'][(x[:, 0, 0, 0] * 255).round().astype(int)]

    return Classifier(apply_fn, {'params': logits}, (1, 1, 1), classes, (0.0,), (1.0,))


def images(labels):
    """An image a label, of the values 0, 1, ..."""
    return Split(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], np.array(labels, np.int32))


def test_shares_by_class_and_pairs_of_answers():
    teacher, student = says([0, 0, 1, 2], 4), says([0, 1, 1, 1], 4)
    found = compare_by_class(teacher, {'student': student}, images([0, 0, 2, 2]))
    assert found == {
        'images': 4,
        'classes': [0, 2],
        'test_images': [2, 2],
        'accuracy': {'teacher': [1.0, 0.5], 'student': [0.5, 0.0]},
        'confusion': {'student': [[0, 0, 1], [0, 1, 1], [1, 1, 1], [2, 1, 1]]},
    }
    assert json.loads(json.dumps(found)) == found


def test_few_classes_have_a_matrix_by_name():
    answers = [0, 0, 0, 0, 1]
    found = compare_by_class(says(answers, 2), {'student': says([0, 0, 0, 1, 1], 2)}, images(answers))
    section = class_section(found, NAMES, ('ant', 'bee'))
    assert section.text.startswith('The student agrees with the teacher on 80.0% of the real test images.')
    (table,), (chart,) = section.tables, section.charts
    assert table.rows == [['ant', 4, '100.0%', '75.0%'], ['bee', 1, '100.0%', '100.0%']]
    told = re.findall('<title>(.*?)</title>', chart.svg)
    assert told == ['ant, ant: 75.0%', 'ant, bee: 25.0%', 'bee, bee: 100.0%']  # an empty place is no figure


@pytest.mark.parametrize('networks', [{}, {'student': 1}])
def test_of_many_classes_those_that_lose_most_are_told(networks):
    count = MOST_CLASSES + 5
    right = [*range(count)]
    wrong = [*right[:-1], 0]
    networks = {name: says(wrong, count) for name in networks}
    section = class_section(compare_by_class(says(right, count), networks, images(right)), NAMES, ())
    assert not section.charts
    assert len(section.tables[0].rows) == MOST_CLASSES
    if networks:
        assert section.tables[0].rows[0] == [f'{count - 1}', 1, '100.0%', '0.0%']
        assert section.tables[1].rows == [[f'{count - 1}', '0', 1]]
    render('t', 's', sections=[section])


def test_agreement_by_class_leaves_out_classes_without_images():
    assert agreement_table([0.5, None, 1.0], ('a', 'b', 'c')).rows == [['a', '50.0%'], ['c', '100.0%']]
    shares = np.linspace(1, 0, 2 * MOST_CLASSES).tolist()
    table = agreement_table(shares, ())
    assert (len(table.rows), table.rows[0]) == (MOST_CLASSES, [f'{2 * MOST_CLASSES - 1}', '0.0%'])
