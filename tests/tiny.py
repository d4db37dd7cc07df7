"""The smallest networks, and images, that have all that the tests look at."""

import zlib

import flax.linen as nn
import jax
import numpy as np

from dvinv.inversion import Inversion, from_linen
from dvinv.networks import Classifier, create, save_network

IMAGE_SHAPE = (8, 8, 2)
MEAN, STD = (0.4, 0.6), (0.2, 0.3)


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, the mean over space, a dense layer."""

    num_classes: int = 3
    channels: tuple[int, ...] = (4, 5)

    @nn.compact
    def __call__(self, x, train: bool = False):
        for channels in self.channels:
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def trained(variables, seed: int = 0):
    """The variables, as numpy arrays, with weights drawn anew and running statistics such as training leaves."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == 'var':
            values = rng.uniform(0.5, 2.0, leaf.shape)
        elif name == 'kernel':
            values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            values = (name == 'scale') + 0.3 * rng.normal(size=leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def trained_variables(module, image_shape=IMAGE_SHAPE, seed: int = 0):
    """`trained` variables of a module, without compiling its initialisation."""
    image = jax.ShapeDtypeStruct((2, *image_shape), np.float32)
    return trained(jax.eval_shape(module.init, jax.random.key(0), image), seed)


def tiny_teacher(seed: int = 0, **fields):
    """A Teacher of 3 classes that takes pictures of `IMAGE_SHAPE`."""
    module = TinyNet(**fields)
    return from_linen(module, trained_variables(module, seed=seed), image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)


def pixels_only(image_shape, num_classes: int, mean, std) -> Classifier:
    """A Classifier without a network, where only its images matter."""
    return Classifier(lambda variables, x: x, {}, image_shape, num_classes, mean, std)


def saved(path, network: str = 'small_convnet', num_classes: int = 3, image_shape=IMAGE_SHAPE) -> str:
    """The path, now of the file of a narrow network for such pictures."""
    half = (0.5,) * image_shape[-1]
    about = {
        'network': network,
        'width': 0.125,
        'num_classes': num_classes,
        'image_shape': image_shape,
        'mean': half,
        'std': half,
    }
    save_network(path, trained_variables(create(network, num_classes, 0.125), image_shape), about)
    return str(path)


def numbered(labels, channels=1, size=4):
    """(images uint8 [N, size, size, channels] whose every pixel is the index of the image plus one, labels)."""
    index = np.arange(1, len(labels) + 1, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.broadcast_to(index, (len(labels), size, size, channels)).copy(), np.array(labels)


def drawn_inverter(teacher, *_):
    """Stands in for `make_inverter`, which takes long to compile: pixels are drawn by batch and competitor."""

    def invert(keys, labels, student_variables, *_, **__):
        digest = zlib.crc32(b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(student_variables)))
        shape = (*np.shape(labels), *teacher.image_shape)
        return Inversion(np.asarray(jax.random.normal(jax.random.fold_in(keys[0], digest), shape)), {})

    return invert
