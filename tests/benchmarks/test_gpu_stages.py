"""benchmarks/gpu.py: the contest, the columns of CIFAR-10 and the pictures of ImageNet, with stand-ins for what is slow."""

import dataclasses
import os
from pathlib import Path

import gpu_columns
import gpu_contest
import gpu_imagenet
import gpu_runs
import gpu_stage
import numpy as np
import pytest
from gpu_cases import context_of, read_by_flags, reasons
from gpu_report import DONE, FAILED, PENDING, Item, read_json
from gpu_stage import Context
from PIL import Image

from dvinv.config import parse
from dvinv.runtime.errors import DvinvError


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
