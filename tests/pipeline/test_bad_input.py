"""A user's mistake is answered by one sentence, before anything is written; so are damaged files and a full disk."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from smoke import ROOT, flip, lasting, smoke_config
from tiny import saved

from dvinv import main
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime.errors import DvinvError


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != '.lock'}


def refusal(workdir, **changes):
    """The sentence that a changed smoke config is refused with; nothing may be written."""
    before = contents(workdir) if workdir.exists() else None
    with pytest.raises(DvinvError) as caught:
        pipeline.run(smoke_config(**changes), workdir)
    assert (contents(workdir) if workdir.exists() else None) == before
    message = str(caught.value)
    assert '\n' not in message
    assert message.endswith('.')
    return message


def check_told(answer, *words):
    """A process answered with a last line that holds all `words`, and with no traceback."""
    status, out, err = answer
    assert status == 1
    assert out == ''
    last = err.splitlines()[-1]
    assert last.startswith('dvinv: ')
    assert all(word in last for word in words), last
    assert 'Traceback' not in err
    return err


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


# The command line


@pytest.fixture
def parse(monkeypatch):
    """The command line's answer to flags, without a process."""

    def parse(*argv):
        monkeypatch.setattr(sys, 'argv', ['dvinv', *argv])  # ml_collections looks there for what overrides the config
        try:
            with pytest.raises(DvinvError) as caught:
                main._parse(sys.argv)
        finally:
            for name in [name for name in flags.FLAGS if name.startswith('config.')]:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        message = str(caught.value)
        assert '\n' not in message
        return message

    return parse


SMOKE = ('--config', 'configs/digits.py:smoke')
OWN = ('--config', 'tests/own_config.py')


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # ml_collections reads config files by it
@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (('--workdir', 'w', *SMOKE, '--config.synthesis.imagse=3'), ["no field 'imagse'; did you mean 'images'?"]),
        (('--workdir', 'w', *SMOKE, '--config.sede=3'), ["no field 'sede'; did you mean 'seed'?"]),
        (('--workdir', 'w', *SMOKE, '--config.checkpoint_evry=3'), ['did you mean config.logging.checkpoint_every?']),
        (('--workdir', 'w', *SMOKE, '--config.foo=3'), ["The config has no field 'foo' (--helpfull lists all fields)."]),
        (('--workdir', 'w', *SMOKE, '--config.pruning.left=.5'), ["no field 'left'; it is now called pruning.target_ratio"]),
        (('--workdir', 'w', *SMOKE, '--config.seed=first'), ['--config.seed=first', 'int']),
        (('--workdir', 'w', *SMOKE, '--config.teacher.training.learning_rate=high'), ['learning_rate=high', 'float']),
        (('--workdir', 'w', *SMOKE, '--config.synthesis.stages[0].iterations=x'), ['stages[0].iterations=x', 'int']),
        (('--workdir', 'w', *SMOKE, '--config.synthesis.stages[4].iterations=5'), ['beyond the end of a tuple']),
        (
            ('--workdir', 'w', *OWN, '--config.synthesis.stages[0].iterations=5'),
            ['give all of them', "default_config('32px')"],
        ),
        (SMOKE, ['--workdir is missing']),
        (
            (*SMOKE, '--record_moments', 'no/m.safetensors'),
            ["'no/m.safetensors', but there is no such folder"],
        ),
        ((*SMOKE, '--record_moments', 'm.safetensors', '--plan'), ['leave out --plan and --seeds']),
        (('--workdir', 'w', *SMOKE, '--seeds', '-1'), ['--seeds is -1', 'at least 1']),
        (('--workdir', 'w', *SMOKE, '--sedes', '3'), ["Unknown command line flag 'sedes'", 'Did you mean: seeds']),
        (('--workdir', 'w', *SMOKE, 'teacher'), ["argument 'teacher'", 'flags start with --']),
        (('--workdir', 'w'), ['--config names no config file']),
        (
            ('--workdir', 'w', '--config', 'configs/nothere.py'),
            ["file 'configs/nothere.py'; configs/ has cifar"],
        ),
        (('--workdir', 'w', '--config', 'configs/digit.py'), ['did you mean configs/digits.py? configs/ has cifar']),
        (('--workdir', 'w', '--config=resnet20'), ["no config file 'resnet20'; did you mean configs/cifar10_resnet20"]),
        (('--workdir', 'w', '--config', 'digits:smoke'), ["no config file 'digits'; did you mean configs/digits.py?"]),
        (('--workdir', 'w', '--config', 'README.md'), ["no config file 'README.md'"]),
        (('--workdir', 'w', '--config', 'dvinv/evaluation.py'), ['dvinv/evaluation.py is no config file', 'get_config']),
        (('--workdir', 'w', *SMOKE, '--config.synthesis.stages.0.noise=5'), ['--config.synthesis.stages[0].noise=5']),
        (('--workdir', 'w', *SMOKE, '--config.verifiers.0=5'), ['in brackets, from 0: --config.verifiers[0]=5']),
        (('--workdir', 'w', *SMOKE, '--config.synthesis.stages.noise=5'), ['of which item', 'stages[0].iterations=5']),
        (('--workdir', 'w', *SMOKE, '--config.synthesis.=5'), ["Could not parse 'synthesis.'"]),
        (('--workdir', 'w', '--config', 'configs/digits.py:smok'), ["knows the arguments fast and smoke, not 'smok'"]),
    ],
)
def test_a_mistyped_command_is_told(parse, argv, words):
    message = parse(*argv)
    assert all(word in message for word in words), message
    assert 'Errno' not in message
    assert '\\' not in message


