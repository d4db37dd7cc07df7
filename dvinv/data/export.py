"""python -m dvinv.data.export --pool runs/digits/pool --to folders --out DIR

Pictures of images in grids, and the export of a pool for other programs: PNG pictures in class folders, a TensorFlow
Datasets data set, or an .npz.
"""

import argparse
import base64
import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dvinv.data.dataset import RowArray
from dvinv.data.pool import ImagePool
from dvinv.runtime import preemption
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import refuse_full_disk, write_atomic
from dvinv.runtime.progress import Progress


def shown_classes(labels: np.ndarray, max_classes: int = 20) -> list[int]:
    """Returns the classes that have a row in `class_grid`, from the top.

    Args:
      labels: int [N].
      max_classes: the maximum number of classes. If there are more, classes are chosen evenly spaced over the sorted ones:
        neighbouring classes of a large data set tend to be similar (the first twenty of ImageNet are fish and birds).
    """
    if max_classes < 1:
        raise ValueError(f'max_classes is {max_classes}; a grid needs at least one row.')
    present = np.unique(np.asarray(labels))
    if len(present) > max_classes:
        present = present[np.linspace(0, len(present) - 1, max_classes).round().astype(int)]
    return [int(label) for label in present]


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Returns the name of a class, or its number if no name is known."""
    return class_names[label] if label < len(class_names) else str(label)


def visible(pixels: np.ndarray) -> np.ndarray:
    """Returns the channels of an image that a picture can show.

    Args:
      pixels: uint8 [H, W, C].

    Returns:
      uint8 [H, W, 3], the first three channels; [H, W] for a single channel; [H, 2 W] for two channels, side by side.
    """
    if pixels.shape[-1] > 2:
        return pixels[..., :3]
    return np.concatenate(np.moveaxis(pixels, -1, 0), axis=1)


def class_grid(
    images: RowArray,
    labels: np.ndarray,
    per_class: int,
    *,
    max_classes: int = 20,
    gap: int = 4,
    width: int = 900,
    classes: Sequence[int] = (),
) -> Image.Image:
    """Lays images out in a grid, with one row per class and the first `per_class` images of the class as columns.

    Args:
      images: uint8 [N, H, W, C], see `visible`; only the images of the grid are read.
      labels: int [N].
      per_class: the number of columns.
      max_classes: the maximum number of rows; see `shown_classes`.
      gap: pixels between neighbouring images.
      width: the approximate width of the grid in pixels. Small images are enlarged by an integer factor with nearest
        neighbour, so that a pixel stays a square; large images are reduced by an integer factor with a mean.
      classes: the labels of the rows, from the top; () for those of `shown_classes`, ascending. Rows of classes without
        images are transparent.

    Returns:
      A picture of mode LA or RGBA. Gaps, and empty cells of a class with fewer images, are transparent, so that the grid
      suits a light and a dark page.
    """
    labels = np.asarray(labels)
    if len(images.shape) != 4 or not images.shape[-1] or images.dtype != np.uint8:
        raise ValueError(f'Images are {images.dtype} {images.shape}; a grid needs uint8 [N, H, W, C].')
    if labels.shape != images.shape[:1]:
        raise ValueError(f'Labels have shape {labels.shape} for {len(images)} images; give one label for each image.')
    if not len(images) or per_class < 1:
        raise ValueError(f'A grid of {len(images)} images with {per_class} columns is empty; give one or more.')

    classes = classes or shown_classes(labels, max_classes)
    room = (width - gap * (per_class - 1)) / per_class
    height_in, width_in = visible(np.empty(images.shape[1:], np.uint8)).shape[:2]
    grow = max(1, int(room // width_in))
    shrink = max(1, math.ceil(width_in / max(1.0, room)))
    cell_height, cell_width = math.ceil(height_in / shrink) * grow, math.ceil(width_in / shrink) * grow
    mode = 'LA' if images.shape[-1] < 3 else 'RGBA'
    size = (per_class * (cell_width + gap) - gap, len(classes) * (cell_height + gap) - gap)
    grid = Image.new(mode, size)
    for row, label in enumerate(classes):
        for column, index in enumerate(np.flatnonzero(labels == label)[:per_class]):
            cell = Image.fromarray(np.ascontiguousarray(visible(images[index]))).reduce(shrink)
            cell = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST).convert(mode)
            grid.paste(cell, (column * (cell_width + gap), row * (cell_height + gap)))
    return grid


def png_data_uri(image: Image.Image) -> str:
    """Returns the picture as a base64 data URI of a PNG, which is lossless and depends only on the pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')


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


EXPORTERS = {'folders': to_folders, 'tfds': to_tfds, 'npz': to_npz}


def main(argv: list[str]) -> None:
    """Exports a pool in the format that the arguments name.

    Raises:
      DvinvError: the pool is empty or damaged, or the disk is full.
    """
    parser = argparse.ArgumentParser(prog='python -m dvinv.data.export', description='Export an image pool.')
    parser.add_argument('--pool', type=Path, required=True, help='the folder with shard-000000.npz and so on')
    parser.add_argument(
        '--to', choices=EXPORTERS, required=True, help='PNG pictures in class folders, TensorFlow Datasets, or one .npz'
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the folder to write to; the same command resumes a killed export'
    )
    arguments = parser.parse_args(argv)
    EXPORTERS[arguments.to](ImagePool(arguments.pool), arguments.out)


if __name__ == '__main__':
    preemption.install(grace=0)
    try:
        main(sys.argv[1:])
    except DvinvError as error:
        sys.exit(f'dvinv: {error}')
