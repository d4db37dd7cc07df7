"""An image pool as other programs read it: a folder of PNG pictures a class, or a data set of TensorFlow Datasets."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.runtime.files import write_atomic
from dvinv.runtime.progress import Progress


def to_folders(pool: ImagePool, folder: Path) -> None:
    """`folder/CLASS/BATCH-NUMBER.png`; pictures that are there already are left alone, so a killed export goes on.

    Raises:
      DvinvError: the pool is empty, a shard is damaged, or the disk is full.
    """
    digits = len(str(pool.num_classes - 1))
    for name, pixels, label in _pictures(pool, 'folders'):
        path = folder / f'{label:0{digits}d}' / f'{name}.png'
        if not path.exists():
            write_atomic(path, _png(pixels))


def to_tfds(pool: ImagePool, folder: Path) -> None:
    """A prepared data set, with the split `train` and the features `image` and `label`, in `folder/synthesized/1.0.0`.

    `tfds.builder_from_directory(that).as_data_source('train')` reads it, without TensorFlow. One that is there is kept.

    Raises:
      DvinvError: as `to_folders`; or one is there that has not as many images as the pool, which has grown since.
    """
    import tensorflow_datasets as tfds  # takes a second, and nothing else here needs it

    (count, *shape), classes = pool.rows('images').shape, pool.num_classes

    with tfds.core.registered.skip_registration():  # it is nobody else's business, and there may be several

        class Synthesized(tfds.core.GeneratorBasedBuilder):
            """Images that were synthesized from a trained network."""

            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                image = tfds.features.Image(shape=tuple(shape), encoding_format='png')
                label = tfds.features.ClassLabel(num_classes=classes)
                features = tfds.features.FeaturesDict({'image': image, 'label': label})
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=('image', 'label'))

            def _split_generators(self, manager):
                return {'train': self._generate_examples()}

            def _generate_examples(self):
                # Encoded here: TensorFlow Datasets itself encodes arrays with TensorFlow.
                for name, pixels, label in _pictures(pool, 'tfds'):
                    yield name, {'image': _png(pixels), 'label': label}

    builder = Synthesized(data_dir=folder, file_format='array_record')
    if 'train' in builder.info.splits and (there := builder.info.splits['train'].num_examples) != count:
        raise DvinvError(
            f'{builder.data_path} has {there} images, and the pool {pool.folder} has {count}: delete that folder to export '
            'the pool anew, or choose another --out.'
        )
    builder.download_and_prepare()


def _pictures(pool: ImagePool, what: str) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, pixels uint8 [H, W, C], label) of every image, one shard in memory at a time."""
    numbers = pool.numbers()
    with Progress(f'export: {what}', len(numbers)) as progress:
        for done, number in enumerate(numbers, 1):
            shard = pool.read(number)
            for row, (pixels, label) in enumerate(zip(shard['images'], shard['labels'], strict=True)):
                yield f'{number:06d}-{row:04d}', pixels, int(label)
            progress.update(done)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels).save(buffer, 'PNG')
    return buffer.getvalue()
