"""benchmarks/table.py: figures by hand, cells in order and resumed with a stand-in for dvinv, and one real tiny table."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from smoke import ROOT

SCRIPT = ROOT / 'benchmarks' / 'table.py'
table = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
Cell = table.Cell

# `python -m dvinv.main` where this lies in the working directory: fails or hangs in the folders that the environment names.
STAND_IN = """
import json, os, pathlib, sys, time
flags = dict(argument.removeprefix('--config.').split('=', 1) for argument in sys.argv if '=' in argument)
workdir = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
with open('calls', 'a') as calls:
    print(workdir, file=calls)
network = {'network': 'some', 'weights': ''}
(workdir / 'config.json').write_text(json.dumps({
    'seed': 0, 'tasks': [], 'devices': 0, 'logging': {}, 'distillation': {'controls': []},
    'synthesis': {'method': '', 'images': os.environ.get('IMAGES')}, 'teacher': network, 'verifier': network,
}))
if os.environ.get('FAIL', 'none') in str(workdir):
    sys.exit('first\\ndvinv: this cell cannot be')
if os.environ.get('HANG', 'none') in str(workdir):
    pathlib.Path('pid').write_text(str(os.getpid()))
    time.sleep(60)
results = {'teacher': {'test_accuracy': 0.9, 'test_images': 10, 'wall_seconds': 1}}
if 'synthesis.method' in flags:
    assert pathlib.Path(flags['teacher.weights']).parent.parent == (workdir.parents[1] / 'teacher').resolve()
    results['synthesis'] = {'images': 8, 'rounds': 1, 'wall_seconds': 2}
    results['distillation'] = {'test_accuracy': 0.5, 'real_test_accuracy': 0.8, 'updates': 4, 'wall_seconds': 3}
(workdir / 'results.json').write_text(json.dumps(results))
"""


def finish(workdir: Path, cell: Cell, accuracy: float, real: float | None = None, seconds: float = 60.0) -> None:
    """Write the results of a cell, which took three times `seconds`; a teacher's, just so many."""
    results = {'teacher': {'test_accuracy': accuracy, 'test_images': 10_000, 'wall_seconds': seconds}}
    if cell.method != 'teacher':
        results['synthesis'] = {'images': 25_600, 'rounds': 100, 'wall_seconds': seconds}
        results['distillation'] = {
            'test_accuracy': accuracy,
            'real_test_accuracy': real,
            'updates': 20_000,
            'wall_seconds': seconds,
        }
    folder = table.folder_of(workdir, cell)
    folder.mkdir(parents=True)
    (folder / 'results.json').write_text(json.dumps(results))


def rows(workdir: Path, methods, seeds: int = 3, configs=('a.py',)) -> dict[str, list[str]]:
    """{first column: the others} of the tables; a row of the last goes by its first two."""
    text = table.markdown(table.collect(Namespace(workdir=workdir, methods=methods, seeds=seeds, configs=configs, flags=[])))
    cells = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    names = {Path(config).stem for config in configs}
    return {(' '.join(row[:2]) if row[0] in names else row[0]): row[2 if row[0] in names else 1 :] for row in cells}


# Figures


def test_means_deviations_and_paired_errors(tmp_path):
    finish(tmp_path, Cell('a.py', 'teacher', 0), 0.9542)
    for seed, (ours, theirs) in enumerate([(0.90, 0.80), (0.92, 0.84), (0.94, 0.85)]):
        finish(tmp_path, Cell('a.py', 'adaptive', seed), ours)
        finish(tmp_path, Cell('a.py', 'deepinversion', seed), theirs)
    found = rows(tmp_path, ['adaptive', 'deepinversion'])
    assert found['teacher'] == ['95.42 (n = 1)']
    assert found['adaptive'] == ['92.00 ± 2.00 (n = 3)']
    assert found['deepinversion'] == ['83.00 ± 2.65 (n = 3)']  # deviations -3, 1, 2: the root of 14 / 2
    assert found['adaptive - deepinversion'] == ['+9.00 ± 0.58 (n = 3)']  # differences 10, 8, 9: 1 over the root of 3


