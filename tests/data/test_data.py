"""Real data by name: the digits' splits are those that the figures of the README are told of, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dvinv.config import DataSettings
from dvinv.data.dataset import Split
from dvinv.data.real import Datasets, load_real
from dvinv.runtime.errors import DvinvError

DIGITS, VALIDATION = DataSettings('digits'), DataSettings('digits', validation=True)


def keys(split):
    """Each image with its label, as bytes."""
    return [image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True)]


@pytest.mark.parametrize(('source', 'sizes'), [(DIGITS, (1437, 360)), (VALIDATION, (1149, 288))])
def test_sizes_shapes_and_types(source, sizes):
    data = load_real(source)
    assert (len(data.train.labels), len(data.test.labels)) == sizes
    assert data.image_shape == (8, 8, 1)
    assert data.num_classes == 10
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.shape == (len(split.labels), 8, 8, 1)


def test_pixels_fill_the_whole_range_in_17_levels():
    levels = np.unique(load_real(DIGITS).train.images)
    assert len(levels) == 17
    assert (levels[0], levels[-1]) == (0, 255)


@pytest.mark.parametrize('source', [DIGITS, VALIDATION])
def test_every_class_has_its_share_of_both_parts(source):
    data = load_real(source)
    shares = [np.bincount(split.labels, minlength=10) / len(split.labels) for split in (data.train, data.test)]
    np.testing.assert_allclose(*shares, atol=0.004)


def test_the_split_is_always_the_same():
    first = load_real(DIGITS)
    np.random.seed(3)
    second = load_real(DIGITS)
    assert second is not first
    assert keys(first.test) == keys(second.test)
    assert keys(first.train) == keys(second.train)
    assert first.test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_train_and_test_are_all_digits_once():
    from sklearn.datasets import load_digits

    data = load_real(DIGITS)
    assert sorted(keys(data.train) + keys(data.test)) == sorted(
        np.rint(image * (255 / 16)).astype(np.uint8).tobytes() + bytes([label])
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    )


def test_validation_is_a_part_of_the_training_split():
    whole, data = load_real(DIGITS), load_real(VALIDATION)
    assert sorted(keys(data.train) + keys(data.test)) == sorted(keys(whole.train))
    assert not set(keys(data.test)) & set(keys(whole.test))


def test_the_group_of_a_config_names_a_data_set_and_is_read_once():
    fields = {
        'name': 'digits',
        'path': '',
        'train_path': '',
        'image_size': 0,
        'classes': (),
        'class_names': (),
        'validation': False,
    }
    datasets, settings = Datasets(), DataSettings(**fields)
    data = datasets.load(settings)
    assert datasets.load(dataclasses.replace(settings)) is data
    assert datasets.load(dataclasses.replace(settings, validation=True)) is not data


def test_no_name_is_no_data():
    assert load_real(DataSettings('', path='somewhere', validation=True)) is None


@pytest.mark.parametrize(
    ('source', 'sentence'),
    [
        (DataSettings('mnist'), "There is no data set 'mnist'; choose one of cifar10, cifar100, digits, folders, npz"),
        (DataSettings('digits', path='a'), "data.path is 'a', but the data set 'digits' takes none"),
        (DataSettings('digits', train_path='b'), "data.train_path is 'b', but the data set 'digits' takes none"),
        (DataSettings('cifar10', train_path='b'), "data.train_path is 'b', but the data set 'cifar10' takes none"),
        (DataSettings('cifar100', image_size=16), "data.image_size is 16, but the data set 'cifar100' takes none"),
        (DataSettings('npz'), "data.path is ''; give the path of the test images of the data set 'npz'"),
        (
            DataSettings('folders', train_path='b'),
            "data.path is ''; give the path of the test images of the data set 'folders'",
        ),
        (DataSettings('npz', path='a', image_size=-3), 'data.image_size is -3; it must be at least 0'),
    ],
)
def test_what_cannot_be_meant_is_refused(source, sentence):
    with pytest.raises(DvinvError) as caught:
        load_real(source)
    assert sentence in str(caught.value)


def test_a_fifth_of_too_few_images_is_refused():
    with pytest.raises(DvinvError, match='4 training images of 3 classes are too few to hold out'):
        Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 1, 2])).divided(0.2)


def test_chosen_classes_are_numbered_anew_and_nothing_else_is_there():
    data, whole = load_real(dataclasses.replace(DIGITS, classes=(7, 3))), load_real(DIGITS)
    assert data.num_classes == 2
    for part, all_of_it in ((data.train, whole.train), (data.test, whole.test)):
        for label, digit in enumerate((7, 3)):
            np.testing.assert_array_equal(part.images[part.labels == label], all_of_it.images[all_of_it.labels == digit])
        assert {*part.labels.tolist()} == {0, 1}


@pytest.mark.parametrize('classes', [(3, 10), (3, 3), ('a',)])
def test_classes_that_are_not_there_are_refused(classes):
    with pytest.raises(DvinvError, match=r'data.classes is .*, 0 to 9'):
        load_real(dataclasses.replace(DIGITS, classes=classes))
