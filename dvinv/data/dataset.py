"""The types of a data set: images with labels, in a training and a test split."""

import dataclasses

import numpy as np
from jaxtyping import Integer, UInt8

from dvinv.errors import DvinvError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: UInt8[np.ndarray, 'N H W C']
    labels: Integer[np.ndarray, ' N']

    def of_classes(self, classes: tuple[int, ...]) -> 'Split':
        """Returns only the images of these classes, in their old order; labels become positions in `classes`."""
        matches = self.labels[:, None] == np.asarray(classes)
        kept = matches.any(1)
        return Split(self.images[kept], matches[kept].argmax(1).astype(np.int32))

    def divided(self, held_out: int | float) -> tuple['Split', 'Split']:
        """Returns two parts with the same share of every class.

        The seed is 0 regardless of the seed of the run, so that the test images are always the same.

        Args:
          held_out: the number of images in the second part (int), or its fraction of all images (float).

        Raises:
          DvinvError: there are too few images to have every class in both parts.
        """
        from sklearn.model_selection import train_test_split  # imported late, because it takes a second

        try:
            parts = train_test_split(np.arange(len(self.labels)), test_size=held_out, stratify=self.labels, random_state=0)
        except ValueError as error:
            raise DvinvError(
                f'{len(self.labels)} training images of {len(np.unique(self.labels))} classes are too few to hold out '
                'a fifth with every class in both parts; use more, or set data.validation=False.'
            ) from error
        first, second = (Split(self.images[part], self.labels[part]) for part in parts)
        return first, second


@dataclasses.dataclass(frozen=True)
class RealData:
    """A data set with a split to train on and a split that is only scored.

    Attributes:
      train: the split to train on; None if there is none.
      test: the split to score on.
      num_classes: the number of classes.
      by_position: whether the labels are positions among names that do not identify the classes of a network; a network that
        fits the data set then has exactly `num_classes` classes.
      class_names: the names of all classes in the order of their labels, for display; () if unknown.
    """

    train: Split | None
    test: Split
    num_classes: int
    by_position: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of an image."""
        return self.test.images.shape[1:]
