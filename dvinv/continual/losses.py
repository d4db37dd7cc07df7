"""What keeps a network from forgetting old classes while it learns new ones, as losses of arrays.

In every batch the first half is real images of the new classes, the second half images of the old ones: synthesized from
the network as it was, the *old network*, or real ones for the control `replay`. Logits are [B, K] with the old classes
first; the old network's are [B, O], O < K. Each function gives named terms, float32 scalars; `total` alone weighs them.
"""

import jax
import jax.numpy as jnp
import optax

from dvinv.evaluation.divergence import divergence


def deepinversion_terms(logits, old_logits, labels, temperature: float) -> dict[str, jax.Array]:
    """The paper's loss (arXiv 1912.08795, section 3.4):

        KL(p_old(x') || p(x')) + CE(y, p(x)) + KL(p_old(x) || p(x | old classes))

    x' are the old classes' images, x, y the new ones. In the first term p_old is 0 for the new classes, so images of old
    ones are taught not to be of new ones; in the third p is the softmax over the old classes alone. Divergences are taken
    at `temperature` T, times T^2.
    """
    classes, half = old_logits.shape[-1], len(logits) // 2
    new, old = logits[:half], logits[half:]
    return {
        'old_images': temperature**2 * divergence(old_logits[half:], old, temperature),
        'new_images': cross_entropy(new, labels[:half]),
        'old_answers': temperature**2 * divergence(old_logits[:half], new[:, :classes], temperature),
    }


def always_be_dreaming_terms(logits, head_logits, features, old_logits, labels, old_head) -> dict[str, jax.Array]:
    """The loss of Always Be Dreaming (Smith et al., arXiv 2106.09701, section 5), for old classes that are like new ones:

        new_images   CE of the new images among the new classes alone: nothing pushes old classes away
        head         CE of all images among all classes, each half weighing as many classes as it is of, on detached
                     features f: the head alone learns to tell old from new
        features     mean over images and old classes of |W_old f(x) - W_old f_old(x)|^2: features are kept as far as the old
                     network's head, frozen, looks at them

    Args:
      head_logits: the head's answers to detached features, [B, K].
      features: what the head is called with, [B, D].
      old_head: {'kernel': [D, O], 'bias': [O]} of the old network.
    """
    classes, half = old_logits.shape[-1], len(logits) // 2
    share = classes / logits.shape[-1]
    kept = features.astype(jnp.float32) @ old_head['kernel'] + old_head.get('bias', 0.0)
    return {
        'new_images': cross_entropy(logits[:half, classes:], labels[:half] - classes),
        'head': (1 - share) * cross_entropy(head_logits[:half], labels[:half])
        + share * cross_entropy(head_logits[half:], labels[half:]),
        'features': jnp.square(kept - old_logits.astype(jnp.float32)).mean(),
    }


def lwf_mc_terms(logits, old_logits, labels) -> dict[str, jax.Array]:
    """LwF.MC (Rebuffi et al., iCaRL, arXiv 1611.07725, sections 3.3 and 4), which sees new images alone:

    mean over images of the sum over classes of the binary cross-entropy of sigmoid(logit), to the label for new classes,
    to the old network's sigmoid for old ones
    """
    classes = old_logits.shape[-1]
    targets = jax.nn.one_hot(labels - classes, logits.shape[-1] - classes)
    old, new = (
        optax.sigmoid_binary_cross_entropy(answers.astype(jnp.float32), wanted).sum(-1).mean()
        for answers, wanted in (
            (logits[:, :classes], jax.nn.sigmoid(old_logits.astype(jnp.float32))),
            (logits[:, classes:], targets),
        )
    )
    return {'new_images': new, 'old_answers': old}


def cross_entropy(logits, labels) -> jax.Array:
    """Mean over images of -log p(label)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def total(terms: dict[str, jax.Array], weights: dict[str, float]) -> jax.Array:
    """The weighted sum; a term without a weight counts once."""
    return sum(weights.get(name, 1.0) * term for name, term in terms.items())
