"""Several verifiers: what each recognises, in figures; what is told of them wrongly is refused."""

import dataclasses
from unittest import mock

import ml_collections
import numpy as np
import pytest
from smoke import smoke_config, smoke_run
from tiny import IMAGE_SHAPE, saved, tiny_teacher

from dvinv import evaluation
from dvinv.config import DataSettings, parse
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import accuracy, logits_of
from dvinv.networks import load_classifier
from dvinv.pipeline import tasks as pipeline
from dvinv.report.page import quality_table
from dvinv.runtime.errors import DvinvError
from dvinv.teacher import task as teacher
from dvinv.teacher.networks import load_more_verifiers, print_pixels, refuse_chance, validate_judge


@pytest.fixture
def entry(tmp_path) -> dict:
    """An item of `config.verifiers` that fits the tiny teacher; the config's own is a small_resnet."""
    return {'network': 'small_convnet', 'weights': saved(tmp_path / 'small_convnet.safetensors')}


def config_of(*verifiers):
    return parse(smoke_config(verifier__network='small_resnet', verifiers=verifiers)).verifiers


@pytest.mark.parametrize('kind', [dict, ml_collections.ConfigDict])
def test_verifiers_go_by_the_name_of_their_network(entry, kind):
    others = load_more_verifiers(config_of(kind(entry)), tiny_teacher())
    assert list(others) == ['small_convnet']
    images = np.random.default_rng(0).integers(0, 256, (9, *IMAGE_SHAPE), dtype=np.uint8)
    networks = others['small_convnet'], load_classifier(entry['weights'])
    np.testing.assert_array_equal(*(network.apply_fn(network.variables, network.normalise(images)) for network in networks))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'weigths': 'x'}, r"no field 'verifiers\[0\]\.weigths'; did you mean 'verifiers\[0\]\.weights'"),
        ({'weights': ''}, r"verifiers\[0\]\.weights is ''; name a network and its weights file"),
        ({'weights': 5}, r'verifiers\[0\]\.weights is 5; it must be of the type str'),
        ({'network': ''}, r"verifiers\[0\]\.network is ''; name a network"),
        ({'network': 'judge', 'weights': 'x.npz'}, r'The weights file x\.npz is not there'),
        ({'network': 'vgg11_bn'}, r'holds a small_convnet, but verifiers\[0\]\.network is vgg11_bn\.'),
        ({'network': 'small_resnet'}, r'verifiers\[0\]\.network is small_resnet, as for another verifier'),
        ({'weights': 'none.safetensors'}, r'none\.safetensors is not there'),
        ({'width': 'wide'}, r"verifiers\[0\]\.width is 'wide'; it must be of the type float"),
        ({'mean': 0.5}, r'verifiers\[0\]\.mean is 0\.5; it must be a tuple'),
        ({'std': ('a', 'b')}, r"verifiers\[0\]\.std\[0\] is 'a'; it must be of the type float"),
        ({'std': (0.5, 0.0)}, r'verifiers\[0\]\.std is \(0\.5, 0\.0\); every standard deviation must be above 0'),
    ],
)
def test_a_verifier_that_is_told_wrongly_is_refused(entry, change, words):
    with pytest.raises(DvinvError, match=words):
        load_more_verifiers(config_of(entry | change), tiny_teacher())


@pytest.mark.parametrize(
    ('other', 'words'),
    [
        ({'num_classes': 5}, r'The verifier small_convnet knows 5 classes, but the teacher knows 3 classes; give verifiers'),
        ({'image_shape': (8, 8, 1)}, r'verifiers\[0\]\.mean is \(0\.5,\) .*; each must be 2 numbers'),
        ({'image_shape': (9, 8, 2)}, r'The verifier small_convnet takes images of \(9, 8, 2\), but the teacher'),
    ],
)
def test_a_verifier_unlike_the_teacher_is_refused(entry, tmp_path, other, words):
    with pytest.raises(DvinvError, match=words):
        load_more_verifiers(config_of(entry | {'weights': saved(tmp_path / 'other.safetensors', **other)}), tiny_teacher())


@pytest.mark.parametrize(
    ('share', 'count', 'field', 'refused', 'said'),
    [
        (0.33, 100, 'verifier', True, False),
        (0.0, 5000, 'verifier', True, False),
        (0.34, 5000, 'verifier', False, False),
        (None, 0, 'verifier', False, False),
        (0.2, 99, 'verifier', False, True),
        (0.2, 5000, '', False, True),
    ],
)
def test_a_network_that_recognises_no_more_than_chance_is_named(share, count, field, refused, said, capsys):
    """A network of three classes."""
    if refused:
        with pytest.raises(
            DvinvError, match=r'^The verifier x recognises 0\.\d+ of .* chance would 0\.333 .*verifier\.mean'
        ):
            refuse_chance(share, count, tiny_teacher(), 'The verifier x', field, 'leave it out')
    else:
        refuse_chance(share, count, tiny_teacher(), 'The verifier x', field, 'leave it out')
    assert ('dvinv: The verifier x recognises' in capsys.readouterr().err) == said


