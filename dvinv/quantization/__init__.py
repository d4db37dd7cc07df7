"""The task `quantization`: quantizing a network to a few bits with images synthesized from it."""
