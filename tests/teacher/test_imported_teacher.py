"""Published weights and arrays of one's own, from the config to the scores; what does not fit is told beforehand."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from smoke import smoke_config, smoke_run

from dvinv.networks import create
from dvinv.networks.classifier import flatten
from dvinv.networks.naming import find_keys
from dvinv.pipeline import tasks as pipeline
from dvinv.runtime.errors import DvinvError
from dvinv.teacher import networks

sys.path.append(str(Path(__file__).parents[1] / 'golden'))
from drawn import draw_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH = 0.25


def save_weights(path, network='resnet20', num_classes=10, seed=0):
    """A PyTorch state dict of a narrow network."""
    module, image = create(network, num_classes, WIDTH), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    template = flatten(jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), image))
    shapes = {}
    for variable, key in find_keys(template, (), {}).items():
        shape = template[variable].shape
        shapes[key] = {4: lambda s: (s[3], s[2], s[0], s[1]), 2: lambda s: s[::-1], 1: tuple}[len(shape)](shape)
    np.savez(path, **draw_state(shapes, seed))
    return str(path)


def save_images(path, classes=10, count=40):
    """An npz of pictures whose labels are all classes."""
    rng = np.random.default_rng(0)
    labels = np.linspace(0, classes - 1, count).round().astype(np.uint8)
    np.savez(path, x=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), y=labels)
    return str(path)


@pytest.fixture
def fields(tmp_path):
    """The changes that make the smoke config one of published weights and arrays of one's own."""
    return {
        'data__name': 'npz',
        'data__path': save_images(tmp_path / 'test.npz'),
        'data__train_path': save_images(tmp_path / 'train.npz'),
        'teacher__network': 'resnet20',
        'teacher__weights': save_weights(tmp_path / 'resnet20.npz'),
        'verifier__network': 'resnet32',
        'verifier__weights': save_weights(tmp_path / 'resnet32.npz', 'resnet32'),
        'teacher__width': WIDTH,
        'verifier__width': WIDTH,
        'teacher__mean': MEAN,
        'teacher__std': STD,
    }


def refusal(workdir, **changes) -> str:
    with pytest.raises(DvinvError) as told:
        pipeline.run(smoke_config(**changes), workdir)
    assert not workdir.exists()
    return str(told.value)


@pytest.mark.slow
def test_published_weights_are_scored_on_arrays_of_ones_own(fields, tmp_path):
    figures = pipeline.run(smoke_config(**fields, tasks=('teacher',)), tmp_path / 'run')['teacher']
    assert figures['test_images'] == 40
    assert 0 <= figures['test_accuracy'] <= 1
    assert 0 <= figures['verifier_test_accuracy'] <= 1
    assert not (tmp_path / 'run' / 'networks').exists()


def test_labels_beyond_the_teachers_classes_are_refused(fields, tmp_path):
    fields['data__path'] = save_images(tmp_path / 'cifar100.npz', classes=100, count=100)
    message = refusal(tmp_path / 'run', **fields)
    assert 'The data set has the label 99, but the teacher knows 10 classes, 0 to 9' in message


def test_a_verifier_of_other_classes_is_refused(fields, tmp_path):
    fields['verifier__weights'] = save_weights(tmp_path / 'hundred.npz', 'resnet32', 100)
    assert 'The verifier knows 100 classes, but the teacher knows 10 classes' in refusal(tmp_path / 'run', **fields)


@pytest.mark.slow
def test_a_verifier_may_be_normalised_in_its_own_way(fields, tmp_path):
    own = {'verifier__mean': (0.5, 0.4, 0.3), 'verifier__std': (0.1, 0.2, 0.3)}
    for changes, mean, std in (({}, MEAN, STD), (own, *own.values())):
        verifier = smoke_run(**fields, **changes).verifier
        assert (verifier.mean, verifier.std) == (mean, std)
    assert 'verifier.mean is (0.5,)' in refusal(tmp_path / 'run', **fields, verifier__mean=(0.5,))


@pytest.mark.slow
def test_other_verifiers_may_be_normalised_in_their_own_ways(fields, tmp_path):
    pixels = {'mean': (0.5, 0.4, 0.3), 'std': [0.1, 0.2, 0.3]}
    others = [
        {'network': name, 'weights': save_weights(tmp_path / f'{name}.npz', name), 'width': WIDTH, **own}
        for name, own in (('vgg11_bn', {}), ('wrn16_1', pixels))
    ]
    run = smoke_run(**fields, verifiers=tuple(others))
    found = networks.load_more_verifiers(run.settings.verifiers, run.teacher)
    assert {name: (one.mean, one.std) for name, one in found.items()} == {
        'vgg11_bn': (MEAN, STD),
        'wrn16_1': (pixels['mean'], tuple(pixels['std'])),
    }
    others[1]['mean'] = (0.5,)
    assert 'verifiers[1].mean is (0.5,)' in refusal(tmp_path / 'run', **fields, verifiers=tuple(others))


def test_weights_of_another_depth_are_refused(fields, tmp_path):
    fields['teacher__network'] = 'resnet44'
    message = refusal(tmp_path / 'run', **fields)
    assert 'do not fit CifarResNet: they lack layer1.3' in message


def test_weights_that_are_not_there_are_named(fields, tmp_path):
    fields['teacher__weights'] = str(tmp_path / 'nothing.npz')
    assert f'{tmp_path / "nothing.npz"} is not there' in refusal(tmp_path / 'run', **fields)


def test_a_network_to_be_trained_needs_real_training_images(fields, tmp_path):
    fields |= {'data__train_path': '', 'verifier__weights': '', 'distillation__controls': ()}
    message = refusal(tmp_path / 'run', **fields)
    assert "The verifier is to be trained, but data.train_path is ''" in message


def test_the_real_control_needs_real_training_images(fields, tmp_path):
    fields['data__train_path'] = ''
    message = refusal(tmp_path / 'run', **fields)
    assert 'controls names real, but there are no real training images' in message


def test_a_data_set_that_is_not_prepared_tells_the_command(fields, tmp_path):
    fields |= {'data__name': 'cifar10', 'data__path': str(tmp_path), 'data__train_path': ''}
    message = refusal(tmp_path / 'run', **fields)
    assert 'download_and_prepare()' in message
    assert str(tmp_path) in message
