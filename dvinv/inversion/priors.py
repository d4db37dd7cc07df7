"""Priors for networks without running statistics, as plain functions of pixels and of attention outputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dvinv.inversion.losses import EPSILON, pmean, safe_norm
from dvinv.networks.arrays import AnyArray, Images, Scalar

POINTS = 32  # the number of points at which the density is evaluated
MARGIN = 3.0  # the first and last point are so many bandwidths beyond the lowest and highest similarity


def pixel_moments(x: Images, axis: str | None = None) -> Scalar:
    """Computes how far mean and variance per channel of normalised pixels are from 0 and 1; float32 scalar.

        ||mu(x)||_2 + ||sigma^2(x) - 1||_2

    A network normalises pixels by the mean and standard deviation of its training images, so that their pixels have mean 0
    and variance 1 over all images and positions. This is all that the network itself says about the training pixels, and it
    holds only if its mean and std were measured on them, instead of being set to .5 for instance.

    Args:
      x: Images before augmentation, [B, H, W, C], normalised.
      axis: The mesh axis over which the batch is split, or None.
    """
    x = x.astype(jnp.float32)
    mean = pmean(x.mean((0, 1, 2)), axis)
    variance = pmean(jnp.square(x - mean[None, None, None]).mean((0, 1, 2)), axis)
    return safe_norm(mean) + safe_norm(variance - 1)


def patch_similarity_entropy(tokens: Float[AnyArray, 'B ... C'], axis: str | None = None) -> Scalar:
    """Computes the differential entropy of the similarities between patches, the mean over images; float32 scalar.

    In images of objects, patches are similar or dissimilar depending on their content; in noise all patches are equally
    similar. The similarities of attention outputs of real images therefore have a wide distribution (PSAQ-ViT, arXiv
    2203.02250, section 3):

        G_ij = u_i . u_j / (||u_i|| ||u_j||)       cosine similarity of the outputs u_i and u_j of two patches, i < j
        f(s) = 1/(M h) sum_m K((s - G_m) / h)      density by a Gaussian kernel K over all M similarities of an image
        H    = - integral of f(s) log f(s) ds

    The bandwidth h is that of the normal reference rule, 1.06 deviation M^(-1/5). No gradient flows through h and the
    points s.

    Args:
      tokens: The output of an attention layer, [B, ..., C]; all axes except the first and last are axes of patches.
      axis: The mesh axis over which the batch is split, or None.
    """
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1]).astype(jnp.float32)
    tokens = tokens * jax.lax.rsqrt(jnp.sum(jnp.square(tokens), -1, keepdims=True) + EPSILON)
    rows, columns = jnp.triu_indices(tokens.shape[1], 1)
    similarities = jnp.einsum('bic,bjc->bij', tokens, tokens)[:, rows, columns]
    count = similarities.shape[1]
    if count < 2:
        return jnp.float32(0.0)
    fixed = jax.lax.stop_gradient(similarities)
    bandwidth = jnp.maximum(1.06 * jnp.std(fixed, 1, keepdims=True) * count**-0.2, 1e-4)
    low, high = fixed.min(1, keepdims=True) - MARGIN * bandwidth, fixed.max(1, keepdims=True) + MARGIN * bandwidth
    places = low + (high - low) * jnp.linspace(0.0, 1.0, POINTS)[None]
    apart = (places[:, :, None] - similarities[:, None]) / bandwidth[:, :, None]
    density = jnp.exp(-0.5 * jnp.square(apart)).mean(2) / (jnp.sqrt(2 * jnp.pi) * bandwidth)
    entropy = -jnp.sum(density * jnp.log(density + EPSILON), 1) * (high - low)[:, 0] / (POINTS - 1)
    return pmean(entropy.mean(), axis)


def patch_similarity(captured: dict, axis: str | None = None) -> Scalar:
    """Computes the prior of PSAQ-ViT, - sum over blocks of `patch_similarity_entropy`.

    Args:
      captured: The attention outputs as captured by `Tap`, {place: its arrays, one per call}.
      axis: The mesh axis over which the batch is split, or None.

    Returns:
      A float32 scalar.
    """
    return jnp.asarray(-sum(patch_similarity_entropy(tokens, axis) for calls in captured.values() for tokens in calls))
