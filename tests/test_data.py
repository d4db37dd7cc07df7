"""Real data: the digits' splits are those that the figures of the README are told of."""

import numpy as np
import pytest

from dvinv.data.real import load_real
from dvinv.errors import DvinvError


def keys(split):
    """Each image with its label, as bytes."""
    return [image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True)]


@pytest.mark.parametrize(('validation', 'sizes'), [(False, (1437, 360)), (True, (1149, 288))])
def test_sizes_shapes_and_types(validation, sizes):
    data = load_real('digits', validation)
    assert (len(data.train.labels), len(data.test.labels)) == sizes
    assert data.image_shape == (8, 8, 1)
    assert data.num_classes == 10
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.shape == (len(split.labels), 8, 8, 1)


def test_pixels_fill_the_whole_range_in_17_levels():
    levels = np.unique(load_real('digits').train.images)
    assert len(levels) == 17
    assert (levels[0], levels[-1]) == (0, 255)


@pytest.mark.parametrize('validation', [False, True])
def test_every_class_has_its_share_of_both_parts(validation):
    data = load_real('digits', validation)
    shares = [np.bincount(split.labels, minlength=10) / len(split.labels) for split in (data.train, data.test)]
    np.testing.assert_allclose(*shares, atol=0.004)


def test_the_split_is_always_the_same():
    np.random.seed(3)
    first, second = load_real('digits'), load_real('digits')
    assert keys(first.test) == keys(second.test)
    assert keys(first.train) == keys(second.train)
    assert first.test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_train_and_test_are_all_digits_once():
    from sklearn.datasets import load_digits

    data = load_real('digits')
    assert sorted(keys(data.train) + keys(data.test)) == sorted(
        np.rint(image * (255 / 16)).astype(np.uint8).tobytes() + bytes([label])
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    )


def test_validation_is_a_part_of_the_training_split():
    whole, data = load_real('digits'), load_real('digits', validation=True)
    assert sorted(keys(data.train) + keys(data.test)) == sorted(keys(whole.train))
    assert not set(keys(data.test)) & set(keys(whole.test))


def test_an_unknown_name_shows_the_choices():
    with pytest.raises(DvinvError, match=r"There is no data set 'mnist'; choose one of .*digits"):
        load_real('mnist')
