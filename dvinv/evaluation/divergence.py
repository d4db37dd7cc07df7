"""The KL divergence between the outputs of two networks."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dvinv.networks.arrays import AnyArray, Logits, Scalar


def divergence(target_logits: Float[AnyArray, 'B O'], logits: Logits, temperature: float = 1.0) -> Scalar:
    """Computes the mean over images of KL(p_target || p), with softmaxes at `temperature`.

    Args:
      target_logits: logits of the target, [B, O].
      logits: logits of the network, [B, K]. If O < K, the target is missing the last classes. These have p_target = 0, and
        so have masked classes, with a target logit of -inf: their terms are 0 log 0 = 0.
      temperature: the temperature of both softmaxes.

    Returns:
      A float32 scalar, in nats.
    """
    target_log_p, log_p = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (target_logits, logits))
    differences = jnp.where(target_log_p == -jnp.inf, 0, target_log_p - log_p[:, : target_log_p.shape[-1]])
    return jnp.sum(jnp.exp(target_log_p) * differences, -1).mean()
