"""Real images, by data set name: for training teachers, for controls, and for scoring. Synthesis never comes here."""

import dataclasses

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dvinv.errors import DvinvError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class RealData:
    """A data set: what may be trained on, and what is only scored."""

    train: Split
    test: Split
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        return self.train.images.shape[1:]


def load_real(name: str, validation: bool = False) -> RealData | None:
    """The data set `name`, split; None for the name '': a run without any real data.

    Args:
      validation: hold a fifth of the training split out and score on that instead of the test split: for choosing
        settings without a look at the test images.

    Raises:
      DvinvError: no data set has this name.
    """
    if not name:
        return None
    if name not in DATA_SETS:
        raise DvinvError(f'There is no data set {name!r}; choose one of {", ".join(sorted(DATA_SETS))}.')
    data = DATA_SETS[name]()
    if validation:
        data = RealData(*_split(data.train, 0.2), data.num_classes)
    return data


def digits() -> RealData:
    """The 1,797 scanned digits inside scikit-learn, 8x8 grey: 1,437 to train on, 360 for the test, stratified."""
    bunch = load_digits()
    pixels = np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    return RealData(*_split(Split(pixels, bunch.target.astype(np.int32)), 360), num_classes=10)


def _split(whole: Split, held_out: int | float) -> tuple[Split, Split]:
    """Two parts with the same share of every class; seed 0, whatever the run's seed: the test images are always the same."""
    first, second = train_test_split(np.arange(len(whole.labels)), test_size=held_out, stratify=whole.labels, random_state=0)
    return Split(whole.images[first], whole.labels[first]), Split(whole.images[second], whole.labels[second])


DATA_SETS = {'digits': digits}
