"""benchmarks/gpu.py: bundle, schedule, reports and stages with stand-ins for what is slow, and a whole rehearsal."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image
from smoke import ROOT

from dvinv.config import parse

sys.path.append(str(ROOT / 'benchmarks'))
import gpu
import gpu_bundle
import gpu_columns
import gpu_contest
import gpu_imagenet
import gpu_runs
import gpu_schedule
import gpu_stage
import gpu_students
from gpu_report import DONE, FAILED, PENDING, Item, Report, nulls, place_of, read_json
from gpu_stage import Context, Settings

from dvinv.errors import DvinvError


@pytest.fixture
def settings(tmp_path) -> Settings:
    """Settings of a rehearsal."""
    return Settings(str(tmp_path / 'out'), str(tmp_path / 'work'), str(tmp_path / 'data'), '', True, False, 2)


def context_of(settings: Settings, stage: str, seconds: float = 60.0) -> Context:
    """Returns what a stage measures with."""
    return Context(stage, settings, settings.report(stage), time.monotonic() + seconds)


def reasons(entry: dict) -> dict[str, str | None]:
    """Returns the reason of every figure of an item that is null."""
    places = {path: place_of(path, entry['missing']) for path in nulls(entry['figures'])}
    return {path: None if place is None else entry['missing'][place] for path, place in places.items()}


# Command line and bundle


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--minutes', '0.1'], '--minutes is 0.1; it must be at least 0.5'),
        (['--minutes', 'nan'], '--minutes is nan'),
        (['--side-by-side', '0'], '--side-by-side is 0; it must be at least 1'),
        ([], '--out is missing, and OUT is not set'),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, argv, words):
    monkeypatch.delenv('OUT', raising=False)
    with pytest.raises(DvinvError, match=words):
        gpu.parse(argv)


def test_figures_go_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv('OUT', str(tmp_path))
    assert gpu.parse([]).out == tmp_path
    assert gpu.parse(['--rehearse']).out == ROOT / 'runs' / 'gpu_rehearsal' / 'out'


def test_without_a_gpu_the_rehearsal_is_offered(tmp_path):
    command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu.py'), '--out', str(tmp_path / 'out')]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PATH': str(tmp_path)}, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('gpu: No NVIDIA GPU is found here (FileNotFoundError')
    assert done.stderr.endswith('--rehearse does everything in toy sizes on a CPU.\n')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('output', 'status'), [('No devices were found', 6), ('', 0)])
def test_a_driver_without_a_gpu_is_none(monkeypatch, tmp_path, output, status):
    write_executable(tmp_path / 'nvidia-smi', f'echo -n "{output}"; exit {status}')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DvinvError, match='No NVIDIA GPU is found here'):
        gpu_schedule.find_gpu()


def test_the_gpu_is_named(monkeypatch, tmp_path):
    write_executable(tmp_path / 'nvidia-smi', 'echo NVIDIA X100; echo NVIDIA X100')
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    assert gpu_schedule.find_gpu() == 'NVIDIA X100'


def write_executable(path: Path, script: str) -> None:
    """Writes a shell script."""
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)


def test_the_bundle_has_the_dependencies_that_the_machine_lacks():
    assert gpu_bundle._wanted() == ['ml-collections>=1.1']


def test_a_bundle_is_built_and_checked(monkeypatch, tmp_path):
    bundle, data = tmp_path / 'bundle', tmp_path / 'data'
    with pytest.raises(DvinvError, match=r'There is no bundle at .*; make it by `python benchmarks/gpu.py --bundle`'):
        gpu_bundle.check(bundle)
    data.mkdir()
    with pytest.raises(DvinvError, match=r'has no cifar10_train_jpeg.npz, .*; set DVINV_DATA'):
        gpu_bundle.build(bundle, data)
    for name in gpu_bundle.DATA:
        (data / name).write_bytes(b'1234')
    wheel = 'some-1.0-py3-none-any.whl'
    monkeypatch.setattr(gpu_bundle, '_download', lambda wanted, folder: (folder / wheel).write_bytes(b''))
    assert gpu_bundle.build(bundle, data).startswith('bundle has 0.0 MiB and the checkout ')
    gpu_bundle.check(bundle)
    (bundle / 'data' / gpu_bundle.DATA[1]).unlink()
    with pytest.raises(DvinvError, match=r'lacks data/cifar10_test_jpeg.npz; make it by'):
        gpu_bundle.check(bundle)
    monkeypatch.setattr(gpu_bundle, 'MOST_BYTES', 2**20)
    with pytest.raises(
        DvinvError, match=r'bundle has .* MiB, together more than the 1 MiB that travel; remove what is large'
    ):
        gpu_bundle.build(bundle, data)


def test_a_bundle_without_wheels_is_refused(monkeypatch, tmp_path):
    assert gpu_bundle.install(tmp_path, tmp_path / 'site') == []  # nothing is missing here
    monkeypatch.setattr(gpu_bundle, '_missing', lambda: ['ml-collections'])
    with pytest.raises(DvinvError, match=r'ml-collections is not installed here, and the bundle .* has no wheel of it'):
        gpu_bundle.install(tmp_path, tmp_path / 'site')
    (tmp_path / 'wheels').mkdir()
    (tmp_path / 'wheels' / 'ml_collections-1.1.0-py3-none-any.whl').write_bytes(b'no wheel')
    with pytest.raises(DvinvError, match=r'The wheels of .* cannot be installed: ERROR'):
        gpu_bundle.install(tmp_path, tmp_path / 'site')


# Reports


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


# Time, and what fails


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


def test_a_call_with_too_little_time_names_what_it_skips(settings, capsys):
    settings = dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100', core=True)
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
sys.path.insert(0, {benchmarks!r})
from gpu_stage import Settings
stage, settings, level, seconds = sys.argv[1:]
report = Settings(**json.loads(pathlib.Path(settings).read_text())).report(stage)
with open('calls', 'a') as calls:
    print(stage, level, file=calls)
for name in report.unfinished(int(level)):
    report.begin(name)
    if stage == 'inversion' and name.endswith('112'):
        os.kill(os.getpid(), signal.SIGKILL)
    if stage == 'imagenet':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    report.excuse(name, 'a stand-in')
    report.finish(name)
"""


