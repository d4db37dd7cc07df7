"""Evaluation of networks and of images: accuracies, also by class or on held-out images, FLOPs, image quality."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, UInt8

from dvinv.config import Settings
from dvinv.data.dataset import Chosen, RealData, RowArray, Split
from dvinv.data.pool import ImagePool
from dvinv.graph.program import contraction_rules, count_flops, rewritten
from dvinv.networks.classifier import AnyArray, Classifier, Features, Images, Logits, Scalar
from dvinv.networks.suited import suited_to
from dvinv.runtime import preemption
from dvinv.runtime.errors import DvinvError, shape_text

MOST_TEST_IMAGES = 5_000  # test images that are scored by class, at most
HELD_OUT_FIGURES = ('held_out_agreement', 'held_out_kl', 'held_out_class_agreement')
MOST_POOL_IMAGES = 5_000  # images of a pool that are judged, at most
KERNEL_MOST = 2_000  # images for the kernel distance, at most


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


def with_features(apply_fn: Callable) -> Callable:
    """Returns `(variables, x) -> (logits [B, K], features [B, D])` for `apply_fn`, which returns the logits only.

    The features are the first operand of the last matrix product or convolution, averaged over spatial axes if it has any.
    """

    def run(variables, x: Images) -> tuple[Logits, Features]:
        inputs: list[jax.Array] = []  # the first operand of the last operation so far

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


@functools.lru_cache(maxsize=64)
def _compiled(apply_fn: Callable, features: bool):
    return jax.jit(suited_to(jax.default_backend(), with_features(apply_fn) if features else apply_fn))


def logits_of(
    network: Classifier, images: UInt8[np.ndarray, 'N H W C'], batch_size: int = 256
) -> Float32[np.ndarray, 'N K']:
    """Computes logits float32 [N, K] of pixels uint8 [N, H, W, C], in eval mode.

    The last batch is padded, so that a single program is compiled.
    """
    (logits,) = _in_batches(network, images, np.arange(len(images)), batch_size, features=False)
    return logits


def logits_and_features_of(
    network: Classifier, images: RowArray, rows: Integer[np.ndarray, ' n'], batch_size: int = 128
) -> tuple[Float32[np.ndarray, 'n K'], Float32[np.ndarray, 'n D']]:
    """Computes logits float32 [n, K] and features float32 [n, D] of chosen images.

    Args:
      network: the network.
      images: pixels uint8 [N, H, W, C].
      rows: the numbers of the images, int [n].
      batch_size: the number of images that run through the network at a time.
    """
    logits, features = _in_batches(network, images, rows, batch_size, features=True)
    return logits, features


def _in_batches(
    network: Classifier, images: RowArray, rows: np.ndarray, batch_size: int, features: bool
) -> list[np.ndarray]:
    """Returns the logits of chosen images, and their features if `features`."""
    apply_fn, outputs_of_batches = _compiled(network.apply_fn, features), []
    batch_size = min(batch_size, len(rows))
    for start in range(0, len(rows), batch_size):
        preemption.leave_if_asked(single_process_only=True)
        batch = images[rows[start : start + batch_size]]
        padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)])
        outputs = apply_fn(network.variables, network.normalise(jnp.asarray(padded)))
        outputs_of_batches.append([np.asarray(output, np.float32)[: len(batch)] for output in jax.tree.leaves(outputs)])
    return [np.concatenate(outputs) for outputs in zip(*outputs_of_batches, strict=True)]


def among_top(logits: Float[np.ndarray, 'N K'], labels: Integer[np.ndarray, ' N'], k: int = 1) -> Bool[np.ndarray, ' N']:
    """Returns whether the label of each image is among the `k` highest of its logits [N, K]; bool [N]."""
    top = np.argsort(-logits, axis=1, kind='stable')[:, :k]
    return (top == np.asarray(labels)[:, None]).any(1)


def top_accuracy(logits: Float[np.ndarray, 'N K'], labels: Integer[np.ndarray, ' N'], k: int = 1) -> float:
    """Returns the fraction (0 to 1) of images that have their label among the `k` highest of their logits [N, K]."""
    return float(among_top(logits, labels, k).mean())


def accuracy(network: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the fraction (0 to 1) of images uint8 [N, H, W, C] that `network` classifies correctly."""
    return top_accuracy(logits_of(network, images), labels)


def test_accuracy(network: Classifier, data: RealData | None) -> float | None:
    """Returns the fraction of the real test images that `network` classifies correctly; None without real data."""
    if data is None:
        return None
    validate_fits(network, data)
    return accuracy(network, data.test.images, data.test.labels)


def validate_fits(network: Classifier, data: RealData) -> None:
    """Validates that a data set has the image shape and the classes of `network`, a teacher or a network with its classes.

    Raises:
      DvinvError: it does not; the message names both shapes, or the classes.
    """
    if tuple(network.image_shape) != tuple(data.image_shape):
        expected, found = (shape_text(shape) for shape in (network.image_shape, data.image_shape))
        raise DvinvError(
            f'The teacher takes images of {expected} (height x width x channels), but the data set has {found}.'
        )
    if data.by_position and data.num_classes != network.num_classes:
        raise DvinvError(
            f'The data set has folders of {data.num_classes} classes, but the teacher knows {network.num_classes}, and the '
            'names of the folders do not say which of them; give data.class_names, the names of all classes in the order of '
            'the teacher, or name the folders by the numbers of their classes, from 0.'
        )
    highest = max(int(split.labels.max()) for split in (data.train, data.test) if split)
    if highest >= network.num_classes:
        raise DvinvError(
            f'The data set has the label {highest}, but the teacher knows {network.num_classes} classes, 0 to '
            f'{network.num_classes - 1}.'
        )


