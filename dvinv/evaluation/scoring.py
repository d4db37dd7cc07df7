"""The evaluation that all tasks share: logits of stored pixels, accuracies, and the FLOPs of a network."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, UInt8

from dvinv.data.dataset import RealData
from dvinv.data.rows import RowArray
from dvinv.errors import DvinvError, shape_text
from dvinv.graph.program import count_flops
from dvinv.graph.rewriting import contraction_rules, rewritten
from dvinv.networks.arrays import Features, Images, Logits
from dvinv.networks.classifier import Classifier
from dvinv.networks.suited import suited_to
from dvinv.runtime import preemption


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
