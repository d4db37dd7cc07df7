"""CIFAR-10 and CIFAR-100 as prepared by tensorflow-datasets; preparing needs TensorFlow, reading does not."""

import os
import textwrap

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.pictures import decode
from dvinv.errors import DvinvError


def read_prepared(source: DataSettings) -> RealData:
    """Reads the data set `source.name` from array_record files below `source.path`, the `data_dir` of TFDS.

    An empty path stands for the default of TFDS.

    Raises:
      DvinvError: the data set is missing, has another format or is damaged, or the package array-record is missing.
    """
    import tensorflow_datasets as tfds  # imported late, because it takes a second and only these two data sets need it

    folder = tfds.core.Path(source.path or tfds.core.constants.DATA_DIR) / source.name
    data_dir = f', data_dir={source.path!r}' if source.path else ''
    command = (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({source.name!r}{data_dir}, '
        f"file_format='array_record').download_and_prepare()\""
    )
    way_out = f'prepare it once, in any environment that has TensorFlow: {command}'
    if not folder.exists():
        raise DvinvError(f'The data set {source.name} is not in {folder.parent}; {way_out}')
    try:
        builder = tfds.builder(source.name, data_dir=source.path or None, file_format='array_record')
        sources = builder.as_data_source(['train', 'test'], decoders={'image': tfds.decode.SkipDecoding()})
        train, test = (list(examples) for examples in sources)
    except ImportError as error:
        raise DvinvError(f'To read {folder}, the package array-record is needed: pip install array-record.') from error
    except Exception as error:  # TFDS raises many types of errors
        raise DvinvError(
            f'{folder} cannot be read ({textwrap.shorten(str(error), 200)}); delete it, and {way_out}'
        ) from error
    features = builder.info.features
    if not ({'image', 'label'} <= {*features} and hasattr(features['label'], 'num_classes')):
        raise DvinvError(
            f"{folder} has the features {', '.join(features)}; it must have 'image', and 'label' of classes; delete it, and "
            f'{way_out}'
        )
    label = features['label']
    names = tuple(getattr(label, 'names', ()))
    return RealData(_prepared_split(train, folder), _prepared_split(test, folder), label.num_classes, class_names=names)


def _prepared_split(examples: list[dict], folder: os.PathLike) -> Split:
    files = {f'image {i} of {folder}': example['image'] for i, example in enumerate(examples)}
    return Split(decode(files, mode='RGB'), np.array([example['label'] for example in examples], np.int32))
