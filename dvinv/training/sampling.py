"""The schedule by which images become available to a student, and the choice of images for each update."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int32

from dvinv.config import Settings


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The schedule by which images become available to a training.

    `images` new images are added at the start of each of `count` rounds. A round lasts `updates` updates, and the last round
    lasts to the end of the training. A single round stands for a pool that is finished before the student's first update.
    """

    images: int
    count: int = 1
    updates: int = 1

    @property
    def total(self) -> int:
        """The number of images of all rounds."""
        return self.count * self.images

    def round_of(self, update: int) -> int:
        """Returns the number of the round that an update belongs to."""
        return min(update // self.updates, self.count - 1)

    def available_at(self, update: int) -> int:
        """Returns the number of images that are available when an update is made."""
        return (self.round_of(update) + 1) * self.images

    def first_update(self, round_number: int) -> int:
        """Returns the update before which the images of a round are made."""
        return round_number * self.updates


def rounds_of(settings: Settings) -> Rounds:
    """Returns the schedule by which the images of the run's own pool become available to the student."""
    size = settings.round_images
    count = settings.synthesis.images // size
    return Rounds(size - settings.held_out_of(size), count, max(1, settings.distillation.updates_per_round))


def chosen_images(seed: int, update: int, batch_size: int, rounds: Rounds) -> Int32[np.ndarray, ' B']:
    """Returns the row numbers of the images in the batch of an update, int32 [B].

    A round begins with one shuffled epoch of its new images, and continues with shuffled epochs of all images that are
    available so far.
    """
    number = rounds.round_of(update)
    earlier, available = number * rounds.images, (number + 1) * rounds.images
    first = (update - rounds.first_update(number)) * batch_size  # position of the batch in the sequence of the round

    def epoch_of(position: int) -> int:
        return max(0, 1 + (position - rounds.images) // available)

    chosen = []
    for epoch in range(epoch_of(first), epoch_of(first + batch_size - 1) + 1):
        start = rounds.images + (epoch - 1) * available if epoch else 0  # position of the epoch's first image
        part = slice(max(0, first - start), first + batch_size - start)
        count, offset = (available, 0) if epoch else (rounds.images, earlier)
        chosen.append(offset + _shuffled(count, seed, epoch, number)[part])
    return np.concatenate(chosen).astype(np.int32)


@functools.lru_cache(maxsize=4)  # the end of an epoch and the start of the next one, for two sets of images
def _shuffled(count: int, *seeds: int) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(count)
