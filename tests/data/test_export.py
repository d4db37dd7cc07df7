"""A pool as other programs read it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dvinv.config import DataSettings
from dvinv.data import export
from dvinv.data.files import read_folders
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.runtime.errors import DvinvError


def pool_of(folder, channels):
    pool, rng = ImagePool(folder, 'a' * 64), np.random.default_rng(0)
    for number in range(2):
        images = rng.integers(0, 256, (6, 5, 4, channels), dtype=np.uint8)
        pool.write(number, images, (np.arange(6) + 6 * number) % 11, np.zeros((6, 11), np.float32), {})
    return pool


@pytest.fixture(params=[1, 3], ids=['grey', 'colour'])
def pool(request, tmp_path):
    return pool_of(tmp_path / 'pool', request.param)


def test_class_folders_hold_the_pixels(pool, tmp_path):
    out = tmp_path / 'out'
    for _ in range(2):  # the second finds all there
        export.main(['--pool', str(pool.folder), '--to', 'folders', '--out', str(out)])
        assert len([*out.rglob('*')]) == 11 + 12
    picture = np.asarray(Image.open(out / '10' / '000001-0004.png'))
    np.testing.assert_array_equal(picture.reshape(5, 4, -1), pool.read(1)['images'][4])
    again = read_folders(DataSettings('folders', path=str(out))).test
    order = np.argsort(pool.rows('labels')[:], kind='stable')
    np.testing.assert_array_equal(again.labels, pool.rows('labels')[order])


def test_tensorflow_datasets_reads_it_without_tensorflow(pool, tmp_path):
    import tensorflow_datasets as tfds

    out = tmp_path / 'out'
    export.main(['--pool', str(pool.folder), '--to', 'tfds', '--out', str(out)])
    source = tfds.builder_from_directory(str(out / 'synthesized' / '1.0.0')).as_data_source('train')
    found = sorted((int(example['label']), example['image'].tobytes()) for example in source)
    labels, images = pool.rows('labels')[:], pool.rows('images')[:]
    assert found == sorted((int(label), image.tobytes()) for label, image in zip(labels, images, strict=True))
    assert 'tensorflow' not in sys.modules
    assert json.loads((out / 'synthesized' / '1.0.0' / 'dataset_info.json').read_text())['fileFormat'] == 'array_record'


@pytest.mark.parametrize('channels', [2, 4, 13])
def test_other_numbers_of_channels(channels, tmp_path, capsys):
    import tensorflow_datasets as tfds

    pool = pool_of(tmp_path / 'pool', channels)
    images, labels = pool.rows('images')[:], pool.rows('labels')[:]
    for kind in ('folders', 'tfds', 'npz'):
        export.main(['--pool', str(pool.folder), '--to', kind, '--out', str(tmp_path / kind)])
    assert '--to npz and --to tfds keep the images as they are' in capsys.readouterr().err
    picture = np.asarray(Image.open(tmp_path / 'folders' / '10' / '000001-0004.png'))
    assert picture.shape == ((5, 8) if channels == 2 else (5, 4, 3))
    source = tfds.builder_from_directory(str(tmp_path / 'tfds' / 'synthesized' / '1.0.0')).as_data_source('train')
    found = sorted((int(example['label']), np.asarray(example['image']).tobytes()) for example in source)
    assert found == sorted((int(label), image.tobytes()) for label, image in zip(labels, images, strict=True))
    test = load_real(DataSettings('npz', str(tmp_path / 'npz' / 'images.npz'))).test
    np.testing.assert_array_equal(test.images, images)
    np.testing.assert_array_equal(test.labels, labels)


def test_an_older_export_is_not_taken_for_that_of_a_pool_that_has_grown(pool, tmp_path):
    flags = ['--pool', str(pool.folder), '--to', 'tfds', '--out', str(tmp_path / 'out')]
    for _ in range(2):  # one of as many images is kept
        export.main(flags)
    pool.write(2, pool.read(0)['images'], np.arange(6), np.zeros((6, 11), np.float32), {})
    with pytest.raises(DvinvError, match=r'synthesized/1\.0\.0 has 12 images, and the pool .* has 18; delete that folder'):
        export.main(flags)


def test_a_pool_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DvinvError, match=r'There is no image in the pool .*none'):
        export.main(['--pool', str(tmp_path / 'none'), '--to', 'folders', '--out', str(tmp_path)])
    flags = ['--pool', str(tmp_path / 'none'), '--to', 'tfds', '--out', str(tmp_path)]
    run = subprocess.run([sys.executable, '-m', 'dvinv.data.export', *flags], capture_output=True, text=True, env=os.environ)
    assert (run.returncode, run.stderr.splitlines()[-1][:36]) == (1, 'dvinv: There is no image in the pool')