def test_what_is_unfinished_is_told_and_only_common_seeds_are_paired(tmp_path):
    for seed, accuracy in ((0, 0.90), (2, 0.94)):
        finish(tmp_path, Cell('a.py', 'adaptive', seed), accuracy)
    for seed, accuracy in ((1, 0.10), (2, 0.95)):
        finish(tmp_path, Cell('a.py', 'deepinversion', seed), accuracy)
    (tmp_path / 'a' / 'noise' / 'seed-0').mkdir(parents=True)
    (tmp_path / 'a' / 'noise' / 'seed-0' / 'results.json').write_text('{"teacher": {"wall_seconds": 1}}')
    found = rows(tmp_path, ['adaptive', 'deepinversion', 'noise'], configs=('a.py', 'b.py'))
    assert found['teacher'] == ['unfinished', 'unfinished']
    assert found['adaptive'] == ['92.00 ± 2.83 (n = 2 of 3, unfinished)', 'unfinished']
    assert found['adaptive - deepinversion'] == ['-1.00 (n = 1 of 3, unfinished)', 'unfinished']
    assert found['noise'] == found['deepinversion - noise'] == ['unfinished', 'unfinished']
    assert 'a noise' not in found  # nothing is known yet of what it takes


def test_noise_and_real_share_a_run_where_both_are_asked_for(tmp_path):
    finish(tmp_path, Cell('a.py', 'real', 0), 0.30, real=0.93)
    finish(tmp_path, Cell('a.py', 'noise', 0), 0.20)
    found = rows(tmp_path, ['noise', 'real'], seeds=1)
    assert (found['noise'], found['real'], found['noise - real']) == (
        ['30.00 (n = 1)'],
        ['93.00 (n = 1)'],
        ['-63.00 (n = 1)'],
    )
    assert rows(tmp_path, ['noise'], seeds=1)['noise'] == ['20.00 (n = 1)']
    assert table.plan(['a.py'], ['noise', 'real'], 1)[1:] == [Cell('a.py', 'real', 0)]


def test_what_a_cell_took(tmp_path):
    finish(tmp_path, Cell('a.py', 'teacher', 0), 0.95, seconds=1200)
    for seed, seconds in enumerate((100, 140)):
        finish(tmp_path, Cell('a.py', 'real', seed), 0.3, real=0.9, seconds=seconds)
    found = rows(tmp_path, ['noise', 'real'])
    assert found['a teacher'][:2] == ['20.0', '20.0']
    assert found['a noise'] == ['6.0', '7.0', '25,600', '20,000', '100', '10,000']
    assert found['a real'] == ['6.0', '7.0', '', '20,000', '', '10,000']


def test_a_run_without_test_images_has_no_accuracy(tmp_path):
    finish(tmp_path, Cell('a.py', 'noise', 0), None)
    assert rows(tmp_path, ['noise'], seeds=1)['noise'] == ['unfinished']


# Cells


def test_seeds_are_outermost_and_a_teacher_comes_before_its_students():
    configs, methods = ['c/a.py', 'c/b.py:smoke'], ['adaptive', 'noise']
    assert list(map(str, table.plan(configs, methods, 2))) == [
        'a teacher',
        'a adaptive seed 0',
        'a noise seed 0',
        'b-smoke teacher',
        'b-smoke adaptive seed 0',
        'b-smoke noise seed 0',
        'a adaptive seed 1',
        'a noise seed 1',
        'b-smoke adaptive seed 1',
        'b-smoke noise seed 1',
    ]


