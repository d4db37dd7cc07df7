"""The KL divergence between the outputs of two networks."""

import jax
import jax.numpy as jnp
import numpy as np


def divergence(target_logits: jax.Array | np.ndarray, logits: jax.Array | np.ndarray, temperature: float = 1.0) -> jax.Array:
    """Computes the mean over images of KL(p_target || p), with softmaxes at `temperature`.

    Args:
      target_logits: logits of the target, [B, O].
      logits: logits of the network, [B, K]. If O < K, the target is missing the last classes. These have p_target = 0, and
        so have masked classes, with a target logit of -inf: their terms are 0 log 0 = 0.
      temperature: the temperature of both softmaxes.

    Returns:
      A float32 scalar, in nats.
    """
    targets, answers = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (target_logits, logits))
    differences = jnp.where(targets == -jnp.inf, 0, targets - answers[:, : targets.shape[-1]])
    return jnp.sum(jnp.exp(targets) * differences, -1).mean()
