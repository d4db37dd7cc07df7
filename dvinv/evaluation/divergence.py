"""How far a network's answers are from those of the network that it is to be like."""

import jax
import jax.numpy as jnp


def divergence(target_logits: jax.Array, logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean over images of KL(p_target || p), softmaxes at `temperature`; float32 scalar.

    Args:
      target_logits: [B, O], `logits`: [B, K]. Classes that the target lacks (O < K, the last ones) have p_target = 0, and
        so have masked ones, with a logit of -inf: they count as 0 log 0 = 0.
    """
    targets, answers = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (target_logits, logits))
    differences = jnp.where(targets == -jnp.inf, 0, targets - answers[:, : targets.shape[-1]])
    return jnp.sum(jnp.exp(targets) * differences, -1).mean()
