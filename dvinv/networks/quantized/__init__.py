"""Quantized networks: finding the layers, folding BatchNorms, rounding, calibrating input ranges, and the file format.

The implementation is a set of rules on a network's jaxpr. The library qwix (0.1.8) intercepts Linen and NNX modules instead;
it has no percentile or least-squares ranges, learned steps, BatchNorm folding or packed file, and under this project's
versions of Flax its imports raise warnings, which are errors in our tests.
"""