@pytest.mark.parametrize('joined', [False, True])
def test_config_files_of_dvinv_are_found_from_any_folder(tmp_path, monkeypatch, joined):
    monkeypatch.chdir(tmp_path)
    argv = ['dvinv', '--config=configs/digits.py:smoke'] if joined else ['dvinv', '--config', 'configs/digits.py:smoke']
    main._find_config_file(argv)
    assert argv[-1] == f'{"--config=" if joined else ""}{ROOT / "configs" / "digits.py"}:smoke'
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'digits.py').write_text('def get_config(arg): ...')  # a user's own comes first
    argv = ['dvinv', '--config=configs/digits.py:smoke']
    main._find_config_file(argv)
    assert argv[-1] == '--config=configs/digits.py:smoke'


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
def test_a_config_file_that_fails_is_told(parse, tmp_path):
    (tmp_path / 'config.py').write_text("def get_config(): return open('/no/such/file')")
    words = "The config file fails: No such file or directory: '/no/such/file'"
    assert parse('--workdir', 'w', '--config', str(tmp_path / 'config.py')).startswith(words)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize(
    ('line', 'sentence'),
    [
        ('config.synthesis.imagse = 3', "the config has no field 'imagse'; did you mean 'images'? ("),
        ('config.distillation.update(updats=3)', "the config has no field 'updats'; did you mean 'updates'? ("),
        ('config.teacher.training.fo = 3', "the config has no field 'fo' (--helpfull lists"),
        ('config.seed = config.synthesis.image', "the config has no field 'image'; did you mean 'images'? ("),
        ('config.seed = pathlib.Pth', "module 'pathlib' has no attribute 'Pth'"),
    ],
)
def test_a_typo_in_a_config_file_is_told_with_its_line(parse, tmp_path, line, sentence):
    path = tmp_path / 'config.py'
    begin = 'import pathlib\nfrom dvinv.config import default_config\ndef get_config():\n    config = default_config()\n'
    path.write_text(f'{begin}    {line}\n    return config\n')
    assert parse('--workdir', 'w', '--config', str(path)).startswith(f'{path}, line 5, `{line}`: {sentence}')


def test_an_unknown_key_ends_the_process_with_one_line(command, tmp_path):
    answer = command('--workdir', tmp_path / 'run', '--config.synthesis.imagse=3')
    assert check_told(answer, 'imagse', "did you mean 'images'").count('\n') == 2  # a line of versions comes first
    assert not (tmp_path / 'run').exists()


# Settings that cannot be run

