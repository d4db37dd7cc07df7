"""What images are judged by beside the config's `verifier`: networks from weights files, a dict each in `verifiers`."""

import dataclasses

import ml_collections

from dvinv.errors import DvinvError, say
from dvinv.inversion.teacher import Teacher
from dvinv.networks import Classifier, classifier_of, describes_itself, read_classifier
from dvinv.networks.classifier import check_normalisation

FEW = 100  # real images, below which a share of them does not prove much


@dataclasses.dataclass(frozen=True)
class Verifier:
    """One of `config.verifiers`."""

    network: str  # its name in dvinv.networks, and that of its figures
    weights: str  # path of a network file, or of weights that others published
    width: float = 1.0
    mean: tuple[float, ...] = ()  # a channel, for pixels in [0, 1]; (): see `read_verifier`
    std: tuple[float, ...] = ()


def load_others(config, teacher: Teacher, say: bool = False) -> dict[str, Classifier]:
    """{network: what it is} of `config.verifiers`, in their order.

    Args:
      say: whether `print_pixels` is called for each.

    Raises:
      DvinvError: one is not told right, is not there, or takes other pictures or classes than the teacher.
    """
    found = {}
    for index, verifier in enumerate(_told(config)):
        field = f'verifiers[{index}]'
        found[verifier.network] = read_verifier(verifier, field, teacher)
        if say:
            print_pixels(verifier, field, found[verifier.network])
        check_alike(teacher, found[verifier.network], f'verifier {verifier.network}', field, 'leave it out')
    return found


def read_verifier(group, field: str, teacher: Classifier) -> Classifier:
    """Reads a network that judges images from its weights file.

    Where `group` gives no mean and std: those of the file; else of the published weights of this network, else the
    teacher's. `print_pixels` says them.

    Args:
      group: with the fields of a `Verifier`.
      field: of the config, that names them.

    Raises:
      DvinvError: see `read_classifier`.
    """
    own = describes_itself(group.weights)
    read = read_classifier(
        group.weights,
        group.network,
        mean=tuple(group.mean),
        std=tuple(group.std),
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


def check_alike(teacher: Teacher, verifier: Classifier, name: str, field: str, without: str) -> None:
    """Refuse a verifier for other pictures or classes than the teacher's.

    Args:
      name: what a refusal calls it.
      field: of the config, that tells its weights, mean and std.
      without: how to do without it.
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


def _told(config) -> list[Verifier]:
    """`config.verifiers`, of the right types, with names that differ."""
    verifiers, names = [], [config.verifier.network]
    if config.verifiers and not config.verifier.network:
        raise DvinvError("verifiers names some, but verifier.network is ''; let that be the first of them.")
    for index, entry in enumerate(config.verifiers):
        verifier = _verifier(f'verifiers[{index}]', entry)
        if verifier.network in names:
            raise DvinvError(
                f'verifiers[{index}].network is {verifier.network}, and so is that of another verifier; figures go by the '
                "network's name, so leave one out."
            )
        names.append(verifier.network)
        verifiers.append(verifier)
    return verifiers


def _verifier(field: str, entry) -> Verifier:
    """The `Verifier` that an item of `config.verifiers`, called `field`, tells of."""
    if not isinstance(entry, dict | ml_collections.ConfigDict):
        raise DvinvError(
            f"{field} is {entry!r}; it must be a dict, as in verifiers=({{'network': NAME, 'weights': PATH}},)."
        )
    entry, known = dict(entry), [known.name for known in dataclasses.fields(Verifier)]
    if unknown := sorted(map(str, entry.keys() - known)):
        raise DvinvError(f'{field} has the key {unknown[0]!r}; choose among {", ".join(known)}.')
    for name in ('network', 'weights'):
        if not (isinstance(entry.get(name), str) and entry[name]):
            raise DvinvError(
                f'{field}.{name} is {entry.get(name, "")!r}; name a network and the file of its weights, for only the '
                'first verifier is trained here.'
            )
    if not isinstance(entry.get('width', 1.0), int | float):
        raise DvinvError(f'{field}.width is {entry["width"]!r}; it must be a number.')
    for name in ('mean', 'std'):
        values = entry.get(name, ())
        if not isinstance(values, tuple | list) or not all(isinstance(value, int | float) for value in values):
            raise DvinvError(f'{field}.{name} is {values!r}; it must be one number a channel, or () for the usual.')
        entry[name] = tuple(values)
    if min(entry['std'], default=1) <= 0:
        raise DvinvError(f'{field}.std is {entry["std"]}; every standard deviation must be above 0.')
    return Verifier(**entry)
