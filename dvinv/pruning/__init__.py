"""The task `pruning`: structured pruning, which makes arrays smaller, with images synthesized from the network."""
