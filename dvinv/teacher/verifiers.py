"""Networks that judge images: reading them from weights files, and validating that they fit the teacher."""

from collections.abc import Sequence

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
    found = {}
    for index, verifier in enumerate(verifiers):
        field = f'verifiers[{index}]'
        found[verifier.network] = read_verifier(verifier, field, teacher)
        if say:
            print_pixels(verifier, field, found[verifier.network])
        validate_judge(teacher, found[verifier.network], f'verifier {verifier.network}', field, 'leave it out')
    return found


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
    own = describes_itself(group.weights)
    read = read_classifier(
        group.weights,
        group.network,
        mean=group.mean,
        std=group.std,
        width=group.width,
        image_shape=None if own else teacher.image_shape,
        field=f'{field}.network',
        default_pixels=(teacher.mean, teacher.std),
    )
    return classifier_of(*read)


def print_pixels(group, field: str, network: Classifier) -> None:
    """Prints the mean and std that are used for published weights if the settings do not give both."""
    if (group.mean and group.std) or describes_itself(group.weights):
        return
    say(
        f'{field}: the weights {group.weights} do not tell their mean and std; the pixels of this {group.network} are '
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
    found = (
        f'{name} recognises {share:.3f} of {count:,} real images, and chance would {1 / network.num_classes:.3f} '
        f'({network.num_classes} classes)'
    )
    if field and count >= FEW:
        raise DvinvError(
            f'{found}: what it says of images means nothing. It is given pixels with mean {network.mean} and std '
            f"{network.std}; give {field}.mean and {field}.std of its training, have the data's classes in its order, or "
            f'{way_out}.'
        )
    say(f'{found}.')


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
            f'{field}.mean is {verifier.mean} and {field}.std {verifier.std}; each must be {channels} numbers, one a '
            'channel, std above 0, or () for those that the weights are known to take.'
        )
    check_normalisation(verifier.mean, verifier.std, f'{field}.')
    for attribute, says in (('image_shape', 'takes images of {}'), ('num_classes', 'knows {} classes')):
        theirs, ours = getattr(verifier, attribute), getattr(teacher, attribute)
        if theirs != ours:
            raise DvinvError(
                f'The {name} {says.format(theirs)}, but the teacher {says.format(ours)}; give {field}.weights of a network '
                f'like the teacher, or {without}.'
            )
