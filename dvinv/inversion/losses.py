"""The terms of DeepInversion's objective and other priors, as plain functions of arrays (arXiv 1912.08795, section 3).

Every term is returned unweighted; the weights are applied only in `step.py`. A batch may be split over the devices
of a mesh axis. The argument `axis` then names this axis, and sums are reduced over it *before* the square root is taken,
so that the value is that of the whole batch (the feature term, the L2 form of the total variation and the L2 term for
CIFAR couple all images of a batch).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from dvinv.networks.classifier import AnyArray, Images, Labels, Logits, PerImage, Scalar

# Added inside every square root, because the gradient of an L2 norm that is not squared is NaN at zero in JAX.
EPSILON = 1e-12
LARGE = 8.0  # a first layer with a larger running deviation, over all channels, has pixels from 0 to 255 as its input
LOG_ZERO = -1e30  # a finite substitute for log 0
DENSITY_POINTS = 32  # the number of points at which the density is evaluated
DENSITY_MARGIN = 3.0  # the first and last point are so many bandwidths beyond the lowest and highest similarity


def psum(tree, axis: str | None):
    """Returns the sum of a pytree over the mesh axis `axis`, or the tree itself if the batch is not split."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def pmean(tree, axis: str | None):
    """Returns the mean of a pytree over the mesh axis `axis` (of equal shards), or the tree itself if it is not split."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def safe_norm(x: AnyArray, axis=None) -> jax.Array:
    """Computes the L2 norm ||x||_2, not squared, over `axis` (all axes if None), with the gradient 0 at x = 0."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis) + EPSILON)


def cross_entropy(logits: Logits, labels: Labels, axis: str | None = None) -> Scalar:
    """Computes the mean cross-entropy of `logits` [B, K] and integer `labels` [B]: L(f(x), y) in eq. 1 of the paper."""
    logits = logits.astype(jnp.float32)
    return pmean(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), axis)


def feature_terms(moments: dict, statistics: dict) -> dict:
    """Computes the paper's R_feature (eq. 4), one term per BatchNorm layer, in the order of `moments`.

        R_l = || mu_l(x) - E[mu_l] ||_2  +  || sigma^2_l(x) - E[sigma^2_l] ||_2

    Args:
      moments: {layer: (mean, variance)} of the layer's *input* over the batch and space, float32 [..., C], biased.
      statistics: {layer: (running mean, running variance)}, of the same shapes.

    Returns:
      {layer: scalar, or [...] where a lifted transform stacked several layers into one}, not divided by the number of
      channels. If the running deviation of the first layer is above `LARGE`, its term is computed in units of that
      deviation: in a network trained on pixels from 0 to 255 the values of the first layer are as large as the pixels, and
      its term would outweigh all other layers and the cross-entropy.
    """
    units = {}
    if moments:
        first = next(iter(moments))
        deviation = jnp.sqrt(jnp.mean(statistics[first][1].astype(jnp.float32), -1))
        units[first] = jnp.where(deviation > LARGE, deviation, 1.0)

    def term(layer, mean, variance):
        unit, (running_mean, running_variance) = units.get(layer, 1.0), statistics[layer]
        return safe_norm(mean - running_mean, -1) / unit + safe_norm(variance - running_variance, -1) / jnp.square(unit)

    return {layer: term(layer, mean, variance) for layer, (mean, variance) in moments.items()}


def feature_loss(terms: dict, first_bn_multiplier: float = 1.0) -> Scalar:
    """Computes R_feature = sum_l m_l R_l, where m_l is `first_bn_multiplier` for the first layer in forward order, else 1.

    If the first layer is a stack (`nn.scan`), the multiplier applies to its first element only. The result is NaN if there
    are no layers.
    """
    if not terms:
        return jnp.float32(jnp.nan)
    total = sum(jnp.sum(term) for term in terms.values())
    first = jnp.ravel(next(iter(terms.values())))[0]
    return total + (first_bn_multiplier - 1.0) * first


def _differences(x: Images) -> tuple:
    """Computes the differences of adjacent pixels of x [B, H, W, C]: horizontal, vertical, and along both diagonals."""
    return (
        x[:, :, 1:] - x[:, :, :-1],
        x[:, 1:] - x[:, :-1],
        x[:, 1:, 1:] - x[:, :-1, :-1],
        x[:, 1:, :-1] - x[:, :-1, 1:],
    )


