"""Layers with PyTorch's semantics, for the networks whose published weights come from there."""

import flax.linen as nn


def conv(channels: int, size: int, stride: int = 1, *, bias: bool = False, name: str) -> nn.Conv:
    """A square convolution, padded alike on every side (Flax's SAME would pad stride 2 on one side only)."""
    margin = (size // 2, size // 2)
    return nn.Conv(channels, (size, size), (stride, stride), (margin, margin), use_bias=bias, name=name)


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """BatchNorm with PyTorch's epsilon and momentum (its .1 is Flax's .9)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
