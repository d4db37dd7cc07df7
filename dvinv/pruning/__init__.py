"""The task `pruning`: a network that is really smaller, by images synthesized from it."""