QUANTIZED = {'tasks': ('teacher', 'synthesis', 'quantization')}
ADAPTIVE = {
    'synthesis__method': 'adaptive',
    'synthesis__batches_per_round': 1,
    'synthesis__weights__competition': 1.0,
    'distillation__updates_per_round': 5,
}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'tasks': ('teacher', 'synthesise')}, ["tasks names 'synthesise'", 'teacher, synthesis, distillation']),
        ({'synthesis__method': 'deepdream'}, ["synthesis.method is 'deepdream'", 'deepinversion']),
        ({'synthesis__controls': ('prior_only', 'real')}, ["synthesis.controls names 'real'", 'noise, prior_only']),
        ({'synthesis__images': 50}, ['synthesis.images is 50', 'multiple of synthesis.batch_size, 20', 'for instance 40']),
        ({'synthesis__images': 0}, ['synthesis.images is 0', 'at least 1']),
        ({'synthesis__batch_size': 1}, ['synthesis.batch_size is 1', 'at least 2']),
        (
            {'synthesis__images': 4, 'synthesis__batch_size': 4},
            ['synthesis.images makes 4 images, fewer than the 10 classes of the', 'synthesis.classes'],
        ),
        (
            {'synthesis__images': 2, 'synthesis__batch_size': 2, 'synthesis__classes': (1, 2, 3)},
            ['fewer than the 3 classes that synthesis.classes names'],
        ),
        (
            {'synthesis__stages': (1, 2)},
            ['synthesis.stages[0] is 1; it must be a dict', "{'iterations': 100, 'learning_rate': 0.1}"],
        ),
        ({'synthesis__stages': ({'iterations': 5},)}, ['synthesis.stages[0] has no learning_rate']),
        (
            {'synthesis__stages': ({'iteration': 5},)},
            ["no field 'synthesis.stages[0].iteration'; did you mean 'synthesis.stages[0].iterations'"],
        ),
        (
            {'synthesis__stages': ({'iterations': '5', 'learning_rate': 1},)},
            ["stages[0].iterations is '5'", 'of the type int'],
        ),
        ({'synthesis__total_variation': 'l3'}, ["synthesis.total_variation is 'l3'", 'l2, l1']),
        ({'synthesis__parameterization': 'clay'}, ["parameterization is 'clay'", 'pixels, fourier']),
        ({'synthesis__contrast': 0.0}, ['contrast is 0', 'above 0']),
        ({'synthesis__iterations_per_dispatch': -1}, ['iterations_per_dispatch is -1', 'at least 0']),
        ({'bn_stats': 'world'}, ["bn_stats is 'world'", 'device, global']),
        (
            {'bn_stats': 'global', 'devices': 8},
            ['synthesis.batch_size is 20', '8 devices do not divide', "bn_stats='global'"],
        ),
        ({'devices': 9}, ['devices is 9', 'JAX sees only 8']),
        ({'devices': -1}, ['devices is -1', '0 for all']),
        ({'pool': '/no/such/pool'}, ["pool is '/no/such/pool'", 'no such folder']),
        ({'data__name': 'mnist'}, ["no data set 'mnist'", 'digits']),
        ({'teacher__network': 'resnet21'}, ["no network 'resnet21'", 'small_resnet']),
        ({'student__network': 'tiny'}, ["no network 'tiny'"]),
        ({'verifier__network': 'judge'}, ["no network 'judge'"]),
        ({'student__width': 0.0}, ['width of small_resnet is 0.0', 'above 0']),
        ({'teacher__weights': '/no/such.safetensors'}, ['/no/such.safetensors is not there']),
        ({'verifier__weights': '/no/such.safetensors'}, ['/no/such.safetensors is not there']),
        ({'verifiers': ({'network': 'resnet20', 'weights': '/no/such.npz'},)}, ['/no/such.npz is not there']),
        ({'verifiers': ('resnet20=w.npz',)}, ["verifiers[0] is 'resnet20=w.npz'", 'must be a dict']),
        ({'teacher__mean': (0.3, 0.3)}, ['2 means', 'one mean and one deviation per channel']),
        ({'teacher__std': (0.0,)}, ['std is (0.0,)', 'above 0']),
        ({'teacher__training__optimizer': 'lion'}, ["teacher.training.optimizer is 'lion'", 'adam, sgd']),
        ({'distillation__updates': 0}, ['distillation.updates is 0', 'at least 1']),
        ({'distillation__temperature': 0.0}, ['distillation.temperature is 0.0', 'above 0']),
        ({'distillation__controls': ('gauss',)}, ["distillation.controls names 'gauss'", 'noise, prior_only, real']),
        ({'seed': -1}, ['seed is -1', 'between 0 and']),
        ({**QUANTIZED, 'quantization__settings': ('w9a8',)}, ["settings names 'w9a8'", '2 to 8 bits']),
        ({**QUANTIZED, 'quantization__settings': ('w8a1', 'int4')}, ["settings names 'w8a1'", 'like w4a8']),
        ({**QUANTIZED, 'quantization__float_layers': ('Dense*', 'fc?')}, ["names 'fc?', which matches no layer", 'Dense_0']),
        ({**QUANTIZED, 'quantization__float_layers': ('*',)}, ['all layers', 'leave some out']),
        ({**QUANTIZED, 'quantization__ranges': 'kl'}, ["ranges is 'kl'", 'minmax, percentile, mse']),
        ({**QUANTIZED, 'quantization__distilled': ('w2a2',)}, ["distilled names 'w2a2'", 'w8a8, w6a6, w4a4']),
        ({**QUANTIZED, 'quantization__images': 0}, ['images is 0', 'controls']),
        ({**QUANTIZED, 'quantization__training__updates': 0}, ['quantization.training.updates is 0', 'at least 1']),
        ({**QUANTIZED, 'teacher__factory': 'factories:scanned'}, ['the operation scan', 'cannot be quantized']),
        (
            {**QUANTIZED, 'teacher__factory': 'factories:standardised'},
            ['conv_general_dilated', 'weights that are computed'],
        ),
        ({'data__path': 'x'}, ["data.path is 'x'", 'leave it out']),
        (
            {'data__name': '', 'teacher__factory': 'factories:own', 'verifier__network': ''},
            ['controls names real, but there are no real training images'],
        ),
        ({'synthesis__method': 'adaptive'}, ["method is 'adaptive'", 'batches_per_round is 0']),
        ({**ADAPTIVE, 'synthesis__weights__competition': 0.0}, ["method is 'adaptive'", 'competition is 0']),
        ({**ADAPTIVE, 'synthesis__batches_per_round': 3}, ['batches_per_round is 3', 'does not divide the 2 batches']),
        ({**ADAPTIVE, 'distillation__updates_per_round': 0}, ['updates_per_round is 0', 'at least 1']),
        ({**ADAPTIVE, 'distillation__updates_per_round': 20}, ['2 rounds of 20 updates', 'the 20 updates']),
        ({'distillation__counts': (20, 60)}, ['counts names 60', 'from 1 to 40']),
        ({'distillation__counts': (20.5,)}, ['counts[0] is 20.5', 'of the type int']),
        ({'teacher__image_shape': (32, 32)}, ['image_shape is (32, 32)', '(height, width, channels)']),
        ({'teacher__image_shape': (9, 8, 1)}, ['image_shape is (9, 8, 1)', 'trained here, on images of (8, 8, 1)']),
        (
            {'student__network': 'vgg11_bn'},
            ['student.network is vgg11_bn', 'cannot take images of 8x8x1', '32x32 or larger'],
        ),
        (
            {'data__name': '', 'distillation__controls': ()},
            ["teacher is to be trained, but data.name is ''", 'teacher.weights'],
        ),
        ({'teacher__network': ''}, ['teacher.network is empty', 'teacher.factory']),
        ({'teacher__mean': ('a',)}, ["teacher.mean[0] is 'a'", 'of the type float']),
        ({'teacher__training__label_smoothing': 3.0}, ['label_smoothing is 3.0', 'below 1']),
        ({'teacher__training__mixup': 0.2}, ['teacher.training.mixup is 0.2', 'for distillation']),
        ({'verifier__training__cutmix': 0.5}, ['verifier.training.cutmix is 0.5', 'for distillation']),
        ({'distillation__cutmix': 1.5}, ['distillation.cutmix is 1.5', 'a probability']),
        ({'distillation__color_jitter': -0.1}, ['distillation.color_jitter is -0.1', 'at least 0']),
        ({'distillation__hint_decay': -1.0}, ['distillation.hint_decay is -1.0', 'at least 0']),
        ({'distillation__resized_crop': 1.5}, ['distillation.resized_crop is 1.5', 'a fraction of the image area']),
        ({'synthesis__classes': (1, 10)}, ['Label 10 is out of range', '0 to 9']),
        ({'synthesis__classes': (1.5,)}, ['synthesis.classes[0] is 1.5', 'of the type int']),
        ({'distillation__milestones': ('x',)}, ["distillation.milestones[0] is 'x'", 'of the type float']),
        ({'distillation__hints': 'blocks'}, ["distillation.hints is 'blocks'", 'auto, layers, stages, none']),
        ({'distillation__hints': 'stages'}, ["distillation.hints is 'stages', but distillation.hint", 'is 0']),
        ({'distillation__graft': 1.5}, ['distillation.graft is 1.5', 'from 0 to 1']),
        ({'distillation__curve_points': -1}, ['distillation.curve_points is -1']),
        ({'distillation__curve_points': 1}, ['distillation.curve_points is 1', 'from 2 to 20']),
        ({'distillation__curve_points': 21}, ['distillation.curve_points is 21', 'from 2 to 20']),
        ({'distillation__hint': -1.0}, ['distillation.hint is -1.0', 'at least 0']),
        (
            {'distillation__hint': 1.0, 'distillation__hints': 'layers', 'teacher__width': 0.25, 'student__width': 0.125},
            ['no BatchNorm layer of the student', 'BatchNorm_0', 'and 4 more)', "distillation.hints='stages'"],
        ),
        ({'distillation__clip_norm': -1.0}, ['distillation.clip_norm is -1.0', 'at least 0']),
        ({'distillation__shift': -1}, ['distillation.shift is -1', 'at least 0']),
        ({'distillation__learning_rate': 0.0}, ['distillation.learning_rate is 0.0', 'above 0']),
        ({'distillation__warmup': 20}, ['distillation.warmup is 20', 'only 20 updates']),
        ({'logging__every': 0}, ['logging.every is 0', 'at least 1']),
        ({'logging__iterations': 0}, ['logging.iterations is 0', 'at least 1']),
        ({'logging__checkpoint_every': 0}, ['logging.checkpoint_every is 0', 'at least 1']),
        ({'logging__checkpoint_every': 7}, ['checkpoint_every is 7', 'multiple of the first']),
        ({'teacher__factory': 'factories:without_batch_norm'}, ['no running statistics', 'moments', 'weights.feature=0']),
        ({'teacher__factory': 'factories:broken'}, ["teacher.factory 'factories:broken'", 'Dense_0/kernel has NaN']),
        ({'teacher__factory': 'factories:probabilities'}, ['Probable returns probabilities', 'leave out the softmax']),
        ({'teacher__factory': 'factories:colour'}, ['teacher takes images of 8x8x3', 'the data set has 8x8x1']),
        ({'teacher__factory': 'factories:five_classes'}, ['the label 9', 'knows 5 classes, 0 to 4']),
        ({'teacher__factory': 'factories:missing'}, ["'factories:missing'", 'cannot be imported']),
        ({'teacher__factory': 'no_such_module:teacher'}, ["'no_such_module:teacher'", 'cannot be imported']),
        ({'teacher__factory': 'factories'}, ["'factories'", "must be 'module:function'"]),
        ({'teacher__factory': 'factories:no_teacher'}, ['returned a dict', 'dvinv.from_linen']),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, changes, words):
    message = refusal(tmp_path / 'run', **changes)
    assert all(word in message for word in words), message


