"""When images come to a student, and which of them each of its updates sees."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rounds:
    """`images` new ones come at the start of each of `count` rounds; a round lasts `updates` updates, the last to the end.

    One round is a pool that is finished before the student's first update.
    """

    images: int
    count: int = 1
    updates: int = 1

    def of(self, update: int) -> int:
        """The round that an update belongs to."""
        return min(update // self.updates, self.count - 1)

    def first_update(self, round_number: int) -> int:
        """The update before which the images of a round are made."""
        return round_number * self.updates


def chosen_images(seed: int, update: int, batch_size: int, rounds: Rounds) -> np.ndarray:
    """Which images make up the batch of an update, int32 [B].

    A round begins with its new images, each once, and goes on with shuffled epochs of all that have come so far.
    """
    now = rounds.of(update)
    old, all_of_them = now * rounds.images, (now + 1) * rounds.images
    first = (update - rounds.first_update(now)) * batch_size

    def epoch_of(position: int) -> int:
        return max(0, 1 + (position - rounds.images) // all_of_them)

    def shuffled(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch, now])
        return rng.permutation(all_of_them) if epoch else old + rng.permutation(rounds.images)

    epochs = range(epoch_of(first), epoch_of(first + batch_size - 1) + 1)
    skipped = rounds.images + (epochs[0] - 1) * all_of_them if epochs[0] else 0
    return np.concatenate([shuffled(epoch) for epoch in epochs])[first - skipped :][:batch_size].astype(np.int32)
