"""Losses against forgetting old classes while a network learns new ones, as functions of arrays.

In every batch, the first half is real images of the new classes, and the second half images of the old ones: synthesized
from the network before the task, the *old network*, or real ones for the control `replay`. Logits are [B, K] with the old
classes first; those of the old network are [B, O], O < K. Each function returns named terms, float32 scalars; only `total`
applies weights.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from dvinv.evaluation import divergence
from dvinv.networks.classifier import AnyArray, Features, Labels, Logits, Scalar

OldLogits = Float[AnyArray, 'B O']


def deepinversion_terms(logits: Logits, old_logits: OldLogits, labels: Labels, temperature: float) -> dict[str, Scalar]:
    """Computes the terms of the loss of the DeepInversion paper (arXiv 1912.08795, section 3.4).

        KL(p_old(x') || p(x')) + CE(y, p(x)) + KL(p_old(x) || p(x | old classes))

    x' are the images of the old classes, and x, y those of the new classes and their labels. In the first term p_old is 0
    for the new classes, so the network learns that images of old classes are not of new ones. In the third term p is the
    softmax over the old classes only. Divergences are at `temperature` T, multiplied by T^2.
    """
    classes, half = old_logits.shape[-1], len(logits) // 2
    of_new_images, of_old_images = logits[:half], logits[half:]
    return {
        'old_images': temperature**2 * divergence(old_logits[half:], of_old_images, temperature),
        'new_images': cross_entropy(of_new_images, labels[:half]),
        'old_answers': temperature**2 * divergence(old_logits[:half], of_new_images[:, :classes], temperature),
    }


def always_be_dreaming_terms(
    logits: Logits, head_logits: Logits, features: Features, old_logits: OldLogits, labels: Labels, old_head
) -> dict[str, Scalar]:
    """Computes the terms of Always Be Dreaming (Smith et al., arXiv 2106.09701, section 5), for similar old and new classes.

        new_images   CE of the new images over the new classes only, so that it does not push old classes away
        head         CE of all images over all classes, on detached features f, so that only the head learns to distinguish
                     old from new; each half has a weight proportional to its number of classes
        features     mean over images and old classes of |W_old f(x) - W_old f_old(x)|^2, which preserves features in the
                     directions that the frozen head of the old network uses

    Args:
      head_logits: the logits of the head on detached features, [B, K].
      features: the inputs of the head, [B, D].
      old_head: {'kernel': [D, O], 'bias': [O]} of the old network.
    """
    classes, half = old_logits.shape[-1], len(logits) // 2
    share = classes / logits.shape[-1]
    old_head_logits = features.astype(jnp.float32) @ old_head['kernel'] + old_head.get('bias', 0.0)
    return {
        'new_images': cross_entropy(logits[:half, classes:], labels[:half] - classes),
        'head': (1 - share) * cross_entropy(head_logits[:half], labels[:half])
        + share * cross_entropy(head_logits[half:], labels[half:]),
        'features': jnp.square(old_head_logits - old_logits.astype(jnp.float32)).mean(),
    }


def lwf_mc_terms(logits: Logits, old_logits: OldLogits, labels: Labels) -> dict[str, Scalar]:
    """Computes the terms of LwF.MC (Rebuffi et al., iCaRL, arXiv 1611.07725, sections 3.3 and 4), for new images only.

    Each is the mean over images of the sum over classes of the binary cross-entropy of sigmoid(logit). The targets are the
    labels for new classes, and the sigmoids of the old network for old classes.
    """
    classes = old_logits.shape[-1]
    old_targets = jax.nn.sigmoid(old_logits.astype(jnp.float32))
    new_targets = jax.nn.one_hot(labels - classes, logits.shape[-1] - classes)

    def binary_cross_entropy(logits: Logits, targets: Logits) -> Scalar:
        return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(-1).mean()

    return {
        'new_images': binary_cross_entropy(logits[:, classes:], new_targets),
        'old_answers': binary_cross_entropy(logits[:, :classes], old_targets),
    }


def cross_entropy(logits: Logits, labels: Labels) -> Scalar:
    """Computes the mean over images of -log p(label)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def total(terms: dict[str, Scalar], weights: dict[str, float]) -> Scalar:
    """Computes the weighted sum of the terms; the default weight is 1."""
    return jnp.asarray(sum(weights.get(name, 1.0) * term for name, term in terms.items()))
