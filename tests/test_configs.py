"""Every file in configs/: what it says can be run, and its argument `smoke` shrinks it to seconds."""

import ast
import dataclasses
import json
import math
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from smoke import NAMES, ROOT
from tiny import saved, trained_variables

from dvinv.config import PRESETS, parse, preset_for, shrink
from dvinv.data.real import DATA_SETS
from dvinv.networks import create, shapes_of
from dvinv.networks.classifier import flatten, name_of
from dvinv.networks.naming import find_keys
from dvinv.networks.registry import image_shape
from dvinv.pipeline import tasks as pipeline
from dvinv.pipeline.run import Run

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
each_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


def read(path, *arguments):
    """The config that a file gives."""
    return runpy.run_path(str(path))['get_config'](*arguments)


@each_config
def test_the_config_can_be_run_where_its_data_are(path):
    config = read(path)
    assert config == read(path, '')
    shape = image_shape(config.teacher.network)
    settings = parse(config)
    settings = settings.with_preset(PRESETS[preset_for(shape)])
    assert config.synthesis.images % config.synthesis.batch_size == 0
    assert config.data.name in ('', *DATA_SETS)  # '': it needs none
    for network in (config.teacher, config.verifier, config.student):
        if network.network:  # a verifier may be left out
            create(network.network, 10, network.width)
    settings.inversion_config().validate_for(shape)


@pytest.mark.slow
@each_config
def test_the_smoke_run_needs_nothing_that_is_not_here(path):
    whole, smoke = read(path), read(path, 'smoke')
    pipeline.validated(smoke)
    for part in ('teacher', 'verifier', 'student'):
        assert smoke[part].network == whole[part].network
    assert smoke.synthesis.method == whole.synthesis.method
    assert smoke.synthesis.images <= 100
    assert max(group.updates for group in (smoke.teacher.training, smoke.verifier.training, smoke.distillation)) <= 50


@pytest.mark.parametrize('name', ['', 'npz'])
def test_a_smoke_run_of_a_users_network_keeps_its_data(name):
    """The network may take only images of the shape of these data."""
    config = read(ROOT / 'configs' / 'own_network.py')
    config.data.name = name
    shrink(config)
    assert config.data.name == name
    config.teacher.factory = ''
    shrink(config)
    assert config.data.name == 'digits'


@each_config
def test_an_argument_that_it_does_not_know_is_refused(path):
    students = 'resnet20, resnet8, wrn16_1, vgg, mobilenet, answers'
    digits = 'fast|free(, quantize)?|answers|mixup|twos|digits'
    others = f'pictures, paper|paper|{digits}|{students}|short, spectrum|10, 20|71|nnx'
    with pytest.raises(ValueError, match=rf"knows the (argument|arguments ({others}) and) smoke, not 'smok'"):
        read(path, 'smok')


@pytest.mark.slow
def test_the_template_has_its_networks_in_nnx_too():
    config, linen = (read(ROOT / 'configs' / 'own_network.py', argument) for argument in ('nnx', ''))
    teacher = pipeline.validated(config).planned_teacher
    assert 'Nnx' in name_of(teacher.module)
    whole = shapes_of(Run(parse(linen)).factory_network, (8, 8, 1))['params']
    assert teacher.parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(whole))
    fresh = read(ROOT / 'configs' / 'own_network.py', 'nnx')
    fresh.update(teacher=linen.teacher, student=linen.student)
    assert fresh == linen


@pytest.mark.parametrize(('argument', 'preset'), [('pictures', 'cifar10_crop'), ('paper', 'cifar10_paper')])
def test_pictures_are_made_with_a_preset_as_it_is(argument, preset):
    config = read(ROOT / 'configs' / 'cifar10_resnet20.py', argument)
    parse(config)
    assert parse(config).inversion_config() == PRESETS[preset]
    assert config.synthesis.images == config.synthesis.batch_size == 256


@pytest.mark.parametrize(('config', 'preset'), [('digits:fast', 'digits_fast'), ('cifar10_resnet20:', 'cifar10_fast')])
def test_students_learn_from_the_fast_preset(config, preset):
    name, argument = config.split(':')
    fast = read(ROOT / 'configs' / f'{name}.py', argument)
    parse(fast)
    assert parse(fast).inversion_config() == PRESETS[preset]


