"""Real data from files: every layout is read as written, and what is wrong with a file is said in a sentence."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_teacher

from dvinv.config import DataSettings
from dvinv.data import files
from dvinv.data.dataset import RealData, Split
from dvinv.data.files import labels_of, resize
from dvinv.data.real import load_real
from dvinv.evaluation import validate_fits
from dvinv.runtime.errors import DvinvError


def images(count=6, height=8, width=8, channels=3):
    """Smooth pictures, which JPEG hardly changes, all different."""
    ramp = np.add.outer(np.arange(height), np.arange(width))[None, ..., None] * 4
    return (ramp + 12 * np.arange(count)[:, None, None, None] + 30 * np.arange(channels)).astype(np.uint8)


def encoded(pixels, kind='JPEG'):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, kind, quality=95)
    return buffer.getvalue()


def jpegs(*pictures, labels=None, header=b''):
    """The arrays of the JPEG layout; every file begins with `header`."""
    bodies = [encoded(picture).removeprefix(header) for picture in pictures]
    return {
        'header': np.frombuffer(header, np.uint8),
        'jpeg': np.frombuffer(b''.join(bodies), np.uint8),
        'offsets': np.cumsum([0, *map(len, bodies)]).astype(np.uint32),
        'labels': np.arange(len(pictures)) if labels is None else np.array(labels),
    }


def exact(count=6, **more):
    return {'x': images(count), 'y': np.arange(count, dtype=np.uint8) % 3, **more}


def save(path, arrays):
    np.savez(path, **arrays)
    return str(path)


def write_folders(root, classes=('ant', 'bee'), kind='PNG', suffix='.png', height=8, width=8):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, picture in enumerate(images(3, height, width)):
            (root / name / f'{i}{suffix}').write_bytes(encoded(picture + 40 * number, kind))
    return str(root)


def refusal(*source, **fields):
    with pytest.raises(DvinvError) as caught:
        load_real(DataSettings(*source, **fields))
    return str(caught.value)


# npz


@pytest.mark.parametrize('names', [('x', 'y'), ('images', 'labels'), ('images', 'y')])
@pytest.mark.parametrize('channels', [0, 1, 3, 4])
def test_exact_pixels_are_read_as_written(tmp_path, names, channels):
    pixels, labels = images(channels=channels or 1), np.array([0, 2, 1, 1, 0, 2])
    path = save(tmp_path / 'a.npz', dict(zip(names, (pixels if channels else pixels[..., 0], labels), strict=True)))
    data = load_real(DataSettings('npz', path))
    assert data.train is None
    np.testing.assert_array_equal(data.test.images, pixels)
    np.testing.assert_array_equal(data.test.labels, labels)
    assert (data.test.images.dtype, data.test.labels.dtype) == (np.uint8, np.int32)
    assert (data.num_classes, data.image_shape) == (3, (8, 8, channels or 1))


GREY, LABELS = images(channels=1), np.array([0, 2, 1, 1, 0, 2])
READABLE = {
    'shares of white': ((images() / 255).astype(np.float32), LABELS, images()),
    'halves': ((images() / 255).astype(np.float16), LABELS, images()),
    'levels as floats': (images() + 0.25, LABELS, images()),
    'levels as integers': (images().astype(np.int64), LABELS, images()),
    'truth': (images() > 99, LABELS, (images() > 99) * np.uint8(255)),
    'channels first': (np.moveaxis(images(), -1, 1), LABELS, images()),
    'grey channels first': (np.moveaxis(GREY, -1, 1) / 255, LABELS, GREY),
    'grey without channels': (GREY[..., 0] / 255, LABELS, GREY),
    'many channels': (images(channels=13), LABELS, images(channels=13)),
    'a column of labels': (images(), LABELS[:, None], images()),
    'labels as floats': (images(), LABELS * 1.0, images()),
    'one-hot labels': (images(), np.eye(3)[LABELS], images()),
}


@pytest.mark.parametrize('case', READABLE)
def test_other_types_and_layouts_are_read_where_they_can_be_meant_in_one_way(tmp_path, case):
    x, y, expected = READABLE[case]
    data = load_real(DataSettings('npz', save(tmp_path / 'a.npz', {'x': x, 'y': y})))
    np.testing.assert_array_equal(data.test.images, expected)
    assert (data.test.images.dtype, data.test.labels.tolist(), data.num_classes) == (np.uint8, LABELS.tolist(), 3)


def test_one_hot_labels_tell_the_number_of_classes(tmp_path):
    path = save(tmp_path / 'a.npz', {'x': images(), 'y': np.eye(7)[LABELS]})
    assert load_real(DataSettings('npz', path)).num_classes == 7


@pytest.mark.parametrize('channels', [1, 3])
def test_jpegs_are_decoded_in_order(tmp_path, channels):
    pixels = images(channels=channels)
    arrays = jpegs(*pixels, labels=[2, 0, 1, 1, 0, 2])
    del arrays['header']
    data = load_real(DataSettings('npz', save(tmp_path / 'a.npz', arrays)))
    assert data.test.images.shape == pixels.shape
    assert np.abs(data.test.images.astype(int) - pixels).mean() < 4  # neighbours differ by 12
    assert data.test.labels.tolist() == [2, 0, 1, 1, 0, 2]


def test_a_header_begins_every_file(tmp_path):
    whole, pixels = [encoded(picture) for picture in images()], images()
    shared = next(i for i, some in enumerate(zip(*whole, strict=False)) if len(set(some)) > 1)
    arrays = {**jpegs(*pixels, header=whole[0][:shared]), 'wnids': np.array(['another array'])}
    assert len(arrays['header']) > 300  # the tables, at least
    assert len(arrays['jpeg']) == sum(map(len, whole)) - 6 * shared
    data = load_real(DataSettings('npz', save(tmp_path / 'a.npz', arrays)))
    plain = load_real(DataSettings('npz', save(tmp_path / 'b.npz', jpegs(*pixels))))
    np.testing.assert_array_equal(data.test.images, plain.test.images)


def test_one_coloured_picture_makes_all_rgb(tmp_path):
    path = save(tmp_path / 'a.npz', jpegs(images(channels=1)[0], images()[0]))
    grey, coloured = load_real(DataSettings('npz', path)).test.images
    assert grey.shape == (8, 8, 3)
    assert np.ptp(grey, axis=-1).max() == 0 < np.ptp(coloured, axis=-1).min()


def test_classes_are_those_named_or_those_of_both_files(tmp_path):
    named = save(tmp_path / 'named.npz', exact(class_names=np.array(list('abcde'))))
    plain = save(tmp_path / 'plain.npz', exact())
    more = save(tmp_path / 'more.npz', {**exact(), 'y': np.array([0, 1, 2, 3, 6, 0])})
    assert load_real(DataSettings('npz', named)).num_classes == 5
    assert load_real(DataSettings('npz', plain, named)).num_classes == 5
    assert load_real(DataSettings('npz', plain)).num_classes == 3
    assert (
        load_real(DataSettings('npz', named)).class_names
        == load_real(DataSettings('npz', plain, named)).class_names
        == tuple('abcde')
    )
    assert load_real(DataSettings('npz', named, classes=(2, 0))).class_names == ('c', 'a')
    assert load_real(DataSettings('npz', plain)).class_names == ()
    assert load_real(DataSettings('npz', plain, more)).num_classes == 7
    sentence = f'The class_names of {named} are those of the labels 0 to 4, but the highest label is 6.'
    assert refusal('npz', named, more) == refusal('npz', more, named) == sentence
    other = save(tmp_path / 'other.npz', exact(class_names=np.array(list('abced'))))
    assert 'have different class_names' in refusal('npz', named, other)


def test_validation_holds_out_a_fifth_of_the_training_file(tmp_path):
    test, train = save(tmp_path / 'test.npz', exact(3)), save(tmp_path / 'train.npz', exact(30))
    assert len(load_real(DataSettings('npz', test, train)).test.labels) == 3
    data = load_real(DataSettings('npz', test, train, validation=True))
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert 'data.train_path names none' in refusal('npz', test, validation=True)


def test_training_images_must_have_the_shape_of_those_scored(tmp_path):
    test, train = save(tmp_path / 'a.npz', exact()), save(tmp_path / 'b.npz', {**exact(), 'x': images(width=9)})
    assert 'Training images are 8x9x3 (height x width x channels), but test images are 8x8x3' in refusal('npz', test, train)
    assert load_real(DataSettings('npz', test, train, image_size=8)).train.images.shape == (6, 8, 8, 3)


BAD_ARRAYS = {
    'other arrays': (
        {'a': np.zeros(1), 'x': images()},
        'holds 2 arrays (a, x); it must hold images (or x) and labels (or y)',
    ),
    'many arrays': ({name: np.zeros(1) for name in 'abcdefg'}, 'holds 7 arrays (a, b, c, d, e, ...)'),
    'no offsets': ({'jpeg': np.zeros(1, np.uint8), 'labels': np.zeros(1, int)}, 'or jpeg, offsets and labels'),
    'normalised images': (exact(x=images() / 128 - 1), 'The images of FILE are float64 from -1 to '),
    'no numbers': (exact(x=images() * np.nan), 'The images of FILE are float64 from nan to nan; they must be pixels'),
    '16-bit images': (exact(x=images().astype(np.uint16) * 257), 'they must be pixels, before any normalisation'),
    'few grey levels': (exact(x=images() % 17 * 1.0), 'are float64 from 0 to 16, so their scale is unknown; save them as'),
    'two integers': (exact(x=(images() > 50).astype(int)), 'are int64 from 0 to 1, so their scale is unknown'),
    'words for images': (exact(x=images().astype(str)), 'it must be numbers [N, H, W], [N, H, W, C] or [N, C, H, W]'),
    'flat images': (exact(x=images().reshape(6, -1)), 'is uint8 [6, 192]; it must be numbers [N, H, W], [N, H, W, C] or'),
    'broken labels': (exact(y=np.arange(6) / 2), 'The labels of FILE are float64 and not all integers'),
    'soft labels': (exact(y=np.full((6, 3), 1 / 3)), 'The labels of FILE are float64 [6, 3], but not one-hot'),
    'words for labels': (exact(y=np.array(list('abcabc'))), 'The array y of FILE is <U1 [6]; it must be whole numbers [N]'),
    'no labels': ({'x': images()}, 'holds 1 arrays (x); it must hold images (or x) and labels (or y)'),
    'numbers for names': (exact(class_names=np.arange(3)), 'is int64 [3]; it must be strings [K]'),
    'lengths': (exact(y=np.arange(5)), 'FILE has 6 images and 5 labels'),
    'no image': (exact(0), 'FILE has 0 images and 0 labels'),
    'negative labels': (exact(y=np.array([0, 1, -1, 0, 1, 2])), 'FILE has the label -1; labels count the classes from 0'),
    'huge labels': (exact(y=np.full(6, 2**32)), 'FILE has the label 4294967296'),
    'pickle': (exact(x=np.array([None] * 6)), 'holds Python objects, which dvinv does not unpickle'),
    'too few labels': (jpegs(*images(), labels=range(5)), 'FILE has 6 images and 5 labels'),
    'no offset': ({**jpegs(*images()), 'offsets': np.arange(0)}, 'FILE has 0 images and 6 labels'),
    'descending': (
        {**jpegs(*images(2)), 'offsets': np.array([0, 9, 5], np.uint32)},
        'The offsets of FILE must ascend from 0',
    ),
    'beyond': (
        {**jpegs(*images(2)), 'offsets': np.array([0, 9, 10**6])},
        'The offsets of FILE must ascend from 0 to at most',
    ),
    'damaged': ({**jpegs(*images(2)), 'offsets': np.array([0, 9, 20])}, 'image 0 of FILE cannot be decoded ('),
    'truncated': ({**jpegs(images()[0]), 'offsets': np.array([0, 640])}, 'image 0 of FILE cannot be decoded (OSError)'),
    'no JPEG': ({**jpegs(*images(2)), 'header': np.zeros(9, np.uint8)}, 'image 0 of FILE cannot be decoded (Unidentified'),
}


@pytest.mark.parametrize('case', BAD_ARRAYS)
def test_what_is_wrong_with_the_arrays_is_said(tmp_path, case):
    arrays, sentence = BAD_ARRAYS[case]
    path = save(tmp_path / 'a.npz', arrays)
    assert sentence.replace('FILE', path) in refusal('npz', path)


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / 'a.npz'
    assert f'The data file {path} does not exist' in refusal('npz', str(path))
    save(path, exact())
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b'\xff' + whole[middle + 1 :], b'', b'\x80\x04N.', encoded_npy()):
        path.write_bytes(damaged)
        assert f'The data file {path} cannot be read' in refusal('npz', str(path))


def encoded_npy():
    buffer = io.BytesIO()
    np.save(buffer, images())
    return buffer.getvalue()


@pytest.mark.parametrize('pixels', [images() * np.float32(1.0000002 / images().max()), images() / images().max() - 1e-7])
def test_what_interpolation_adds_at_the_ends_of_the_range_is_cut(pixels):
    np.testing.assert_allclose(files.as_pixels(pixels, 'here'), images() / images().max() * 255, atol=0.51)


def test_integers_of_another_scale_are_said(capsys):
    files.as_pixels(images() // 16, 'here')
    assert f'The brightest pixel of here is {images().max() // 16} of 255: are its images of another scale?' in (
        capsys.readouterr().err
    )


# Sizes


def test_jpegs_of_several_sizes_need_an_image_size(tmp_path):
    path = save(tmp_path / 'a.npz', jpegs(images(1, 20, 10)[0], images(1, 12, 24)[0]))
    assert refusal('npz', path) == (
        f'All images must have one size, but image 0 of {path} has 20x10 pixels (height x width) and image 1 of {path} has '
        '12x24; set data.image_size to resize them.'
    )
    assert load_real(DataSettings('npz', path, image_size=8)).image_shape == (8, 8, 3)


@pytest.mark.parametrize(('height', 'width'), [(16, 24), (24, 16), (17, 16)])
def test_the_centre_square_remains(height, width):
    pixels = np.zeros((1, height, width, 2), np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    pixels[:, top : top + 16, left : left + 16, 1] = 200
    same, half = resize(pixels, 16), resize(pixels, 8)
    assert (same == [0, 200]).all()  # not resized: cut alone
    assert half.shape == (1, 8, 8, 2)
    assert (half[:, 1:-1, 1:-1] == [0, 200]).all()


def test_shrinking_is_antialiased():
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None]
    assert np.abs(resize(board, 8).astype(int) - 128).max() < 10  # nearest or plain bilinear sampling would leave 0 and 255


def test_images_of_the_right_size_stay_as_they_are():
    pixels = images()
    np.testing.assert_array_equal(resize(pixels, 8), pixels)
    np.testing.assert_array_equal(resize(pixels, 0), pixels)


# Folders


@pytest.mark.parametrize(
    ('kind', 'suffix'), [('PNG', '.png'), ('BMP', '.BMP'), ('JPEG', '.JPEG'), ('JPEG', '.jpg'), ('WEBP', '.webp')]
)
def test_folders_are_classes(tmp_path, kind, suffix):
    path = write_folders(tmp_path / 'test', kind=kind, suffix=suffix)
    (tmp_path / 'test' / '.cache').mkdir()
    (tmp_path / 'test' / 'ant' / 'notes.txt').write_text('no image')
    data = load_real(DataSettings('folders', path))
    assert (data.train, data.num_classes, data.image_shape) == (None, 2, (8, 8, 3))
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.labels.dtype == np.int32
    expected = np.concatenate([images(3), images(3) + 40])
    assert np.abs(data.test.images.astype(int) - expected).mean() <= (0 if kind in ('PNG', 'BMP') else 6)


@pytest.mark.parametrize(
    ('names', 'class_names', 'labels', 'by_position'),
    [
        (['0', '10', '11', '2'], (), [0, 10, 11, 2], False),
        (['7', '8', '09'], (), [7, 8, 9], False),
        (['class_10', 'class_2', 'class_9'], (), [2, 0, 1], True),
        (['n02', 'n10', 'x3'], (), [0, 1, 2], True),
        (['a1b2', 'a1b10'], (), [0, 1], True),
        (['bee', 'ant'], (), [1, 0], True),
        (['0_ant', '10_cow', '2_bee'], (), [0, 2, 1], True),
        (['20240101120000', '9'], (), [1, 0], True),
        (['cat', 'bee'], ('cat', 'ant', 'bee'), [0, 2], False),
        (['1', '10'], ('10', '1'), [1, 0], False),
    ],
)
def test_labels_of_folders(names, class_names, labels, by_position):
    assert labels_of(names, class_names, 'here') == (dict(zip(names, labels, strict=True)), by_position)


def test_folders_named_by_numbers_are_the_classes_of_these_numbers(tmp_path):
    path = write_folders(tmp_path / 'test', classes=['0', '10', '2'])
    data = load_real(DataSettings('folders', path))
    assert (data.num_classes, data.by_position, data.class_names) == (11, False, ())
    for number, label in enumerate((0, 10, 2)):
        np.testing.assert_array_equal(data.test.images[data.test.labels == label], images(3) + 40 * number)
    chosen = load_real(DataSettings('folders', path, classes=(10, 2)))
    np.testing.assert_array_equal(chosen.test.images[chosen.test.labels == 0], images(3) + 40)


def test_numbered_folders_need_not_be_the_same_to_train_and_to_score(tmp_path):
    test, train = write_folders(tmp_path / 'test', ['2']), write_folders(tmp_path / 'train', ['0', '1', '2'])
    data = load_real(DataSettings('folders', test, train))
    assert (data.num_classes, {*data.test.labels}, {*data.train.labels}) == (3, {2}, {0, 1, 2})


def test_class_names_that_do_not_fit_are_refused(tmp_path):
    path = write_folders(tmp_path / 'test')
    data = load_real(DataSettings('folders', path, class_names=('bee', 'cat', 'ant')))
    assert (data.test.labels.tolist(), data.class_names) == ([2] * 3 + [0] * 3, ('bee', 'cat', 'ant'))
    assert load_real(DataSettings('folders', path)).class_names == ('ant', 'bee')
    assert 'the folders ant, bee, which data.class_names does not name' in refusal('folders', path, class_names=('cat',))
    assert "data.class_names is ('ant', 'ant'); it must be different" in refusal('folders', path, class_names=('ant', 'ant'))
    assert "data.class_names is ('ant',), but the data set 'digits' takes none" in refusal('digits', class_names=('ant',))
    with pytest.raises(DvinvError, match=r'The folders 1 and 01 of here are both of the class 1; join them\.'):
        labels_of(['1', '01', '2'], (), 'here')


def test_folders_of_some_classes_alone_are_refused_where_no_name_tells_which():
    split = Split(np.zeros((2, 8, 8, 2), np.uint8), np.array([0, 1]))
    validate_fits(tiny_teacher(), RealData(None, split, 2))  # numbered
    validate_fits(tiny_teacher(), RealData(None, split, 3, by_position=True))
    with pytest.raises(DvinvError, match=r'folders of 2 classes, but the teacher knows 3, .*data\.class_names'):
        validate_fits(tiny_teacher(), RealData(None, split, 2, by_position=True))


def test_training_folders_have_the_same_classes(tmp_path):
    test, train = write_folders(tmp_path / 'test'), write_folders(tmp_path / 'train', height=10, width=14)
    assert refusal('folders', test, train).startswith('Training images are 10x14x3')
    data = load_real(DataSettings('folders', test, train, image_size=6))
    assert data.train.images.shape == data.test.images.shape == (6, 6, 6, 3)
    for name in ('cat', 'dog', 'emu', 'fox', 'gnu', 'hen'):
        write_folders(tmp_path / 'train', [name])
    assert 'but only one of them has cat, dog, emu, fox, gnu, ...' in refusal('folders', test, train)
    assert 'but only one of them has cat, dog, emu, fox, gnu, ...' in refusal('folders', train, test)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    path = tmp_path / 'test'
    assert f'The data folder {path} does not exist' in refusal('folders', str(path))
    path.mkdir()
    assert f'The data folder {path} is empty; it must have one sub-folder per class' in refusal('folders', str(path))
    (path / 'a.png').write_bytes(b'')
    assert f'The data folder {path} has images but no sub-folders, so no labels' in refusal('folders', str(path))
    (path / 'ant').mkdir()
    assert f'{path / "ant"} is empty; a class needs images (.png, .jpg' in refusal('folders', str(path))
    picture = path / 'ant' / 'a.png'
    for damaged in (b'no image', encoded(images()[0], 'PNG')[:-30], encoded(images()[0], 'GIF')):
        picture.write_bytes(damaged)
        assert f'{picture} cannot be decoded' in refusal('folders', str(path))
    picture.write_bytes(encoded(np.full((4, 4), 40000, np.uint16), 'PNG'))
    assert f'{picture} has more than 8 bits a channel' in refusal('folders', str(path))


def test_folders_of_several_sizes_need_an_image_size(tmp_path):
    path = write_folders(tmp_path, ['ant'])
    write_folders(tmp_path, ['bee'], height=10, width=12)
    sentence = refusal('folders', path)
    assert f'{tmp_path}/ant/0.png has 8x8 pixels' in sentence
    assert f'{tmp_path}/bee/0.png has 10x12; set data.image_size' in sentence


# tensorflow-datasets


def test_a_data_set_that_is_not_prepared_tells_how(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    assert refusal('cifar10', str(tmp_path)) == (
        f'The data set cifar10 is not in {tmp_path}; prepare it once, in any environment that has TensorFlow: python -c '
        f'"import tensorflow_datasets as tfds; '
        f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()\""
    )
    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'default'))
    assert refusal('cifar100').endswith("tfds.builder('cifar100', file_format='array_record').download_and_prepare()\"")
    assert f'The data set cifar100 is not in {tmp_path / "default"}; ' in refusal('cifar100')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A `data_dir` with a CIFAR-10 of 20 and 10 pictures."""
    pytest.importorskip('array_record', reason='reading TFDS needs the package array-record')
    import tensorflow_datasets as tfds

    real = tfds.image_classification.Cifar10  # imports it, and so registers it
    with tfds.core.registered.skip_registration():

        class Cifar10(real):
            """The real one's name, version and features, other pictures."""

            def _split_generators(self, manager):
                self.info.features['label'].names = list('abcdefghij')  # as the real one does
                return {'train': self._generate_examples(20), 'test': self._generate_examples(10)}

            def _generate_examples(self, count):
                for i, picture in enumerate(images(count, 32, 32)):  # bytes: encoding arrays takes TensorFlow
                    yield i, {'id': str(i), 'image': encoded(picture, 'PNG'), 'label': i % 10}

    folder = tmp_path_factory.mktemp('tfds')
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    Cifar10(data_dir=folder, file_format='array_record').download_and_prepare(download_config=offline)
    return folder