def test_the_task_teacher_refuses_a_verifier_that_recognises_nothing(tmp_path, monkeypatch):
    """Before the teacher is trained."""
    monkeypatch.setattr(teacher, '_train', None)
    monkeypatch.setattr(teacher, 'test_accuracy', lambda *_: 0.1)
    weights = saved(tmp_path / 'verifier.safetensors', 'small_convnet', 10, (8, 8, 1))
    config = smoke_config(verifier__weights=weights, verifier__width=0.125, tasks=('teacher',))
    sentence = r'^The verifier small_convnet recognises 0\.100 of 360 real images'
    with pytest.raises(DvinvError, match=sentence):
        pipeline.run(config, tmp_path / 'run')


def test_pixels_that_no_file_tells_are_said(tmp_path, capsys):
    own, group = saved(tmp_path / 'own.safetensors'), {'network': 'small_convnet', 'mean': (), 'std': ()}
    np.savez(tmp_path / 'published.npz', x=0)
    for weights, mean in ((own, ()), (str(tmp_path / 'published.npz'), (0.4, 0.6))):
        print_pixels(ml_collections.ConfigDict({**group, 'weights': weights, 'mean': mean, 'std': mean}), 'verifier', None)
    assert capsys.readouterr().err == ''
    print_pixels(
        ml_collections.ConfigDict({**group, 'weights': str(tmp_path / 'published.npz')}), 'verifier', tiny_teacher()
    )
    assert 'normalised by mean (0.4, 0.6) and std (0.2, 0.3) (verifier.mean and' in capsys.readouterr().err


@pytest.mark.slow
def test_a_published_verifier_beside_a_teacher_of_raw_pixels(real_data):
    """The teacher takes 0 to 255; the ResNet-32 takes what it was trained with."""
    run = smoke_run(
        teacher__factory='factories:raw_pixels',
        data__name='',
        verifier__network='resnet32',
        verifier__width=1.0,
        verifier__weights=str(real_data / 'cifar10_resnet32.npz'),
    )
    verifier = run.verifier
    assert (verifier.mean, verifier.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    test = load_real(DataSettings('npz', str(real_data / 'cifar10_lossless_test1000.npz'))).test
    assert accuracy(verifier, test.images[:64], test.labels[:64]) > 0.85


@pytest.mark.parametrize(('mean', 'std'), [((0.5,), (0.5, 0.5)), ((0.5, 'a'), (0.5, 0.5)), ((0.5, 0.5), (0.5, 0.0))])
def test_pixels_of_a_verifier_that_are_no_numbers_are_refused(mean, std):
    verifier = dataclasses.replace(tiny_teacher(), mean=mean, std=std)
    with pytest.raises(DvinvError, match=r'^verifier\.mean is .* and verifier\.std .* must be 2 numbers, .* std above 0'):
        validate_judge(tiny_teacher(), verifier, 'verifier', 'verifier', 'leave it out')


def test_two_of_one_name_are_refused(entry):
    with pytest.raises(DvinvError, match=r'verifiers\[1\]\.network is small_convnet, as for another'):
        load_more_verifiers(config_of(entry, entry), tiny_teacher())


def test_others_without_a_first_are_refused(entry):
    with pytest.raises(DvinvError, match=r"verifiers has entries, but verifier\.network is ''"):
        parse(smoke_config(verifier__network='', verifiers=(entry,)))


def test_a_verifier_is_a_dict():
    with pytest.raises(DvinvError, match=r"verifiers\[0\] is 'resnet20=w\.npz'; it must be a dict"):
        load_more_verifiers(config_of('resnet20=w.npz'), tiny_teacher())


@pytest.mark.parametrize('classes', [3, 10])
def test_each_verifier_tells_the_share_that_it_recognises(classes):
    first = tiny_teacher(num_classes=classes)
    other = dataclasses.replace(first, apply_fn=lambda v, x: -first.apply_fn(v, x))  # what the first holds unlikeliest
    images = np.random.default_rng(0).integers(0, 256, (30, *IMAGE_SHAPE), dtype=np.uint8)
    labels = (logits_of(first, images).argmax(1) + (np.arange(30) >= 20)) % classes  # the first knows two thirds

    pool = mock.Mock(ImagePool)
    pool.rows = {'images': images, 'labels': labels}.__getitem__
    of = evaluation.figures_of_sets(first, {'other': other}, {'synthesized': pool}, None)['synthesized']
    shares = pytest.approx(2 / 3), accuracy(other, images, labels)
    assert shares[0] != shares[1]
    assert (of['recognised'], of['verifiers']['other']['recognised']) == shares
    assert (of['recognised_top5'] is None) == (of['verifiers']['other']['recognised_top5'] is None) == (classes == 3)
    table = quality_table({'synthesized': of}, 'first')
    columns = ('first', 'other') if classes == 3 else ('first', 'first, top 5', 'other', 'other, top 5')
    assert table.columns[1 : len(columns) + 1] == columns
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert [shown['first'], shown['other']] == ['66.7%', f'{100 * shares[1]:.1f}%']
