"""benchmarks/update_time.py: its arguments, and a tiny network in turns."""

import pytest
import update_time
from measured import read

from dvinv import DvinvError


def test_a_network_is_named_with_resolution_batch_and_width():
    arguments = update_time.parse(['resnet20:32:64', 'vgg11_bn:32:8:0.25'])
    assert arguments.networks == [('resnet20', 32, 64, 1.0), ('vgg11_bn', 32, 8, 0.25)]


@pytest.mark.parametrize('argv', [['resnet20'], ['resnet20:32:64:1:2'], []])
def test_what_names_no_network_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match='2'):
        update_time.parse(argv)
    assert 'NAME:RESOLUTION:BATCH[:WIDTH]' in capsys.readouterr().err


def test_without_rounds_nothing_is_measured():
    with pytest.raises(DvinvError, match='--rounds is 0; it must be at least 1'):
        update_time.parse(['resnet20:32:64', '--rounds', '0'])


@pytest.mark.parametrize('network', ['resnet20:0:64', 'resnet20:32:0', 'resnet20:32:64:0'])
def test_an_update_of_nothing_is_refused(network):
    with pytest.raises(DvinvError, match='has a number that is not above 0'):
        update_time.parse([network])


def test_both_programs_are_timed_and_make_rows(tmp_path):
    case = update_time.Case('small_convnet', 8, 4, 0.125)
    result = update_time.measure(case, 2)
    assert 0 < result['low'] <= result['ratio'] <= result['high']
    update_time.append(tmp_path / 'rows.csv', update_time.csv_rows(case, result))
    rows = {row['what']: row for row in read(tmp_path / 'rows.csv')}
    assert rows.keys() == {f'update.small_convnet_8_4.{name}' for name in ('xla', 'dvinv', 'ratio')}
    assert float(rows['update.small_convnet_8_4.ratio']['low']) == result['low']
