"""benchmarks/gpu.py: reports, what is done in which time, and what fails."""

import dataclasses
import time
from pathlib import Path

import gpu_schedule
import gpu_stage
import pytest
from gpu_cases import context_of, reasons
from gpu_report import DONE, FAILED, PENDING, Item, Report, nulls, read_json
from smoke import ROOT

from dvinv.runtime.errors import DvinvError


def report_of(tmp_path, names=('one', 'two')) -> Report:
    """Returns a report in two files."""
    fields = {'speed': None, 'group': {'loss': None, 'memory': None}}
    items = {name: Item(level, 1, fields) for level, name in enumerate(names, 1)}
    return Report([tmp_path / 'a' / 'x.json', tmp_path / 'b' / 'x.json'], 'x', items, 'NVIDIA X100', False)


def test_a_report_is_on_disk_after_every_change_and_goes_on_from_there(tmp_path):
    report = report_of(tmp_path)
    report.begin('one')
    report.record('one', {'speed': 1 / 3, 'group': {'loss': 2}})
    report.excuse('one', 'no memory', 'group.memory')
    report.add_seconds('one', 1.5)
    report.finish('one')
    written = read_json(tmp_path / 'a' / 'x.json')
    assert written == read_json(tmp_path / 'b' / 'x.json')
    assert written['items']['one'] == {
        'state': DONE,
        'gpu': 'NVIDIA X100',
        'seconds': 1.5,
        'figures': {'speed': 0.333333, 'group': {'loss': 2, 'memory': None}},
        'missing': {'group.memory': 'no memory'},
    }
    assert not written['complete']
    again = report_of(tmp_path)
    assert again.complete(1)
    assert again.unfinished(1) == []
    assert again.unfinished(2) == ['two']
    assert again.reason('two') == 'not started'


def test_every_figure_that_is_null_has_a_reason(tmp_path):
    report = report_of(tmp_path)
    report.begin('one')
    report.record('one', {'loss': float('nan'), 'memory': None}, 'group')
    with pytest.raises(ValueError, match='one is done without speed, and without a reason'):
        report.finish('one')
    report.fail('one', 'DvinvError: it broke')
    entry = read_json(tmp_path / 'a' / 'x.json')['items']['one']
    assert entry['state'] == FAILED
    assert reasons(entry) == {
        'speed': 'DvinvError: it broke',
        'group.loss': 'the value is nan',
        'group.memory': 'it was not measured',
    }
    assert report.failed() == ['one']


def test_a_figure_that_is_not_declared_is_a_mistake(tmp_path):
    with pytest.raises(KeyError, match=r'group.speed is no figure of one'):
        report_of(tmp_path).record('one', {'speed': 1}, 'group')


@pytest.mark.parametrize('rehearse', [False, True])
def test_a_stage_declares_the_same_figures_in_a_rehearsal(rehearse):
    for stage in gpu_stage.MODULES:
        declared = {name: [*nulls(item.fields)] for name, item in gpu_stage.items_of(stage, rehearse).items()}
        assert declared == {name: [*nulls(item.fields)] for name, item in gpu_stage.items_of(stage, True).items()}
        assert all(declared.values())


def test_an_item_that_fails_loses_only_itself(settings):
    context = context_of(settings, 'peak')

    def measure_one(name):
        if name == 'jax':
            raise RuntimeError('out of memory')
        context.report.excuse(name, 'a stand-in')

    context.in_order(['versions', 'jax', 'torch'], measure_one)
    assert [context.report.state(name) for name in ('versions', 'jax', 'torch')] == [DONE, FAILED, DONE]
    assert context.report.reason('jax') == 'RuntimeError: out of memory'


def test_an_item_for_which_too_little_time_is_left_is_skipped(settings):
    context = context_of(settings, 'peak', seconds=5)
    context.in_order(['versions', 'jax'], lambda name: context.report.excuse(name, 'a stand-in'))
    assert [context.report.state(name) for name in ('versions', 'jax')] == [DONE, PENDING]
    assert context.report.reason('jax') == 'skipped: 5 s were left, and it needs at least 10'


def test_a_call_with_too_little_time_names_what_it_skips(real, capsys):
    settings = dataclasses.replace(real, core=True)
    gpu_schedule.restore(settings, Path('nowhere'))
    status = gpu_schedule.Session(settings, time.monotonic() + gpu_schedule.GRACE + 18.5, []).run()
    printed = capsys.readouterr().out
    assert status == gpu_schedule.SHORT_OF_TIME
    assert 'peak, pass 1: skipped: 18 s were left, and the stage needs at least 20\n' in printed
    assert 'Not finished: peak, inversion, imagenet, vgg11, resnet34, training.' in printed
    assert 'ResNet-50 224 px, bfloat16: share of peak' in printed
    for stage in gpu_stage.MODULES:
        for entry in read_json(Path(settings.out) / f'{stage}.json')['items'].values():
            assert None not in reasons(entry).values()


