"""Networks that judge images: reading them from weights files, and validating that they fit the teacher."""

from collections.abc import Sequence
from pathlib import Path

from dvinv.config import MoreVerifierSettings, VerifierSettings
from dvinv.errors import DvinvError, say
from dvinv.inversion.teacher import Teacher
from dvinv.networks import Classifier, classifier_of, describes_itself, read_classifier
from dvinv.networks.classifier import check_normalisation

FEW = 100  # number of real images below which an accuracy has little significance


def load_more(verifiers: Sequence[MoreVerifierSettings], teacher: Teacher, say: bool = False) -> dict[str, Classifier]:
    """Loads the additional verifiers; returns {name of the network: Classifier} in the order of the settings.

    Args:
      verifiers: the settings of the verifiers.
      teacher: the teacher.
      say: whether to call `print_pixels` for each.

    Raises:
      DvinvError: a file is missing, or a verifier takes other images or classes than the teacher.
    """
    networks = {}
    for index, verifier in enumerate(verifiers):
        field, name = f'verifiers[{index}]', verifier.network
        networks[name] = read_verifier(verifier, field, teacher)
        if say:
            print_pixels(verifier, field, networks[name])
        validate_judge(teacher, networks[name], f'verifier {name}', field, 'leave it out')
    return networks


def read_verifier(group: VerifierSettings | MoreVerifierSettings, field: str, teacher: Classifier) -> Classifier:
    """Reads a network that judges images from its weights file.

    If `group` has no mean and std, they are those of the file, else those of the published weights of this network, else
    those of the teacher. `print_pixels` reports them.

    Args:
      group: the settings with the file and the network.
      field: the config field of these settings.
      teacher: the teacher.

    Raises:
      DvinvError: see `read_classifier`.
    """
    path = Path(group.weights)
    module, variables, about = read_classifier(
        path,
        group.network,
        mean=group.mean,
        std=group.std,
        width=group.width,
        image_shape=None if describes_itself(path) else teacher.image_shape,
        field=f'{field}.network',
        default_pixels=(teacher.mean, teacher.std),
    )
    return classifier_of(module, variables, about)


def print_pixels(group, field: str, network: Classifier) -> None:
    """Prints the mean and std that are used for published weights if the settings do not give both."""
    if (group.mean and group.std) or describes_itself(Path(group.weights)):
        return
    say(
        f'{field}: the weights {group.weights} come without mean and std; the pixels of this {group.network} are '
        f'normalised by mean {network.mean} and std {network.std} ({field}.mean and {field}.std set others).'
    )


def refuse_chance(share: float | None, count: int, network: Classifier, name: str, field: str, way_out: str) -> None:
    """Refuses a network from a weights file if it is no better than chance on real images.

    Args:
      share: the accuracy on real images; None: there are none.
      count: the number of those images.
      network: the network.
      name: the name of the network in messages.
      field: the config field with its weights, mean and std; '': it was trained in this run. In that case, perhaps after a
        short training, a message is printed instead of the refusal. The same holds for fewer than `FEW` images, on which a
        weak network may score badly by chance.
      way_out: what the user can do besides setting another mean and std, for the error message.

    Raises:
      DvinvError: the network is no better than chance, has a `field`, and was scored on at least `FEW` images.
    """
    if share is None or network.num_classes < 2 or share * network.num_classes > 1:
        return
    finding = (
        f'{name} recognises {share:.3f} of {count:,} real images, and chance would {1 / network.num_classes:.3f} '
        f'({network.num_classes} classes)'
    )
    if field and count >= FEW:
        raise DvinvError(
            f'{finding}, so its judgements of images are meaningless. It takes pixels with mean {network.mean} and std '
            f'{network.std}; set {field}.mean and {field}.std to those of its training, order the classes of the data as it '
            f'does, or {way_out}.'
        )
    say(f'{finding}.')


def validate_judge(teacher: Teacher, verifier: Classifier, name: str, field: str, without: str) -> None:
    """Validates that a verifier takes the images and classes of the teacher.

    Args:
      name: the name of the verifier in error messages.
      field: the config field with its weights, mean and std.
      without: how to run without this verifier, for the error message.

    Raises:
      DvinvError: it does not; the message names the field and both values.
    """
    channels, numbers = teacher.image_shape[-1], (*verifier.mean, *verifier.std)
    fits = len(verifier.mean) == len(verifier.std) == channels and all(isinstance(value, int | float) for value in numbers)
    if not (fits and min(verifier.std) > 0):
        raise DvinvError(
            f'{field}.mean is {verifier.mean} and {field}.std is {verifier.std}; each must be {channels} numbers, one per '
            'channel, with std above 0, or () for those of the weights.'
        )
    check_normalisation(verifier.mean, verifier.std, f'{field}.')
    for attribute, phrase in (('image_shape', 'takes images of {}'), ('num_classes', 'knows {} classes')):
        of_verifier, of_teacher = (phrase.format(getattr(network, attribute)) for network in (verifier, teacher))
        if of_verifier != of_teacher:
            raise DvinvError(
                f'The {name} {of_verifier}, but the teacher {of_teacher}; give {field}.weights of a network with the image '
                f'shape and classes of the teacher, or {without}.'
            )