ALONE = {'teacher__factory': 'factories:own', 'pool': '.'}  # a pool that is there


@pytest.mark.parametrize(
    ('tasks', 'changes'),
    [
        (('quantization',), {'distillation__hint': 1.0, 'distillation__hints': 'layers', 'student__network': 'resnet20'}),
        (('quantization',), {'student__network': 'vgg11_bn', 'student__inherit': True}),
        (('quantization',), {'verifier__network': 'resnet20', 'synthesis__classes': (99,)}),
        (('quantization',), {'synthesis__images': 3, 'synthesis__batch_size': 2, 'data__name': ''}),
        (('synthesis',), {'distillation__hint': 1.0, 'distillation__hints': 'layers', 'student__network': 'resnet20'}),
        (('synthesis',), {'synthesis__images': 4, 'synthesis__batch_size': 2, 'synthesis__classes': (99,)}),
    ],
)
def test_what_no_task_needs_is_not_checked(tasks, changes):
    verifier = {'verifier__network': '', **changes} if 'synthesis' in tasks else changes
    pipeline.validated(smoke_config(**ALONE, tasks=tasks, quantization__controls=(), **verifier))


@pytest.mark.parametrize(
    ('field', 'value', 'words'),
    [
        ('resolution', 9, 'resolution is 9, but the images have a height of 8 pixels; choose at most 8'),
        ('resolution', 4, 'resolution is 4, but the network cannot take images of that size: For parameter "kernel"'),
        ('jitter', -1, 'jitter is -1; it must be at least 0'),
        ('learning_rate', -0.1, 'learning_rate is -0.1; it must be at least 0'),
    ],
)
def test_a_bad_stage_is_refused(tmp_path, field, value, words):
    config = smoke_config()
    config.synthesis.stages[0][field] = value
    with pytest.raises(DvinvError, match=re.escape(f'stages[0].{words}')):
        pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def own_file(tmp_path):
    """A file that dvinv wrote: width 0.125, mean and std 0.5."""
    return saved(tmp_path / 'own.safetensors', 'small_resnet', 10, (8, 8, 1))


