"""Settings of the task `continual`: a group of the config, field for field, beside those of a `Recipe`."""

import dataclasses
import math

from dvinv.errors import DvinvError

LOSSES = ('deepinversion', 'always_be_dreaming')
CONTROLS = ('finetune', 'lwf_mc', 'replay', 'joint', *LOSSES)


@dataclasses.dataclass(frozen=True)
class Continual:
    """What comes after the teacher's classes, and how it is learned."""

    # A dict a task: the fields of the group `data` in which it differs from it; {'classes': (5, 6)} are more classes of the
    # same data set, {'name': 'digits', 'image_size': 32} are those of another.
    steps: tuple[dict, ...] = ()
    loss: str = 'deepinversion'  # the paper's; or 'always_be_dreaming', where old and new classes are alike
    temperature: float = 1.0  # of the divergences from the old network
    old_images: float = 1.0  # weights, see losses.py; of the first loss
    old_answers: float = 1.0  # of the first loss: the old network's answers on new images
    head: float = 1.0  # of the second loss: cross-entropy of the head alone
    features: float = 1.0  # of the second loss: distance of the features from the old network's
    controls: tuple[str, ...] = ('finetune', 'lwf_mc', 'replay', 'joint')  # or the other loss, by its name

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses' terms, by their names."""
        return {name: getattr(self, name) for name in ('old_images', 'old_answers', 'head', 'features')}

    def check(self) -> None:
        """Refuse settings that no task could be learned with.

        Raises:
          DvinvError: names the field, its value and the choices.
        """
        if self.loss not in LOSSES:
            raise DvinvError(f'continual.loss is {self.loss!r}; choose one of {", ".join(LOSSES)}.')
        choices = [control for control in CONTROLS if control != self.loss]
        for control in self.controls:
            if control not in choices:
                raise DvinvError(f'continual.controls names {control!r}; choose among {", ".join(choices)}.')
        if not 0 < self.temperature < math.inf:
            raise DvinvError(f'continual.temperature is {self.temperature}; it must be above 0.')
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise DvinvError(f'continual.{name} is {weight}; it must be at least 0 and finite.')


def settings_of(config) -> Continual:
    """The `Continual` among the fields of `config.continual`."""
    return Continual(**{field.name: config.continual[field.name] for field in dataclasses.fields(Continual)})