def test_prepared_data_are_read(prepared):
    data = load_real(DataSettings('cifar10', str(prepared)))
    assert (data.num_classes, data.class_names) == (10, tuple('abcdefghij'))
    for split, count in ((data.train, 20), (data.test, 10)):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        order = np.argsort(split.images[:, 0, 0, 0])  # TFDS shuffles
        np.testing.assert_array_equal(split.images[order], images(count, 32, 32))
        np.testing.assert_array_equal(split.labels[order], np.arange(count) % 10)


def test_damaged_prepared_data_are_to_be_deleted(prepared, tmp_path):
    shutil.copytree(prepared / 'cifar10', tmp_path / 'cifar10')
    (info,) = tmp_path.rglob('dataset_info.json')
    text = info.read_text()
    for damaged in (text[:40], text.replace('array_record', 'tfrecord')):
        info.write_text(damaged)
        assert f'{tmp_path / "cifar10"} cannot be read (' in refusal('cifar10', str(tmp_path))
    info.write_text(text)
    (shard,) = tmp_path.rglob('*test*-of-*')
    shard.unlink()
    assert 'delete it, and prepare it once' in refusal('cifar10', str(tmp_path))


def test_prepared_data_without_labels_are_refused(prepared, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    unlabelled = tfds.features.FeaturesDict({'image': tfds.features.Image(), 'id': tfds.features.Text()})
    monkeypatch.setattr(tfds.core.DatasetInfo, 'features', unlabelled)
    monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', lambda *_, **__: ([], []))
    shutil.copytree(prepared / 'cifar10', tmp_path / 'cifar10')
    sentence = refusal('cifar10', str(tmp_path))
    assert "has the features image, id; it must have 'image', and 'label' of classes; delete it, and prepare it" in sentence


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'array_record'")

    monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', missing)
    (tmp_path / 'cifar10').mkdir()
    assert 'pip install array-record' in refusal('cifar10', str(tmp_path))


# The files that this project's machines share


def test_shared_cifar(real_data):
    source = DataSettings(
        'npz', str(real_data / 'cifar10_lossless_test1000.npz'), str(real_data / 'cifar10_lossless_train4000.npz')
    )
    data = load_real(source)
    assert data.test.images.shape == (1000, 32, 32, 3)
    assert data.train.images.shape == (4000, 32, 32, 3)
    assert data.num_classes == 10
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]


def test_shared_jpegs(real_data):
    data = load_real(DataSettings('npz', str(real_data / 'cifar10_test_jpeg.npz')))
    assert data.test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10


def test_shared_photos(real_data):
    data = load_real(DataSettings('npz', str(real_data / 'imagenet_sample_1000_224px.npz')))
    assert data.test.images.shape == (1000, 224, 224, 3)
    assert data.num_classes == 1000
