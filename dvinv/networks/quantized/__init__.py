"""Networks of few bits: which layers a network has, their folding, rounding, the ranges of their inputs, and the file.

An own core, as rules on a network's jaxpr. The library qwix (0.1.8) intercepts Linen and NNX modules instead; it has neither
percentile nor least-squares ranges, learned steps, BatchNorm folding nor a packed file, and under this project's versions of
Flax it warns of what it imports, which is an error in our tests.
"""
