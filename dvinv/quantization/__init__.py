"""The task `quantization`: a network in few bits, by images synthesized from it."""