def total_variation_l2(x: Images, axis: str | None = None) -> Scalar:
    """Computes the L2 form of R_tv: the sum of 4 Frobenius norms over the whole batch x [B, H, W, C]; grows as sqrt(B)."""
    squares = psum(tuple(jnp.sum(jnp.square(d)) for d in _differences(x)), axis)
    return jnp.asarray(sum(jnp.sqrt(s + EPSILON) for s in squares))


def total_variation_l1(x: Images, axis: str | None = None) -> Scalar:
    """Computes the L1 form of R_tv: the sum of four means of absolute differences of x [B, H, W, C]; independent of B."""
    # d sign(d) is |d| with the gradient 0 at 0 (that of jnp.abs is 1): clipped pixels are often exactly equal.
    return pmean(sum(jnp.mean(d * jnp.sign(d)) for d in _differences(x)), axis)


def l2_per_image(x: Images, axis: str | None = None) -> Scalar:
    """Computes R_l2 of the ImageNet settings: the mean over images of ||x_i||_2, for x [B, H, W, C]."""
    return pmean(jnp.mean(safe_norm(x.reshape(x.shape[0], -1), 1)), axis)


def l2_per_batch(x: Images, axis: str | None = None) -> Scalar:
    """Computes R_l2 of the CIFAR settings: ||x||_2 of the whole batch x [B, H, W, C]; grows as sqrt(B)."""
    return jnp.sqrt(psum(jnp.sum(jnp.square(x)), axis) + EPSILON)


def jensen_shannon(p_logits: Logits, q_logits: Logits, temperature: float) -> PerImage:
    """Computes the Jensen-Shannon divergence of two predictions for each image.

        JS(p, q) = 0.5 KL(p||m) + 0.5 KL(q||m),   m = (p + q) / 2

    Masked classes, with a logit of -inf in one or both predictions, count as 0 log 0 = 0.

    Args:
      p_logits, q_logits: [B, K].
      temperature: The logits are divided by it.

    Returns:
      float32 [B], in [0, ln 2].
    """
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (p_logits, q_logits))
    # A finite substitute: products of -inf with exp(-inf) = 0, and the gradient of logaddexp(-inf, -inf), would be NaN.
    log_p, log_q = (jnp.where(log == -jnp.inf, LOG_ZERO, log) for log in (log_p, log_q))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    kl_pm = jnp.sum(jnp.exp(log_p) * (log_p - log_m), -1)
    kl_qm = jnp.sum(jnp.exp(log_q) * (log_q - log_m), -1)
    return 0.5 * (kl_pm + kl_qm)


def competition(teacher_logits: Logits, student_logits: Logits, axis: str | None = None, temperature: float = 3.0) -> Scalar:
    """Computes R_compete of Adaptive DeepInversion (eq. 5): 1 - JS(p_teacher, p_student), the mean over images.

    JS is the Jensen-Shannon divergence as the paper defines it. It is at most ln 2, so nothing is clipped, and its gradient
    does not vanish where teacher and student disagree with confidence. The gradient flows through both networks into the
    pixels.
    """
    return 1.0 - pmean(jnp.mean(jensen_shannon(teacher_logits, student_logits, temperature)), axis)


TOTAL_VARIATION = {'l2': total_variation_l2, 'l1': total_variation_l1}
L2 = {'image': l2_per_image, 'batch': l2_per_batch}


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
    low, high = (
        fixed.min(1, keepdims=True) - DENSITY_MARGIN * bandwidth,
        fixed.max(1, keepdims=True) + DENSITY_MARGIN * bandwidth,
    )
    places = low + (high - low) * jnp.linspace(0.0, 1.0, DENSITY_POINTS)[None]
    apart = (places[:, :, None] - similarities[:, None]) / bandwidth[:, :, None]
    density = jnp.exp(-0.5 * jnp.square(apart)).mean(2) / (jnp.sqrt(2 * jnp.pi) * bandwidth)
    entropy = -jnp.sum(density * jnp.log(density + EPSILON), 1) * (high - low)[:, 0] / (DENSITY_POINTS - 1)
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
