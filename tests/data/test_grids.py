"""Picture grids: a row a class, pixels as they are, about as wide as a page."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from tiny import numbered

from dvinv.data.export import class_grid, png_data_uri, shown_classes


@pytest.mark.parametrize('channels', [1, 3])
def test_a_row_is_a_class_and_columns_keep_their_order(channels):
    images, labels = numbered([7, 2, 7, 2, 7], channels)
    grid = class_grid(images, labels, per_class=2, gap=3, width=43)
    assert grid.size == (43, 43)  # 2 cells of 4 px, grown 5 times, and a gap of 3
    pixels = np.asarray(grid)
    assert pixels.shape[-1] == channels + 1
    for row, column, value in [(0, 0, 2), (0, 1, 4), (1, 0, 1), (1, 1, 3)]:
        cell = pixels[23 * row : 23 * row + 20, 23 * column : 23 * column + 20]
        assert np.all(cell[..., :-1] == value)
        assert np.all(cell[..., -1] == 255)
    assert np.all(pixels[20:23, :, -1] == 0)
    assert np.all(pixels[:, 20:23, -1] == 0)


def test_pixels_of_an_image_are_neither_flipped_nor_smoothed():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1) * 40
    pixels = np.asarray(class_grid(image, np.zeros(1, int), per_class=1, width=12))
    np.testing.assert_array_equal(pixels[..., 0], np.kron(image[0, ..., 0], np.ones((4, 4), np.uint8)))


def test_colours_keep_their_channels():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 1] = (10, 20, 30)
    grid = class_grid(image, np.zeros(1, int), per_class=1, width=2)
    assert grid.getpixel((1, 0)) == (10, 20, 30, 255)


@pytest.mark.parametrize('channels', [2, 4, 13])
def test_other_numbers_of_channels_are_shown(channels):
    image = np.arange(channels, dtype=np.uint8) * 10 + np.array([[[0]], [[100]]], np.uint8)  # [2, 1, C]
    grid = np.asarray(class_grid(image[None], np.zeros(1, int), per_class=1, width=2 if channels == 2 else 1))
    if channels == 2:  # side by side, in grey
        np.testing.assert_array_equal(grid[..., 0], [[0, 10], [100, 110]])
    else:
        np.testing.assert_array_equal(grid[:, 0, :3], [[0, 10, 20], [100, 110, 120]])
    assert np.all(grid[..., -1] == 255)


def test_a_class_with_too_few_images_leaves_its_cells_empty():
    images, labels = numbered([0, 0, 1])
    pixels = np.asarray(class_grid(images, labels, per_class=2, gap=0, width=8))
    assert np.all(pixels[:4, :, 1] == 255)
    assert np.all(pixels[4:, :4, 1] == 255)
    assert np.all(pixels[4:, 4:, 1] == 0)


@pytest.mark.parametrize(('size', 'per_class'), [(8, 10), (28, 10), (32, 8), (224, 10), (512, 5)])
def test_grids_are_about_as_wide_as_a_page(size, per_class):
    images = np.zeros((per_class, size, size, 3), np.uint8)
    assert 700 <= class_grid(images, np.zeros(per_class, int), per_class).width <= 1000


def test_many_classes_are_limited_to_evenly_spaced_rows():
    labels = np.arange(1000)[::-1]
    assert shown_classes(labels, 4) == [0, 333, 666, 999]
    images = np.zeros((1000, 2, 2, 1), np.uint8)
    assert class_grid(images, labels, 1, max_classes=4, gap=1, width=2).size == (2, 4 * 2 + 3)


@pytest.mark.parametrize(
    ('images', 'labels'),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int)),
        (np.zeros((2, 4, 4, 0), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int)),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int)),
    ],
)
def test_what_is_no_grid_is_refused(images, labels):
    with pytest.raises(ValueError, match=r'\d'):
        class_grid(images, labels, 1)


def test_a_data_uri_decodes_to_the_same_pixels():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    grid = class_grid(images, np.arange(4), 1, width=5)
    head, data = png_data_uri(grid).split(',')
    assert head == 'data:image/png;base64'
    back = Image.open(io.BytesIO(base64.b64decode(data)))
    assert back.mode == grid.mode
    np.testing.assert_array_equal(np.asarray(back), np.asarray(grid))