@pytest.mark.parametrize(
    ('role', 'changes', 'words'),
    [
        ('teacher', {'mean': (0.4,), 'std': (), 'width': 1.0}, 'teacher.mean is (0.4,), but FILE, a file that dvinv'),
        ('teacher', {'mean': (), 'std': (), 'width': 0.25}, 'write teacher.width=0.125, or give other weights'),
        ('verifier', {'mean': (0.4,), 'width': 1.0}, 'verifier.mean is (0.4,), but FILE'),
        ('teacher', {'mean': (0.5,), 'std': (0.5,), 'width': 0.125}, ''),
        ('teacher', {'mean': (), 'std': (), 'width': 1.0}, ''),
        ('verifier', {'width': 1.0}, ''),
    ],
)
def test_what_a_file_tells_of_itself_cannot_be_set_otherwise(own_file, role, changes, words):
    fields = {'network': 'small_resnet', 'weights': own_file, **changes}
    config = smoke_config(**{f'{role}__{name}': value for name, value in fields.items()})
    if not words:
        pipeline.validated(config)
        return
    with pytest.raises(DvinvError, match=re.escape(words.replace('FILE', own_file))):
        pipeline.validated(config)


@pytest.mark.parametrize(
    ('labels', 'words'),
    [
        (range(1, 11), '11 classes by its labels or names, but 1 of them (0) have no training image'),
        ((0, 300), '301 classes by its labels or names, but 299 of them (1, 2, 3, 4, 5, ...) have no training image'),
    ],
)
def test_a_class_without_an_image_is_named(tmp_path, labels, words):
    labels = np.array([*labels])
    np.savez(tmp_path / 'a.npz', x=np.zeros((len(labels), 8, 8), np.uint8), y=labels)
    path = str(tmp_path / 'a.npz')
    sentence = refusal(tmp_path / 'run', data__name='npz', data__path=path, data__train_path=path)
    assert words in sentence
    assert f'the lowest is {labels.min()}, and the highest is {labels.max()}' in sentence


