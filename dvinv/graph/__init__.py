"""Analysis of a network's program (its jaxpr): finding and replacing the outputs of its stages."""
