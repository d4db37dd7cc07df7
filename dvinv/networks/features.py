"""The inputs of the last layer of any network: the features with which sets of images are compared."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from dvinv.graph.rewriting import rewritten


def with_features(apply_fn: Callable) -> Callable:
    """Returns `(variables, x) -> (logits [B, K], features [B, D])` for `apply_fn`, which returns the logits only.

    The features are the first operand of the last matrix product or convolution, averaged over spatial axes if it has any.
    """

    def run(variables, x):
        last = []

        def watched(primitive):
            def rule(params):
                settings = {name: value for name, value in params.items() if name != 'avals'}

                def bind(first, second):
                    last[:] = [first]
                    return primitive.bind(first, second, **settings)

                return bind

            return rule

        rules = {primitive.name: watched(primitive) for primitive in (conv_general_dilated_p, dot_general_p)}
        logits = rewritten(apply_fn, rules)(variables, x)
        (features,) = last
        features = features.reshape(len(features), -1, features.shape[-1]).mean(1)
        return logits, features.astype(jnp.float32)

    return run