def test_a_student_gets_the_networks_that_were_trained_for_all(tmp_path):
    def flags(method: str) -> list[str]:
        return [*map(str, table.command(tmp_path, Cell('c/a.py', method, 2), ['--config.x=1']))][1:]

    folder = tmp_path / 'a' / 'teacher'
    folder.mkdir(parents=True)
    trained = {'network': 'resnet20', 'weights': '', 'factory': ''}
    (folder / 'config.json').write_text(json.dumps({'teacher': {**trained, 'weights': 'w.pt'}, 'verifier': trained}))
    start = ['-m', 'dvinv.main', '--config', 'c/a.py', '--workdir', f'{tmp_path}/a/adaptive/seed-2', '--config.x=1']
    tasks = "--config.tasks=('teacher', 'synthesis', 'distillation')"
    verifier = f'--config.verifier.weights={folder}/networks/verifier.safetensors'
    method = '--config.synthesis.method=adaptive'
    controls = '--config.distillation.controls='
    assert flags('adaptive') == [*start, '--config.seed=2', tasks, f'{controls}()', method, verifier]
    assert {f"{controls}('real',)", '--config.synthesis.method=noise'} <= {*flags('real')}
    assert flags('teacher')[-2:] == ["--config.tasks=('teacher',)", f'{controls}()']
    (folder / 'config.json').write_text(
        json.dumps({'teacher': {**trained, 'factory': 'm:f'}, 'verifier': {**trained, 'network': ''}})
    )
    assert flags('adaptive')[-1] == method  # neither was trained here


def test_time_left_is_told_from_like_cells():
    cells = table.plan(['a.py'], ['adaptive', 'noise'], 2)
    teacher, adaptive, noise = cells[:3]
    assert table.left(cells, {teacher: 600}) == ''
    assert table.left(cells, {teacher: 600, adaptive: 120}) == ', about 6.0 min left'  # three like the one
    assert table.left(cells, {teacher: 600, adaptive: 120, noise: 30}) == ', about 2.5 min left'


@pytest.mark.parametrize(
    ('argv', 'sentence'),
    [
        (['--configs', 'x/a.py', 'y/a.py'], 'needs names that differ, not a a'),
        (['--configs', 'a.py', '--methods', 'magic'], "invalid choice: 'magic'"),
        (['--configs', 'a.py', '--', '--config.seed=3'], '--config.seed=3 is set for every cell here'),
        (['--configs', 'a.py', '--', '--config.bn_stats=global'], 'has cells with -- --config.x=1; repeat that'),
    ],
)
def test_what_makes_no_table_is_told(tmp_path, capsys, argv, sentence):
    (tmp_path / 'table.json').write_text('{"flags": ["--config.x=1"]}')
    with pytest.raises(SystemExit, match='2'):
        table.parse(['--workdir', str(tmp_path), *argv])
    assert sentence in capsys.readouterr().err


# Runs


