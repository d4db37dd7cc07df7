"""The inputs of the last layer of any network: the features with which sets of images are compared."""

from collections.abc import Callable

import jax.numpy as jnp

from dvinv.graph.rewriting import contraction_rules, rewritten


def with_features(apply_fn: Callable) -> Callable:
    """Returns `(variables, x) -> (logits [B, K], features [B, D])` for `apply_fn`, which returns the logits only.

    The features are the first operand of the last matrix product or convolution, averaged over spatial axes if it has any.
    """

    def run(variables, x):
        inputs = []  # the first operand of the last operation so far

        def rule(primitive, params):
            def bind(first, second):
                inputs[:] = [first]
                return primitive.bind(first, second, **params)

            return bind

        logits = rewritten(apply_fn, contraction_rules(rule))(variables, x)
        (features,) = inputs
        features = features.reshape(len(features), -1, features.shape[-1]).mean(1)
        return logits, features.astype(jnp.float32)

    return run
