"""Chains: the sequences of networks that learn the tasks of `continual` one by one, for the run and its controls."""

from dvinv.config import CONTINUAL_LOSSES, ContinualSettings

MAIN = 'continual'


def chains_of(settings: ContinualSettings) -> dict[str, str]:
    """Returns {name of a chain: loss} for all chains, that of the run first; `joint` is not a chain."""
    losses = {control: settings.loss if control == 'replay' else control for control in settings.controls}
    return {MAIN: settings.loss, **{name: loss for name, loss in losses.items() if name != 'joint'}}


def synthesizing(settings: ContinualSettings) -> list[str]:
    """Returns the names of the chains that learn from images that they synthesize."""
    return [chain for chain, loss in chains_of(settings).items() if chain != 'replay' and loss in CONTINUAL_LOSSES]


def pools_of(settings: ContinualSettings) -> int:
    """Returns the number of pools of all tasks: one for the first, which all chains share, then one per chain."""
    return 1 + (len(settings.steps) - 1) * len(synthesizing(settings))


def name_of(settings: ContinualSettings, chain: str, number: int) -> str:
    """Returns the name of the network of a chain after task `number`; after the last task it is the name of the chain."""
    return chain if number == len(settings.steps) else f'{chain}_{number}'


def names_of_networks(settings: ContinualSettings, number: int) -> list[str]:
    """Returns the names of all networks that result from task `number`."""
    names = [name_of(settings, chain, number) for chain in chains_of(settings)]
    return names + ['joint'] * ('joint' in settings.controls and number == len(settings.steps))