@pytest.mark.slow
def test_a_stage_that_is_killed_or_hangs_loses_only_itself(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / 'benchmarks').mkdir()
    script = STAND_IN_STAGE.replace('{benchmarks!r}', repr(str(ROOT / 'benchmarks')))
    (tmp_path / 'benchmarks' / 'gpu_stage.py').write_text(script)
    monkeypatch.setattr(gpu_schedule, 'ROOT', tmp_path)
    monkeypatch.setattr(gpu_schedule, 'GRACE', 0.3)
    schedule = [gpu_schedule.Pass(stage, 1, 1 if stage == 'imagenet' else 100, 0) for stage in gpu_stage.MODULES]
    monkeypatch.setattr(gpu_schedule, 'SCHEDULE', schedule)
    settings = dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100', core=True)
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


# Earlier calls


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


def test_figures_of_earlier_calls_come_back(settings, tmp_path):
    settings = dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100')
    measured(tmp_path / 'previous', 'peak', card='NVIDIA X200')
    measured(tmp_path / 'previous', 'training')
    measured(Path(settings.workdir) / 'figures', 'inversion')
    gpu_schedule.restore(settings, tmp_path / 'previous')
    assert sorted(path.name for path in Path(settings.out).iterdir()) == ['inversion.json', 'training.json']
    assert settings.report('training').complete()
    assert not settings.report('peak').complete()  # of another card: shares of its peak would be wrong


