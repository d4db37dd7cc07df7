"""Networks that judge images: reading them from weights files, and validating that they can judge."""

from collections.abc import Sequence

from dvinv.config import MoreVerifierSettings, VerifierSettings
from dvinv.errors import DvinvError, say
from dvinv.inversion.teacher import Teacher
from dvinv.networks import Classifier, classifier_of, describes_itself, read_classifier
from dvinv.networks.classifier import check_normalisation

FEW = 100  # real images, below which a share of them does not prove much


def load_more(verifiers: Sequence[MoreVerifierSettings], teacher: Teacher, say: bool = False) -> dict[str, Classifier]:
    """Returns {network: the network} of additional verifiers, in their order.

    Args:
      verifiers: those of the settings.
      say: whether `print_pixels` is called for each.

    Raises:
      DvinvError: one is not there, or takes other pictures or classes than the teacher.
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

    Where `group` gives no mean and std: those of the file; else of the published weights of this network, else the
    teacher's. `print_pixels` says them.

    Args:
      group: names the file and the network.
      field: of the config, that names them.

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
        otherwise=(teacher.mean, teacher.std),
    )
    return classifier_of(*read)


def print_pixels(group, field: str, network: Classifier) -> None:
    """Says, where weights that others published were given without mean or std, with what pixels they are used."""
    if (group.mean and group.std) or describes_itself(group.weights):
        return
    say(
        f'{field}: the weights {group.weights} do not tell their mean and std; the pixels of this {group.network} are '
        f'normalised by mean {network.mean} and std {network.std} ({field}.mean and {field}.std set others).'
    )


def refuse_chance(share: float | None, count: int, network: Classifier, name: str, field: str, way_out: str) -> None:
    """Refuses a network from a weights file that recognises no more real images than chance would.

    Args:
      share: of `count` real images that `network` puts into their class; None: there are none.
      name: what a refusal calls it.
      field: of the config, with its weights, mean and std; '': it was trained here, and may have been for a short time, so
        this is said alone. So it is of fewer than `FEW` images, on which a weak network may have bad luck.
      way_out: besides another mean and std.
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
    """Validates that a verifier takes the teacher's pictures and classes.

    Args:
      name: what the sentence calls it.
      field: of the config, with its weights, mean and std.
      without: how to do without it.

    Raises:
      DvinvError: names the field and both values.
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
