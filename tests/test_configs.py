"""Every file in configs/: what it says can be run, and its argument `smoke` shrinks it to seconds."""

import ast
import json
import runpy

import pytest
from smoke import NAMES, ROOT

from dvinv import configuration, pipeline
from dvinv.configuration import recipe_of
from dvinv.data.real import DATA_SETS
from dvinv.inversion import PRESETS
from dvinv.networks import create
from dvinv.networks.registry import image_shape

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
each_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


def read(path, *arguments):
    """The config that a file gives."""
    return runpy.run_path(str(path))['get_config'](*arguments)


@each_config
def test_the_config_can_be_run_where_its_data_are(path):
    config = read(path)
    assert config == read(path, '')
    configuration.check(config)
    assert config.synthesis.images % config.synthesis.batch_size == 0
    assert config.data.name in ('', *DATA_SETS)  # '': it needs none
    for network in (config.teacher, config.verifier, config.student):
        if network.network:  # a verifier may be left out
            create(network.network, 10, network.width)
    for name, group in (('teacher', config.teacher.training), ('verifier', config.verifier.training)):
        recipe_of(group).check(name)
    recipe_of(config.distillation).check('distillation')
    configuration.inversion_config(config).check(image_shape(config.teacher.network))


@each_config
def test_the_smoke_run_needs_nothing_that_is_not_here(path):
    whole, smoke = read(path), read(path, 'smoke')
    pipeline.check(smoke)
    for part in ('teacher', 'verifier', 'student'):
        assert smoke[part].network == whole[part].network
    assert smoke.synthesis.method == whole.synthesis.method
    assert smoke.synthesis.images <= 100
    assert max(group.updates for group in (smoke.teacher.training, smoke.verifier.training, smoke.distillation)) <= 50


@each_config
def test_an_argument_that_it_does_not_know_is_refused(path):
    others = 'pictures, paper|fast|short|mixup|twos|digits|10, 20|71'
    with pytest.raises(ValueError, match=rf"knows the (argument|arguments ({others}) and) smoke, not 'smok'"):
        read(path, 'smok')


@pytest.mark.parametrize(('argument', 'preset'), [('pictures', 'cifar10_crop'), ('paper', 'cifar10_paper')])
def test_pictures_are_made_with_a_preset_as_it_is(argument, preset):
    config = read(ROOT / 'configs' / 'cifar10_resnet20.py', argument)
    configuration.check(config)
    assert configuration.inversion_config(config) == PRESETS[preset]
    assert config.synthesis.images == config.synthesis.batch_size == 256


@pytest.mark.parametrize(('config', 'preset'), [('digits:fast', 'digits_fast'), ('cifar10_resnet20:', 'cifar10_fast')])
def test_students_learn_from_the_fast_preset(config, preset):
    name, argument = config.split(':')
    fast = read(ROOT / 'configs' / f'{name}.py', argument)
    configuration.check(fast)
    assert configuration.inversion_config(fast) == PRESETS[preset]


@each_config
def test_the_docstring_tells_the_command(path):
    told = ast.get_docstring(ast.parse(path.read_text())) or ''
    assert f'python -m dvinv.main --config configs/{path.name} --workdir runs/{path.stem}' in told


def test_a_smoke_run_of_pictures_ends_with_a_report(command, tmp_path):
    """Nearly all of its time goes into compiling: a small verifier, instead of a ResNet-32, spares a fifth of it."""
    run, small = tmp_path / 'run', '--config.verifier.network=small_convnet'
    status, _, err = command('--workdir', run, small, config='configs/cifar10_resnet20.py:smoke')
    assert status == 0, err
    assert (run / 'report.html').exists()
    results = json.loads((run / 'results.json').read_text())
    assert set(results) == set(NAMES)
    for task, names in NAMES.items():
        assert names <= set(results[task])
    assert results['distillation']['hinted_layers'] == 19
