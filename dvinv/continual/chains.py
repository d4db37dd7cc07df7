"""The networks that learn the tasks of `continual` side by side, each from the one that it was: chains, by name."""

MAIN = 'continual'


def chains_of(config) -> dict[str, str]:
    """{name: loss} of the networks that learn all tasks, the run's own first."""
    chains = {MAIN: config.continual.loss}
    for control in config.continual.controls:
        if control != 'joint':
            chains[control] = config.continual.loss if control == 'replay' else control
    return chains


def name_of(config, chain: str, number: int) -> str:
    """What the network of a chain after task `number` goes by: that of the last task by the chain's name."""
    return chain if number == len(config.continual.steps) else f'{chain}_{number}'


def names_of_networks(config, number: int) -> list[str]:
    """All that are there when task `number` has been learned."""
    names = [name_of(config, chain, number) for chain in chains_of(config)]
    return names + ['joint'] * ('joint' in config.continual.controls and number == len(config.continual.steps))
