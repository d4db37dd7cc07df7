"""Measures of image quality, from the outputs and features of a network that had no part in making the images.

With p(y|x) the outputs of that network and f(x) [D] the inputs of its last layer:

- inception score: exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498), from 1 to the number of classes;
- Frechet distance between Gaussians with the moments of the features of synthesized and of real images (Heusel et al., arXiv
  1706.08500); biased upwards unless the number of images is many times D;
- kernel distance: MMD^2 of f with the kernel (f f' / D + 1)^3, unbiased for any number of images, so it may be below 0
  (Binkowski et al., arXiv 1801.01401);
- spread: the mean squared distance of features to the mean of their class, divided by that to the mean of all features: 0 if
  all images of a class are the same, about 1 if classes cannot be distinguished;
- nearest: the mean cosine between the features of an image and those of the nearest other image.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Integer

from dvinv.data.dataset import RealData
from dvinv.data.pool import ImagePool
from dvinv.data.rows import RowArray
from dvinv.errors import DvinvError
from dvinv.evaluation.scoring import logits_and_features_of, top_accuracy
from dvinv.networks import Classifier

MOST_POOL_IMAGES = 5_000  # maximum number of images, evenly spaced over a pool
KERNEL_MOST = 2_000


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The outputs of a network on a set of images: logits float32 [N, K], features float32 [N, D], and labels int [N]."""

    logits: Float[np.ndarray, 'N K']
    features: Float[np.ndarray, 'N D']
    labels: Integer[np.ndarray, ' N']


def judge(network: Classifier, images: RowArray, labels: RowArray, batch_size: int = 128) -> Judgement:
    """Returns the outputs of `network` on at most `MOST_POOL_IMAGES` evenly spaced images.

    Args:
      network: the network that judges.
      images: pixels uint8 [N, H, W, C].
      labels: int [N].
      batch_size: the number of images that run through the network at a time.
    """
    chosen = evenly(len(images), MOST_POOL_IMAGES)
    return Judgement(*logits_and_features_of(network, images, chosen, batch_size), np.asarray(labels[chosen]))


def evenly(count: int, most: int) -> Integer[np.ndarray, ' n']:
    """Returns at most `most` of the numbers below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def figures(images: Judgement, real: Judgement | None = None) -> dict:
    """Computes the figures of a set of images, which are described at the top of this module.

    Args:
      images: the images.
      real: real images to compare with; None: the distances are None.

    Raises:
      DvinvError: there are fewer than two images, or the real images were judged by another network.
    """
    if len(images.labels) < 2 or (real and len(real.labels) < 2):
        raise DvinvError('The quality of images cannot be measured on fewer than two images; make more.')
    if real and real.features.shape[1] != images.features.shape[1]:
        raise DvinvError('Synthesized and real images were judged by different networks; use the same network for both.')
    return {
        **recognised(images),
        'inception_score': inception_score(images.logits),
        **distances(images, real),
        'spread': spread(images.features, images.labels),
        'nearest': nearest(images.features),
    }


def distances(images: Judgement, real: Judgement | None) -> dict:
    """Computes the distances to real images.

    They are None without real images. Those of real images to themselves are set to 0, because an estimate has an error.
    """
    if real is None or images is real:
        return dict.fromkeys(('frechet_distance', 'kernel_distance'), None if real is None else 0.0)
    return {
        'frechet_distance': frechet_distance(images.features, real.features),
        'kernel_distance': kernel_distance(images.features, real.features),
    }


def recognised(images: Judgement) -> dict:
    """Returns the top-1 and top-5 accuracies of the network; the latter is None if there are at most five classes."""
    has_top5 = images.logits.shape[1] > 5
    return {
        'recognised': top_accuracy(images.logits, images.labels),
        'recognised_top5': top_accuracy(images.logits, images.labels, 5) if has_top5 else None,
    }


def figures_of_sets(
    verifier: Classifier, others: dict[str, Classifier], pools: dict[str, ImagePool], real: RealData | None
) -> dict[str, dict]:
    """Computes the figures of several pools and of real images, to which the pools are compared.

    Args:
      verifier: the network that judges the images.
      others: {name: network} of further verifiers.
      pools: {name: pool}.
      real: real data, if any; training images are preferred to test images.

    Returns:
      {name: figures by `verifier`} of all pools and of 'real'. The entry 'verifiers' of the figures is {name: `recognised`}
      for the networks in `others`.
    """
    sets: dict[str, tuple[RowArray, RowArray]] = {
        name: (pool.rows('images'), pool.rows('labels')) for name, pool in pools.items()
    }
    if real:
        split = real.train or real.test
        sets['real'] = split.images, split.labels
    judged = {name: judge(verifier, *images) for name, images in sets.items()}
    return {
        name: {
            **figures(judged[name], judged.get('real')),
            'verifiers': {network: recognised(judge(other, *images)) for network, other in others.items()},
        }
        for name, images in sets.items()
    }


def inception_score(logits: Float[np.ndarray, 'N K']) -> float:
    """Computes exp E KL(p(y|x) || p(y)) from logits [N, K]."""
    logits = logits.astype(np.float64)
    log_p = logits - logits.max(1, keepdims=True)
    log_p = np.maximum(log_p - np.log(np.exp(log_p).sum(1, keepdims=True)), -1e30)  # keeps masked classes finite
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - np.log(p.mean(0) + 1e-300))).sum(1).mean()))


def frechet_distance(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> float:
    """Computes |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of features [N, D] and [M, D]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = x.mean(0), y.mean(0)
    cov_x, cov_y = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (x, y))
    # The eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2): real and not negative.
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    trace_of_root = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * trace_of_root)


def kernel_distance(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> float:
    """Computes the unbiased MMD^2 of features [N, D] and [M, D], from at most `KERNEL_MOST` evenly spaced rows of each."""
    x, y = (features[evenly(len(features), KERNEL_MOST)].astype(np.float64) for features in (x, y))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def spread(features: Float[np.ndarray, 'N D'], labels: Integer[np.ndarray, ' N']) -> float | None:
    """Computes the mean squared distance to the class mean over that to the overall mean.

    Returns:
      The ratio; None if no class has two images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    in_larger_classes = np.isin(labels, classes[counts > 1])
    if not in_larger_classes.any():
        return None
    features, labels = features[in_larger_classes].astype(np.float64), labels[in_larger_classes]
    within = sum(
        ((features[labels == label] - features[labels == label].mean(0)) ** 2).sum() * (count / (count - 1))
        for label, count in zip(classes, counts, strict=True)
        if count > 1
    )
    total = ((features - features.mean(0)) ** 2).sum() * (len(labels) / (len(labels) - 1))
    return float(within / total) if total else 0.0


def nearest(features: Float[np.ndarray, 'N D']) -> float:
    """Computes the mean over images of the largest cosine between its features and another image's; features are [N, D]."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    largest = []
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        largest.append(cosines.max(1))
    return float(np.concatenate(largest).mean())
