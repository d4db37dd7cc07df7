"""The digits inside scikit-learn: real data that needs no file."""

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.pictures import resize


def read(source: DataSettings) -> RealData:
    """The 1,797 scanned digits, 8x8 grey (or enlarged): 1,437 to train on, 360 for the test, stratified."""
    from sklearn.datasets import load_digits  # late: it takes a second, which a run without it is spared

    bunch = load_digits()
    pixels = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    return RealData(*Split(resize(pixels, source.image_size), bunch.target.astype(np.int32)).divided(360), num_classes=10)
