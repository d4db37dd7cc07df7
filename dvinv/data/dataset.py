"""What a data set is: images with labels in two parts."""

import dataclasses

import numpy as np

from dvinv.errors import DvinvError


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] and their labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def of_classes(self, classes: tuple[int, ...]) -> 'Split':
        """The images of these classes alone, in their old order; labels are positions in `classes`."""
        chosen = self.labels[:, None] == np.asarray(classes)
        kept = chosen.any(1)
        return Split(self.images[kept], chosen[kept].argmax(1).astype(np.int32))

    def divided(self, held_out: int | float) -> tuple['Split', 'Split']:
        """Two parts with the same share of every class; `held_out`: the second's number of images, or its share.

        Seed 0, whatever the run's seed: the test images are always the same.

        Raises:
          DvinvError: too few images to have every class in both parts.
        """
        from sklearn.model_selection import train_test_split  # late: it takes a second

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
    """A data set: what may be trained on (None: nothing), and what is only scored.

    Attributes:
      by_position: the labels are positions among names that do not tell the classes of a network, so a network that fits
        has exactly `num_classes`.
      class_names: of all classes in the order of their labels, for people; (): none are known.
    """

    train: Split | None
    test: Split
    num_classes: int
    by_position: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def classes_without_images(self) -> tuple[list[int], int]:
        """(The first classes without an image to train on, at most 12; how many there are.)"""
        present = np.unique(self.train.labels)
        return np.setdiff1d(np.arange(min(self.num_classes, len(present) + 12)), present).tolist(), (
            self.num_classes - len(present)
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        return self.test.images.shape[1:]
