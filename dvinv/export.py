"""python -m dvinv.export --pool runs/digits/pool --to folders --out DIR

Exports an image pool for other programs: PNG pictures in class folders, a TensorFlow Datasets data set, or an .npz.
"""

import argparse
import io
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dvinv.data.grids import visible
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.runtime import preemption
from dvinv.runtime.files import refuse_full_disk, write_atomic
from dvinv.runtime.progress import Progress


def to_folders(pool: ImagePool, folder: Path) -> None:
    """Writes every image to `folder/CLASS/BATCH-NUMBER.png`.

    Existing pictures are not written again, so that a killed export resumes. If images do not have 1 or 3 channels, a
    picture has the channels that `visible` selects, and a message on the terminal says so.

    Raises:
      DvinvError: the pool is empty, a shard is damaged, or the disk is full.
    """
    digits, channels = len(str(pool.num_classes - 1)), pool.rows('images').shape[-1]
    if channels not in (1, 3):
        shown = 'both channels side by side, in grey' if channels == 2 else f'the first 3 of {channels} channels'
        print(f'The pictures show {shown}; --to npz and --to tfds keep the images as they are.', file=sys.stderr)
    for name, pixels, label in _pictures(pool, 'folders'):
        path = folder / f'{label:0{digits}d}' / f'{name}.png'
        if not path.exists():
            write_atomic(path, _png(pixels))


def to_tfds(pool: ImagePool, folder: Path) -> None:
    """Writes a prepared data set for TensorFlow Datasets to `folder/synthesized/1.0.0`.

    It has the split `train` and the features `image` and `label`. It can be read without TensorFlow, by
    `tfds.builder_from_directory(path).as_data_source('train')`. An existing data set is kept.

    Raises:
      DvinvError: as for `to_folders`, or the existing data set has another number of images than the pool, which has grown
        since.
    """
    import tensorflow_datasets as tfds  # imported late, because it takes a second and nothing else here needs it

    (count, *shape), classes = pool.rows('images').shape, pool.num_classes
    pictures = shape[-1] in (1, 3)

    with tfds.core.registered.skip_registration():  # the builder is local to this call, and there may be several

        class Synthesized(tfds.core.GeneratorBasedBuilder):
            """Images that were synthesized from a trained network."""

            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                if pictures:
                    image = tfds.features.Image(shape=tuple(shape), encoding_format='png')
                else:
                    image = tfds.features.Tensor(shape=tuple(shape), dtype=np.uint8)
                label = tfds.features.ClassLabel(num_classes=classes)
                features = tfds.features.FeaturesDict({'image': image, 'label': label})
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=('image', 'label'))

            def _split_generators(self, manager):
                return {'train': self._generate_examples()}

            def _generate_examples(self):
                # Images are encoded here, because TensorFlow Datasets would encode arrays with TensorFlow.
                for name, pixels, label in _pictures(pool, 'tfds'):
                    yield name, {'image': _png(pixels) if pictures else pixels, 'label': label}

    builder = Synthesized(data_dir=folder, file_format='array_record')
    if 'train' in builder.info.splits and (existing := builder.info.splits['train'].num_examples) != count:
        raise DvinvError(
            f'{builder.data_path} has {existing} images, and the pool {pool.folder} has {count}; delete that folder to '
            'export the pool again, or choose another --out.'
        )
    builder.download_and_prepare()


def to_npz(pool: ImagePool, folder: Path) -> None:
    """Writes `folder/images.npz` with images uint8 [N, H, W, C] and labels int32 [N], which the data set 'npz' reads.

    Raises:
      DvinvError: as for `to_folders`.
    """
    numbers, (_, *shape) = pool.finished(), pool.rows('images').shape  # batches that are added later are left out
    count, labels, path = sum(pool.sidecar(number)['images'] for number in numbers), [], folder / 'images.npz'
    with refuse_full_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix('.part')
        with zipfile.ZipFile(unfinished, 'w') as archive:
            with archive.open('images.npy', 'w', force_zip64=True) as file:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for _, shard in _shards(pool, numbers, 'npz'):
                    file.write(shard['images'].tobytes())
                    labels.append(shard['labels'])
            with archive.open('labels.npy', 'w') as file:
                np.lib.format.write_array(file, np.concatenate(labels), allow_pickle=False)
        os.replace(unfinished, path)


def _pictures(pool: ImagePool, what: str) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (name, pixels uint8 [H, W, C], label) of every image, with one shard in memory at a time."""
    for number, shard in _shards(pool, pool.numbers(), what):
        for row, (pixels, label) in enumerate(zip(shard['images'], shard['labels'], strict=True)):
            yield f'{number:06d}-{row:04d}', pixels, int(label)


def _shards(pool: ImagePool, numbers: list[int], what: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (number, arrays) of each of these shards, and displays progress."""
    with Progress(f'export: {what}', len(numbers), 'batches') as progress:
        for done, number in enumerate(numbers, 1):
            yield number, pool.read(number)
            progress.update(done)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(visible(pixels))).save(buffer, 'PNG')
    return buffer.getvalue()


FORMATS = {'folders': to_folders, 'tfds': to_tfds, 'npz': to_npz}


def main(argv: list[str]) -> None:
    """Exports a pool in the format that the arguments name.

    Raises:
      DvinvError: the pool is empty or damaged, or the disk is full.
    """
    parser = argparse.ArgumentParser(prog='python -m dvinv.export', description='Export an image pool for other programs.')
    parser.add_argument('--pool', type=Path, required=True, help='the folder with shard-000000.npz and so on')
    parser.add_argument(
        '--to', choices=FORMATS, required=True, help='PNG pictures in class folders, TensorFlow Datasets, or one .npz'
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the folder to write to; the same command resumes a killed export'
    )
    arguments = parser.parse_args(argv)
    FORMATS[arguments.to](ImagePool(arguments.pool), arguments.out)


if __name__ == '__main__':
    preemption.install(grace=0)
    try:
        main(sys.argv[1:])
    except DvinvError as error:
        sys.exit(f'dvinv: {error}')