@pytest.mark.parametrize(('argument', 'epochs', 'mixup'), [('', 90, 0), ('mixup', 250, 0.2)])
def test_a_resnet50_is_taught_as_published(argument, epochs, mixup):
    config = read(ROOT / 'configs' / 'imagenet_resnet50.py', argument)
    parse(config)
    settings = parse(config).distillation
    assert (config.teacher.network, config.student.network, config.synthesis.images) == ('resnet50', 'resnet50', 215_040)
    assert (settings.batch_size, settings.updates) == (1024, epochs * (215_040 // 1024))
    assert (settings.optimizer, settings.schedule, settings.learning_rate) == ('sgd', 'cosine', 1.024)
    assert (settings.resized_crop, settings.flip, settings.mixup) == (0.08, True, mixup)
    # The loss is the KL divergence to the teacher alone.
    assert (settings.temperature, settings.hint, settings.updates_per_round) == (3, 0, 0)
    assert parse(config).inversion_config() == dataclasses.replace(PRESETS['imagenet_multires'], precision='bfloat16')


@each_config
def test_the_docstring_tells_the_command(path):
    told = ast.get_docstring(ast.parse(path.read_text())) or ''
    assert f'python -m dvinv.main --config configs/{path.name} --workdir runs/{path.stem}' in told


@pytest.mark.slow
def test_a_smoke_run_of_pictures_ends_with_a_report(command, tmp_path):
    """Nearly all of its time goes into compiling: small networks and no controls shorten it."""
    networks = {'teacher': 'resnet8', 'student': 'resnet8', 'verifier': 'small_convnet'}
    small = [f'--config.{role}.network={network}' for role, network in networks.items()]
    small, run = [*small, '--config.distillation.controls=()'], tmp_path / 'run'
    status, _, err = command('--workdir', run, *small, config='configs/cifar10_resnet20.py:smoke')
    assert status == 0, err
    assert (run / 'report.html').exists()
    results = json.loads((run / 'results.json').read_text())
    assert set(results) == set(NAMES)
    for task, names in NAMES.items():
        assert names <= set(results[task])
    assert results['distillation']['hinted_layers'] == 7


@pytest.mark.slow
def test_a_config_of_two_resolutions_runs_on_larger_images_to_its_report(command, tmp_path):
    """The first resolution does not divide the images', which is above any network's usual one. Nearly all of its time goes
    into compiling, so the teacher has fewer layers than a MobileNet."""
    size, run = 232, tmp_path / 'run'
    variables = flatten(trained_variables(create('wrn16_1', 10, 0.25), (size, size, 3)))
    np.savez(tmp_path / 'teacher.npz', **{name: variables[path] for path, name in find_keys(variables, '/', {}).items()})
    flags = {
        'devices': 2,
        'teacher.network': 'wrn16_1',
        'teacher.width': 0.25,
        'teacher.weights': tmp_path / 'teacher.npz',
        'teacher.image_shape': (size, size, 3),
        'verifier.network': 'small_convnet',
        'verifier.mean': (),
        'verifier.std': (),
        'verifier.weights': saved(tmp_path / 'verifier.safetensors', 'small_convnet', 10, (size, size, 3)),
        'synthesis.images': 4,
        'synthesis.batch_size': 4,
        'synthesis.classes': (2, 3, 5, 7),
        'logging.iterations': 1,
    }
    for stage, resolution in enumerate((100, size)):
        settings = {'iterations': 2, 'warmup': 1, 'resolution': resolution}
        flags |= {f'synthesis.stages[{stage}].{field}': value for field, value in settings.items()}
    arguments = [f'--config.{name}={value}' for name, value in flags.items()]
    status, _, err = command('--workdir', run, *arguments, config='configs/imagenet_mobilenet_v1.py')
    assert status == 0, err
    with np.load(run / 'pool' / 'shard-000000.npz') as shard:
        assert shard['images'].shape == (4, size, size, 3)
    assert json.loads((run / 'pool' / 'shard-000000.json').read_text())['curve']['step'] == [0, 1, 2, 3]
    assert list(json.loads((run / 'quality.json').read_text())) == ['synthesized', 'noise']
    assert 'Loss terms, mean over batches' in (run / 'report.html').read_text()


@pytest.mark.slow
def test_the_configs_of_an_installed_package_import_one_another(tmp_path):
    """setup.py copies them into the package; a folder `configs` beside the package is not taken for them."""
    installed = tmp_path / 'site' / 'dvinv' / 'configs'
    shutil.copytree(ROOT / 'dvinv', installed.parent)
    shutil.copytree(ROOT / 'configs', installed, dirs_exist_ok=True)
    (tmp_path / 'site' / 'configs').mkdir()
    code = (
        'from dvinv.configs import FOLDER, digits_prune as prune; print(FOLDER, prune.__file__, *prune.get_config().tasks)'
    )
    found = subprocess.run([sys.executable, '-c', code], cwd=tmp_path / 'site', check=True, capture_output=True, text=True)
    assert found.stdout.split()[:3] == [str(installed), str(installed / 'digits_prune.py'), 'teacher']
