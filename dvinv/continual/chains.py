"""The networks that learn the tasks of `continual` side by side, each from the one that it was: chains, by name."""

from dvinv.config import ContinualSettings

MAIN = 'continual'


def chains_of(settings: ContinualSettings) -> dict[str, str]:
    """{name: loss} of the networks that learn all tasks, the run's own first."""
    chains = {MAIN: settings.loss}
    for control in settings.controls:
        if control != 'joint':
            chains[control] = settings.loss if control == 'replay' else control
    return chains


def name_of(settings: ContinualSettings, chain: str, number: int) -> str:
    """What the network of a chain after task `number` goes by: that of the last task by the chain's name."""
    return chain if number == len(settings.steps) else f'{chain}_{number}'


def names_of_networks(settings: ContinualSettings, number: int) -> list[str]:
    """All that are there when task `number` has been learned."""
    names = [name_of(settings, chain, number) for chain in chains_of(settings)]
    return names + ['joint'] * ('joint' in settings.controls and number == len(settings.steps))
