"""The digits that are part of scikit-learn: real data that needs no file."""

import numpy as np

from dvinv.config import DataSettings
from dvinv.data.dataset import RealData, Split
from dvinv.data.pictures import resize


def read_digits(source: DataSettings) -> RealData:
    """Returns the 1,797 scanned digits, 8x8 grey (or enlarged): 1,437 training and 360 test images, stratified."""
    from sklearn.datasets import load_digits  # imported late, because it takes a second and other runs do not need it

    bunch = load_digits()
    pixels = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    return RealData(*Split(resize(pixels, source.image_size), bunch.target.astype(np.int32)).divided(360), num_classes=10)