@pytest.mark.parametrize(('classes', 'fits'), [((7, 8, 9), False), ((1, 0), False), ((0, 1, 2), True), ((), True)])
def test_classes_that_are_numbered_anew_are_not_the_teachers(own_file, classes, fits):
    config = smoke_config(teacher__weights=own_file, teacher__mean=(), teacher__std=(), data__classes=classes)
    config.verifier.network, config.teacher.width = '', 1.0
    with contextlib.nullcontext() if fits else pytest.raises(DvinvError, match=r'data.classes names .* numbered again'):
        pipeline.validated(config)


def test_weights_of_another_network_are_refused(finished, tmp_path):
    path = str(finished / 'networks' / 'verifier.safetensors')
    assert 'holds a small_convnet, but teacher.network is small_resnet' in refusal(tmp_path / 'run', teacher__weights=path)


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path):
    message = refusal(tmp_path / 'run', bn_stats='global', devices=8)
    assert 'synthesis.batch_size is 20, which 8 devices do not divide' in message


# What is in the work directory already


def test_a_run_with_another_config_is_left_alone(run):
    message = refusal(run, seed=1, synthesis__images=20)
    assert 'holds a run with another config: seed (0 there, 1 here), synthesis.images (40 there, 20 here)' in message


def damage(path, how):
    if how == 'truncated':
        path.write_bytes(path.read_bytes()[:-7])
    elif path.suffix == '.json':
        path.write_bytes(path.read_bytes().replace(b'{', b'[', 1))
    else:
        flip(path)