@pytest.fixture
def begin(tmp_path):
    """`begin(*arguments, **environment)`: the process of a table of `adaptive` and `noise` with the stand-in for dvinv."""
    (tmp_path / 'dvinv').mkdir()
    (tmp_path / 'dvinv' / '__init__.py').touch()
    (tmp_path / 'dvinv' / 'main.py').write_text(STAND_IN)

    def begin(*arguments, **environment) -> subprocess.Popen:
        command = ['--configs', 'c/a.py', '--methods', 'adaptive', 'noise', '--seeds', '2', '--workdir', 'runs', *arguments]
        return subprocess.Popen(
            [sys.executable, SCRIPT, *command],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': '', **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return begin


@pytest.fixture
def fill(begin, tmp_path):
    """`fill(*arguments, **environment) -> (exit status, stdout, stderr, folders of the cells that were started)`."""

    def fill(*arguments, **environment):
        (tmp_path / 'calls').write_text('')
        with begin(*arguments, **environment) as process:
            out, err = process.communicate()
        calls = [str(Path(line).relative_to('runs/a')) for line in (tmp_path / 'calls').read_text().splitlines()]
        return process.returncode, out, err, calls

    return fill


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_cells_are_resumed_where_the_minutes_ended(fill, tmp_path):
    status, out, err, calls = fill('--minutes', '0')
    assert (status, calls) == (3, [])
    assert err == 'The minutes are over, 0 of 5 cells finished: not finished yet, run again\n'
    assert '| adaptive | unfinished |' in out
    assert fill('--methods', 'adaptive', '--seeds', '1')[0::3] == (0, ['teacher', 'adaptive/seed-0'])
    status, _, err, calls = fill('--minutes', '0.03', HANG='noise/seed-0')
    assert (status, calls) == (3, ['noise/seed-0'])
    assert not alive(int((tmp_path / 'pid').read_text()))
    assert err.endswith('The minutes are over, 2 of 5 cells finished: not finished yet, run again\n')
    assert '| noise | unfinished |' in (tmp_path / 'runs' / 'table.md').read_text()
    status, out, err, calls = fill()
    assert (status, calls) == (0, ['noise/seed-0', 'adaptive/seed-1', 'noise/seed-1'])
    assert err.splitlines()[0] == 'a noise seed 0: 2 of 5 cells finished, about 0.3 min left'
    assert '| noise | 50.00 ± 0.00 (n = 2) |' in out
    assert out == (tmp_path / 'runs' / 'table.md').read_text()
    with open(tmp_path / 'runs' / 'table.csv') as file:
        scores = {(row['what'], row['seed']): float(row['value']) for row in csv.DictReader(file)}
    assert scores['a.teacher', '0'] == 0.9
    assert scores['a.noise', '1'] == 0.5
    assert scores['a.adaptive_seconds', '0'] == 6
    students = json.loads((tmp_path / 'runs' / 'table.json').read_text())['configs']['a']['students']
    assert students['adaptive']['accuracy']['by_seed'] == {'0': 0.5, '1': 0.5}
    assert fill('--minutes', '0')[0::3] == (0, [])  # all is finished


def test_a_cell_that_fails_stops_no_other(fill):
    status, out, err, calls = fill(FAIL='adaptive/seed-0')
    assert (status, len(calls)) == (1, 5)
    assert 'a adaptive seed 0: failed with status 1: dvinv: this cell cannot be\n' in err
    assert '| adaptive | 50.00 (n = 1 of 2, unfinished) |' in out
    assert fill()[0::3] == (0, ['adaptive/seed-0'])


def test_without_its_teacher_no_student_is_started(fill):
    status, _, err, calls = fill(FAIL='teacher')
    assert (status, calls) == (1, ['teacher'])
    assert err.count('left out, for want of its teacher') == 4


def test_results_of_different_settings_are_not_mixed(fill):
    assert fill('--seeds', '1')[0] == 0
    status, _, err, calls = fill(IMAGES='16')
    assert (status, calls) == (1, ['adaptive/seed-1'])
    assert 'runs/a/adaptive/seed-1 has other settings than the cells before it' in err
    assert fill(IMAGES='16')[0::3] == (1, [])


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_running_cell_too(begin, tmp_path, number, status):
    with begin(HANG='adaptive') as process:
        while not (tmp_path / 'pid').exists() or not (pid := (tmp_path / 'pid').read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == status
    assert not alive(int(pid))


def test_the_table_has_the_figures_of_a_single_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'digits-smoke' / 'teacher')  # whose teacher then serves all
    command = ['--configs', 'configs/digits.py:smoke', '--methods', 'deepinversion', 'noise', 'real', '--seeds', '1']
    run = subprocess.run(
        [sys.executable, SCRIPT, *command, '--workdir', tmp_path],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(path.parent.name for path in (tmp_path / 'digits-smoke').glob('*/seed-0')) == ['deepinversion', 'real']
    expected = json.loads((finished / 'results.json').read_text())
    found = json.loads((tmp_path / 'table.json').read_text())['configs']['digits-smoke']
    assert found['teacher'] == expected['teacher']
    assert {method: figures['accuracy']['mean'] for method, figures in found['students'].items()} == {
        'deepinversion': expected['distillation']['test_accuracy'],
        'noise': expected['distillation']['noise_test_accuracy'],
        'real': expected['distillation']['real_test_accuracy'],
    }
    for folder in ('deepinversion', 'real'):
        config = json.loads((tmp_path / 'digits-smoke' / folder / 'seed-0' / 'config.json').read_text())
        assert config['verifier']['weights'] == f'{tmp_path}/digits-smoke/teacher/networks/verifier.safetensors'