STAND_IN_STAGE = """
import json, os, pathlib, signal, sys, time
stage, settings, level, seconds = sys.argv[1:]
with open('calls', 'a') as calls:
    print(stage, level, file=calls)
if stage == 'imagenet':  # before the imports, which may take longer than the second that this stage has
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
sys.path.insert(0, {benchmarks!r})
from gpu_stage import Settings
report = Settings(**json.loads(pathlib.Path(settings).read_text())).report(stage)
for name in report.unfinished(int(level)):
    report.begin(name)
    if stage == 'inversion' and name.endswith('112'):
        os.kill(os.getpid(), signal.SIGKILL)
    report.excuse(name, 'a stand-in')
    report.finish(name)
"""


@pytest.mark.slow
def test_a_stage_that_is_killed_or_hangs_loses_only_itself(real, monkeypatch, tmp_path, capsys):
    (tmp_path / 'benchmarks').mkdir()
    script = STAND_IN_STAGE.replace('{benchmarks!r}', repr(str(ROOT / 'benchmarks')))
    (tmp_path / 'benchmarks' / 'gpu_stage.py').write_text(script)
    monkeypatch.setattr(gpu_schedule, 'ROOT', tmp_path)
    monkeypatch.setattr(gpu_schedule, 'GRACE', 0.3)
    schedule = [gpu_schedule.Pass(stage, 1, 1 if stage == 'imagenet' else 100, 0) for stage in gpu_stage.MODULES]
    monkeypatch.setattr(gpu_schedule, 'SCHEDULE', schedule)
    settings = dataclasses.replace(real, core=True)
    gpu_schedule.restore(settings, Path('nowhere'))
    session = gpu_schedule.Session(settings, time.monotonic() + 600, [str(ROOT)])
    assert session.run() == gpu_schedule.SHORT_OF_TIME
    printed = capsys.readouterr().out
    assert 'resnet50_224 done, resnet50_112 pending (the process of the stage ended with status -9)' in printed
    assert 'mobilenet_v1_batch pending, resnet50_by_steps pending (killed: it had not ended' in printed
    assert 'Not finished: inversion, imagenet.' in printed
    assert read_json(Path(settings.out) / 'training.json')['complete']
    assert 'ended with status -9' in read_json(Path(settings.out) / 'inversion.json')['error']
    session.run()  # what is done is left alone
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert calls == [f'{stage} 1' for stage in gpu_stage.MODULES] + ['inversion 1', 'imagenet 1']


def measured(folder: Path, stage: str = 'peak', card: str = 'NVIDIA X100', rehearsal: bool = False) -> Path:
    """Writes a stage's file as an earlier call left it."""
    folder.mkdir(parents=True, exist_ok=True)
    report = Report([folder / f'{stage}.json'], stage, gpu_stage.items_of(stage, False), card, rehearsal)
    name = report.names()[0]
    report.begin(name)
    report.record(name, {})
    report.excuse(name, 'a stand-in')
    report.finish(name)
    return folder / f'{stage}.json'


def test_figures_of_earlier_calls_come_back(real, tmp_path):
    measured(tmp_path / 'previous', 'peak', card='NVIDIA X200')
    measured(tmp_path / 'previous', 'training')
    measured(Path(real.workdir) / 'figures', 'inversion')
    gpu_schedule.restore(real, tmp_path / 'previous')
    assert sorted(path.name for path in Path(real.out).iterdir()) == ['inversion.json', 'training.json']
    assert real.report('training').complete()
    assert not real.report('peak').complete()  # of another card: shares of its peak would be wrong


def test_a_rehearsal_is_not_taken_for_a_measurement(settings, real, tmp_path):
    measured(tmp_path / 'previous', card='', rehearsal=True)
    gpu_schedule.restore(settings, tmp_path / 'previous')
    (Path(settings.out) / 'peak.json').unlink()
    with pytest.raises(DvinvError, match='comes from a rehearsal, unlike this call; name another --out'):
        gpu_schedule.restore(real, tmp_path / 'previous')
    (tmp_path / 'previous' / 'peak.json').write_text('{"stage": 1}')
    with pytest.raises(DvinvError, match=r'peak.json is damaged .*; delete it'):
        gpu_schedule.restore(settings, tmp_path / 'previous')