def test_a_rehearsal_is_not_taken_for_a_measurement(settings, tmp_path):
    measured(tmp_path / 'previous', card='', rehearsal=True)
    gpu_schedule.restore(settings, tmp_path / 'previous')
    (Path(settings.out) / 'peak.json').unlink()
    with pytest.raises(DvinvError, match='comes from a rehearsal, unlike this call; name another --out'):
        gpu_schedule.restore(dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100'), tmp_path / 'previous')
    (tmp_path / 'previous' / 'peak.json').write_text('{"stage": 1}')
    with pytest.raises(DvinvError, match=r'peak.json is damaged .*; delete it'):
        gpu_schedule.restore(settings, tmp_path / 'previous')


# The contest


class Contestant:
    """A stand-in for dvinv or PyTorch."""

    def __init__(self, loss: float, fails: str = ''):
        self._loss, self._fails = loss, fails

    def about(self) -> dict:
        return {'flops': 10**9, 'compile_mode': 'default'}

    def start(self) -> dict:
        return {}

    def first(self) -> dict:
        if self._fails == 'first':
            raise DvinvError('It cannot be compiled.')
        return {'terms': {'loss': self._loss}, 'seconds': 1.0}

    def run(self, steps: int) -> float:
        if self._fails == 'run':
            os._exit(1)
        return 0.001

    def memory_mb(self) -> float:
        return 5.0


@pytest.mark.slow
def test_a_contestant_that_fails_or_computes_something_else_loses_its_own_figures(settings, monkeypatch):
    monkeypatch.setattr(gpu_contest.importlib.util, 'find_spec', lambda name: True)
    contestants = {
        'torch_eager_float32': (1.0,),
        'torch_eager_autocast': (1.5,),
        'torch_strongest': (1.0, 'first'),
        'bfloat16': (1.01,),
        'float32': (1.0, 'run'),
    }
    names = {variant: name for name, variant in gpu_contest.TORCH.items()}
    step = gpu_contest.Step(
        lambda precision: (Contestant, contestants[precision]),
        lambda variant, start, about: (Contestant, contestants[names[variant]]),
        images=4,
    )
    context = context_of(settings, 'inversion')
    context.report.begin('resnet50_224')
    gpu_contest.contest(context, 'resnet50_224', step)
    entry = read_json(Path(settings.out) / 'inversion.json')['items']['resnet50_224']
    figures, why = entry['figures'], reasons(entry)
    assert figures['dvinv_bfloat16']['images_per_second'] == 4000
    assert figures['dvinv_bfloat16']['tflops'] == 1.0
    assert figures['ratios']['dvinv_bfloat16_over_torch_eager_float32'] == {'median': 1, 'low': 1, 'high': 1}
    assert why['torch_eager_autocast.tflops'] == 'its first loss differs from dvinv by 0.5, so it is not timed'
    assert why['torch_strongest.first_loss'] == why['torch_compile_mode'] == 'It cannot be compiled.'
    assert why['dvinv_float32.seconds_per_step'].startswith('The process of dvinv_float32 ended with status 1')
    assert why['ratios.dvinv_float32_over_torch_eager_float32.low'] == 'dvinv_float32 has no figures'
    assert why['dvinv_bfloat16.share_of_peak'] == "the stage 'peak' has not measured it"


# The columns


@pytest.fixture
def real(settings) -> Settings:
    """Settings that are no rehearsal."""
    return dataclasses.replace(settings, rehearse=False, gpu='NVIDIA X100')


@pytest.fixture
def config_of(monkeypatch):
    """`config_of(arguments)`: the config that the flags of a run make."""
    monkeypatch.chdir(ROOT)

    def config_of(arguments: list[str]):
        monkeypatch.setattr(sys, 'argv', ['dvinv', *arguments])  # where ml_collections looks for the names of fields
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file('config', None, flag_values=values)
        values(sys.argv)
        return config.value

    return config_of


read_by_flags = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads config files by it


@read_by_flags
@pytest.mark.parametrize('stage', ['vgg11', 'resnet34'])
def test_the_runs_of_a_column_differ_in_method_network_and_seed(real, config_of, stage):
    context, weights = context_of(real, stage), Path('w/teacher.safetensors')
    teacher = config_of(gpu_columns.flags_of('teacher', context, weights))
    parse(teacher)
    assert (teacher.tasks, teacher.teacher.weights, teacher.verifier.network) == (('teacher',), '', '')
    for name, student in gpu_columns.students_of(stage).items():
        config = config_of(gpu_columns.flags_of(name, context, weights))
        parse(config)
        assert (config.synthesis.method, config.student.network, config.seed) == (
            student.method,
            student.network,
            student.seed,
        )
        assert config.teacher.weights == str(weights)
        assert config.data.path.endswith('cifar10_test_jpeg.npz')
        assert config.data.train_path.endswith('cifar10_train_jpeg.npz')
        assert config.teacher.network == teacher.teacher.network


@read_by_flags
def test_the_imagenet_run_has_two_batches_of_84_classes(real, config_of):
    config = config_of(gpu_imagenet.flags_of(context_of(real, 'imagenet')))
    parse(config)
    assert (config.synthesis.images, config.synthesis.batch_size, len(set(config.synthesis.classes))) == (168, 84, 84)
    assert [stage.iterations for stage in config.synthesis.stages] == [2000, 1000]
    assert (config.synthesis.precision, config.teacher.width) == ('bfloat16', 0.75)


# Students side by side


@read_by_flags
@pytest.mark.parametrize('name', gpu_students.runs())
def test_the_flags_of_every_student_are_a_config(config_of, name):
    plan = gpu_students.runs()
    tried = plan[name].best_of
    chosen = gpu_students.LARGE[tried[0]] if tried else ()
    config = config_of(gpu_students.flags_of(plan[name], Path('data'), Path('runs'), chosen))
    parse(config)
    assert ('test1000' in config.data.path or 'test_jpeg' in config.data.path) == (plan[name].data != 'validation')
    assert not set(tried) - {each for each, planned in plan.items() if planned.data == 'validation'}
    assert {plan[name].pool_of, plan[name].network_of} <= {'', *plan}


class StandInRun:
    """Ends at once; every work directory reads more of the images than the one before it. 'gn' fails."""

    def __init__(self, workdir: Path, flags: list[str], memory_share: float):
        """Takes what `gpu_runs.Run` takes."""
        self.flags, self.seconds, self.status = flags, 1.0, 1 if workdir.name == 'gn' else 0
        (workdir / 'pool').mkdir(parents=True, exist_ok=True)
        self.results = {'distillation': {'test_accuracy': len(list(workdir.parent.iterdir())) / 100}}

    def explain(self) -> str:
        """Says why it ended."""
        return 'it failed'


def test_the_best_on_validation_images_is_scored_on_test_images(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_students, 'Run', StandInRun)
    monkeypatch.setattr(gpu_students, 'LEAST', 0.0)
    plan = gpu_students.runs()
    queue = gpu_students.Queue(plan, tmp_path / 'runs', tmp_path, Path('data'))
    (tmp_path / 'runs').mkdir()
    queue.run(16, time.monotonic() + 60)
    assert set(plan) - set(queue.done) == {'gn_free'}  # its teacher could not be trained
    best = gpu_students.best_of(tuple(gpu_students.LARGE), queue.done)
    assert {f'--config.{flag}' for flag in gpu_students.LARGE[best]} < set(queue.done['resnet8_seed1']['command'].split())
    assert 'Not started: gn_free.' in capsys.readouterr().out
    assert read_json(tmp_path / 'students.json') == queue.done


# `python -m dvinv.main` where this lies in the working directory. Methods, by name: one hangs, one fails.
STAND_IN_RUN = """
import json, pathlib, signal, sys, time
flags = dict(argument.removeprefix('--config.').split('=', 1) for argument in sys.argv if '=' in argument)
workdir, method = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1]), flags.get('synthesis.method')
networks = {'teacher': {'network': 'big'}, 'student': {'network': 'small'}}
(workdir / 'config.json').write_text(json.dumps(networks))
results = {'teacher': {'test_accuracy': 0.9, 'test_images': 10, 'parameters': 5, 'wall_seconds': 60}}
if method is None:
    (workdir / 'networks').mkdir(exist_ok=True)
    (workdir / 'networks' / 'teacher.safetensors').write_bytes(b'')
else:
    assert pathlib.Path(flags['teacher.weights']).exists()
    (workdir / 'results.json').write_text(json.dumps(results))
    if method == 'prior_only':
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        time.sleep(60)
    if method == 'noise':
        sys.exit('first\\ndvinv: this cannot be')
    losses = {'feature_loss_first': 9.0, 'feature_loss_last': 1.0, 'feature_loss_real': 2.0}
    results['synthesis'] = {'images': 8, 'iterations': 3, 'teacher_accuracy': 1.0, 'wall_seconds': 120, **losses}
    accuracy = {'adaptive': 0.89, 'deepinversion': 0.88}[method]
    results['distillation'] = {'test_accuracy': accuracy, 'updates': 4, 'wall_seconds': 180}
(workdir / 'results.json').write_text(json.dumps(results))
"""


def test_a_column_has_what_its_runs_left(real, monkeypatch, tmp_path):
    (tmp_path / 'dvinv').mkdir()
    (tmp_path / 'dvinv' / '__init__.py').write_text('')
    (tmp_path / 'dvinv' / 'main.py').write_text(STAND_IN_RUN)
    monkeypatch.setattr(gpu_runs, 'ROOT', tmp_path)
    monkeypatch.setattr(gpu_stage, 'items_of', quick_items)
    context = context_of(real, 'vgg11')
    gpu_columns.measure(context.report.unfinished(1), context)
    entries = read_json(Path(real.out) / 'vgg11.json')['items']
    adaptive = entries['vgg11_bn_adaptive_seed0']
    assert (adaptive['state'], adaptive['figures']['points_below_teacher']) == (DONE, 1)
    assert adaptive['figures']['distillation_minutes'] == 3
    assert adaptive['figures']['runs_side_by_side'] == 2
    assert entries['summary']['figures']['vgg11_bn'] == {
        'seeds': [0],
        'adaptive_points_below_teacher': 1,
        'plain_points_below_teacher': 2,
        'adaptive_ahead': True,
    }
    assert reasons(entries['summary'])['cifar_resnet18.seeds'] == 'no seed has both students'

    # Another machine has no teacher. Of the controls one hangs and one fails.
    (Path(real.workdir) / 'vgg11' / 'teacher' / 'networks' / 'teacher.safetensors').unlink()
    context = TimeUntilDone(context_of(real, 'vgg11'), ['vgg11_bn_adaptive_seed1', 'vgg11_bn_noise_seed0'])
    gpu_columns.measure(['vgg11_bn_prior_only_seed0', 'vgg11_bn_noise_seed0', 'vgg11_bn_adaptive_seed1'], context)
    report = real.report('vgg11')
    assert report.state('vgg11_bn_adaptive_seed1') == report.state('teacher') == DONE
    assert report.state('vgg11_bn_prior_only_seed0') == PENDING
    assert report.reason('vgg11_bn_prior_only_seed0') == 'ended when its time was over; finished tasks: teacher'
    assert report.state('vgg11_bn_noise_seed0') == FAILED
    assert report.reason('vgg11_bn_noise_seed0') == 'the run ended with status 1: dvinv: this cannot be'


class TimeUntilDone:
    """A context for which time is over when the named items have ended."""

    def __init__(self, context: Context, names: list[str]):
        self.stage, self.settings, self.report, self._names = context.stage, context.settings, context.report, names

    def remaining(self) -> float:
        return 60.0 * any(self.report.state(name) == PENDING for name in self._names)

    def enough_time(self, name: str) -> bool:
        return True


def quick_items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns the items of a column, which need no time."""
    return {name: dataclasses.replace(item, least_seconds=0) for name, item in gpu_columns.items(stage, rehearse).items()}


def test_the_hours_of_many_images_follow_from_the_steps(settings):
    inversion = settings.report('inversion')
    for name, seconds in (('resnet50_112', 0.001), ('resnet50_224', 0.004)):
        inversion.record(name, {'seconds_per_step': seconds}, 'dvinv_bfloat16')
    context = context_of(settings, 'imagenet')
    gpu_imagenet.measure(['resnet50_by_steps'], context)
    figures = context.report.figures('resnet50_by_steps')
    assert figures['seconds_per_image'] == pytest.approx(6 / 84, rel=1e-4)
    assert figures['gpu_hours_of_215000'] == pytest.approx(6 / 84 * 215_000 / 3600, rel=1e-4)
    assert figures['paper_v100_hours_over_it'] == pytest.approx(2800 / (6 / 84 * 215_000 / 3600), rel=1e-4)


def test_images_are_laid_out_in_rows(tmp_path):
    np.savez(tmp_path / 'shard.npz', images=np.full((13, 8, 8, 3), 200, np.uint8))
    gpu_imagenet.write_grid(tmp_path / 'shard.npz', tmp_path / 'grid.jpg')
    with Image.open(tmp_path / 'grid.jpg') as grid:
        assert grid.size == (12 * 8, 2 * 8)


# All of it


def rehearse(workdir: Path) -> tuple[int, str]:
    """Returns (exit status, output) of a rehearsal of the first passes."""
    command = [sys.executable, str(ROOT / 'benchmarks' / 'gpu.py'), '--rehearse', '--core', '--workdir', str(workdir)]
    # Programs that run once are not worth optimising.
    environment = {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(sys.version_info < (3, 12), reason='takes long, and the GPU machine has Python 3.12')
def test_a_rehearsal_measures_every_figure_and_goes_on_where_it_ended(tmp_path):
    status, output = rehearse(tmp_path)
    assert status == 0, output + (tmp_path / 'out' / 'log.txt').read_text()
    assert output.endswith('All is done.\n')
    has_torch = gpu_contest.importlib.util.find_spec('torch') is not None
    for stage in gpu_stage.MODULES:
        report = json.loads((tmp_path / 'out' / f'{stage}.json').read_text())
        assert (report['stage'], report['rehearsal'], report['error']) == (stage, True, None)
        declared = gpu_stage.items_of(stage, True)
        assert report['items'].keys() == declared.keys()
        for name, item in declared.items():
            entry = report['items'][name]
            assert entry['state'] == (DONE if item.level == 1 else PENDING)
            why = reasons(entry)
            assert None not in why.values()
            if item.level == 1:
                allowed = ('no GPU', 'not installed here', 'PyTorch is not installed here', 'no seed has both students')
                assert {reason for reason in why.values() if not reason.startswith((*allowed, 'torch_'))} == set(), name
                assert has_torch or not any('torch' in path and path not in why for path in leaves(entry['figures']))
    names = {'log.txt', 'imagenet.jpg', *(f'{stage}.json' for stage in gpu_stage.MODULES)}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == names
    assert len(names) <= 8  # as many come back from the GPU machine

    for folder in ('out', 'figures'):
        (tmp_path / folder / 'peak.json').unlink()
    before = {stage: (tmp_path / 'out' / f'{stage}.json').read_text() for stage in gpu_stage.MODULES if stage != 'peak'}
    status, output = rehearse(tmp_path)
    assert status == 0
    assert output.count('done in an earlier call') == len(before)
    assert 'versions done, jax done, torch done' in output
    assert before == {stage: (tmp_path / 'out' / f'{stage}.json').read_text() for stage in before}


def leaves(figures: dict, path: str = ''):
    """Yields the paths of all figures."""
    for key, value in figures.items():
        inner = f'{path}.{key}'.lstrip('.')
        if isinstance(value, dict):
            yield from leaves(value, inner)
        else:
            yield inner