def flops(network: Classifier) -> int:
    """Counts the floating-point operations of the convolutions and matrix products for one image, two per multiply-add."""
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    return count_flops(jax.make_jaxpr(network.apply_fn)(network.variables, x))


def compare_by_class(teacher: Classifier, networks: dict[str, Classifier], test: Split) -> dict:
    """Computes accuracies by class, and confusion counts between the teacher and each network.

    Args:
      teacher: the network that the others are compared with.
      networks: {name: network}, with the classes of the teacher.
      test: real images; at most `MOST_TEST_IMAGES` are scored.

    Returns:
      A dict with these entries:
        'images': the number of scored images;
        'classes': the labels that occur among them, ascending;
        'test_images': the number of images of each of these classes;
        'accuracy': {name: list of accuracies, one per class}, including 'teacher';
        'confusion': {name: list of [class by the teacher, class by the network, number of images]}, most frequent first.
    """
    rows = evenly(len(test.labels), MOST_TEST_IMAGES)
    images, labels = test.images[rows], np.asarray(test.labels[rows])
    answers = {name: logits_of(network, images).argmax(1) for name, network in {'teacher': teacher, **networks}.items()}
    classes, counts = np.unique(labels, return_counts=True)
    return {
        'images': len(labels),
        'classes': classes.tolist(),
        'test_images': counts.tolist(),
        'accuracy': {
            name: [float((answer[labels == label] == label).mean()) for label in classes] for name, answer in answers.items()
        },
        'confusion': {name: _pairs(answers['teacher'], answers[name]) for name in networks},
    }


def _pairs(first: np.ndarray, second: np.ndarray) -> list[list[int]]:
    pairs, counts = np.unique(np.stack([first, second], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return [[*pairs[i].tolist(), int(counts[i])] for i in order]


def training_rows(settings: Settings, array: RowArray) -> RowArray:
    """Returns the rows of a pool's array that networks are trained on; the array may cover only the rounds made so far."""
    training, held_out = _parts(settings, len(array))
    return Chosen(array, training) if len(held_out) else array


def training_set(settings: Settings, pool: ImagePool) -> tuple[RowArray, RowArray]:
    """Returns the images and labels of a pool that networks are trained on, see `training_rows`."""
    return training_rows(settings, pool.rows('images')), training_rows(settings, pool.rows('labels'))


def _parts(settings: Settings, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers of the training images of a pool and those of the held-out images, both ascending."""
    round_size = count if settings.pool else settings.round_images  # an existing pool is a single round
    rows = np.arange(count)
    is_held_out = rows % round_size >= round_size - settings.held_out_of(round_size)
    return rows[~is_held_out], rows[is_held_out]


class HeldOut:
    """The held-out images of a pool, and the teacher's logits for them.

    The images of a pool are made in rounds, and the last images of every round are held out. The same holds for the pools of
    the controls, so that all networks that are compared are trained on equally many images. If there are real test images,
    networks are scored on these, and nothing is held out.

    Attributes:
      count: the number of held-out images.
    """

    def __init__(self, settings: Settings, teacher: Classifier, pool: ImagePool):
        """Runs the teacher on the held-out images of `pool`."""
        images, labels = pool.rows('images'), pool.rows('labels')
        _, rows = _parts(settings, len(labels))
        self.count, self._classes = len(rows), teacher.num_classes
        if self.count:
            preemption.leave_if_asked()
            self._images, self._labels = images[rows], labels[rows]
            self._teacher_logits = logits_of(teacher, self._images)

    def beside(self, networks: dict[str, Classifier], main: str) -> dict:
        """Returns the `figures` of all networks, prefixed by their names except for that of `main`; {} without images."""
        if not self.count:
            return {}
        results: dict[str, Any] = {'held_out_images': self.count}
        for network_name, network in networks.items():
            prefix = '' if network_name == main else f'{network_name}_'
            results |= {f'{prefix}{name}': value for name, value in self.figures(network).items()}
        return results

    def figures(self, network: Classifier) -> dict:
        """Computes how closely `network` agrees with the teacher on the held-out images.

        Returns:
          A dict with 'held_out_agreement', the fraction of images that both assign the same class; 'held_out_kl', the mean
          of KL(teacher || network) in nats; and 'held_out_class_agreement', the agreement for each class of the labels, None
          for a class without images.
        """
        logits = logits_of(network, self._images)
        agrees = logits.argmax(1) == self._teacher_logits.argmax(1)
        by_class = [agrees[self._labels == label] for label in range(self._classes)]
        class_agreement = [float(part.mean()) if len(part) else None for part in by_class]
        kl = float(divergence(self._teacher_logits, logits))
        return dict(zip(HELD_OUT_FIGURES, (float(agrees.mean()), kl, class_agreement), strict=True))


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


def quality_figures(images: Judgement, real: Judgement | None = None) -> dict:
    """Computes the figures of a set of images.

    With p(y|x) the outputs of a network that had no part in making the images, and f(x) [D] the inputs of its last layer:

    - inception score: exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498), from 1 to the number of classes;
    - Frechet distance between Gaussians with the moments of the features of synthesized and of real images (Heusel et al.,
      arXiv 1706.08500); biased upwards unless the number of images is many times D;
    - kernel distance: MMD^2 of f with the kernel (f f' / D + 1)^3, unbiased for any number of images, so it may be below 0
      (Binkowski et al., arXiv 1801.01401);
    - spread: the mean squared distance of features to the mean of their class, divided by that to the mean of all features:
      0 if all images of a class are the same, about 1 if classes cannot be distinguished;
    - nearest: the mean cosine between the features of an image and those of the nearest other image.

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
            **quality_figures(judged[name], judged.get('real')),
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