@pytest.mark.parametrize('how', ['flipped', 'truncated'])
@pytest.mark.parametrize('name', ['shard-000001.npz', 'shard-000000.json'])
def test_a_damaged_shard_of_a_finished_run_is_named_and_put_aside(run, name, how):
    damage(run / 'pool' / name, how)
    before = contents(run)
    with pytest.raises(DvinvError) as caught:
        pipeline.run(smoke_config(), run)
    assert f'{run / "pool" / name} is damaged' in str(caught.value)
    after = contents(run)
    assert sorted(before.values()) == sorted(after.values())
    moved = before.keys() - after.keys()
    assert moved == {str((run / 'pool' / name).with_suffix(ending)) for ending in ('.npz', '.json')}


@pytest.mark.parametrize('how', ['flipped', 'truncated'])
@pytest.mark.parametrize('name', ['networks/teacher.safetensors', 'config.json', 'results.json'])
def test_a_damaged_file_of_a_finished_run_is_named(run, name, how):
    damage(run / name, how)
    message = refusal(run)
    assert str(run / name) in message
    assert 'damaged' in message


@pytest.mark.parametrize('how', ['flipped', 'truncated'])
def test_a_damaged_checkpoint_is_named(run, how):
    (run / 'networks' / 'teacher.safetensors').unlink()
    path = max((run / 'checkpoints' / 'teacher').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    damage(path, how)
    message = refusal(run)
    assert f'{path} is damaged' in message
    assert f'delete {run / "checkpoints" / "teacher"} to train this network again' in message


# Losses that are not numbers


@pytest.mark.slow
def test_a_training_that_diverges_names_the_update(tmp_path):
    config = smoke_config(tasks=('teacher',), teacher__training__learning_rate=1e30, teacher__training__updates=5)
    with pytest.raises(DvinvError, match=r'^The loss of the teacher is not a finite number at update \d+: lower its'):
        pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'results.json').exists()


# A full disk


def test_a_full_disk_is_told_and_what_was_finished_stays(run, monkeypatch):
    before, replace = lasting(run), os.replace
    (run / 'pool' / 'shard-000001.json').unlink()

    def full(source, target):
        if 'shard' in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(DvinvError, match=r'^The disk is full: .*shard-000001\.npz could not be written\. .*run the same'):
        pipeline.run(smoke_config(), run)
    after = lasting(run)
    after.pop('metrics.jsonl')
    assert after == {name: before[name] for name in before if name not in ('metrics.jsonl', 'pool/shard-000001.json')}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', str(folder)]
    if sys.platform != 'linux' or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a small file system can be mounted by root on Linux only')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


def test_a_run_goes_on_when_the_disk_has_room_again(small_disk, command, finished):
    alone = ("--config.tasks=('teacher',)", '--config.verifier.network=')
    check_told(command('--workdir', small_disk / 'run', *alone), 'The disk is full: ', str(small_disk), 'free some space')
    subprocess.run(['mount', '-o', 'remount,size=64m', str(small_disk)], check=True)
    status, _, err = command('--workdir', small_disk / 'run', *alone)
    assert status == 0, err
    made, expected = ((run / 'networks' / 'teacher.safetensors').read_bytes() for run in (small_disk / 'run', finished))
    assert made == expected


def test_a_disk_without_any_room_is_told(small_disk, tmp_path):
    (small_disk / 'filler').write_bytes(np.zeros(256 * 1024, np.uint8).tobytes())
    with pytest.raises(DvinvError, match='The disk is full: '):
        pipeline.run(smoke_config(), small_disk / 'run')
