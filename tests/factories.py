"""Teachers as a user's own module would make them: named by teacher.factory='factories:NAME'."""

import flax.linen as nn
import jax
import numpy as np
from tiny import TinyNet, trained_variables

from dvinv import from_linen
from dvinv.networks.vision_transformer import VisionTransformer


def _digits_teacher(module, shape=(8, 8, 1)):
    channels = shape[-1]
    return from_linen(
        module, trained_variables(module, shape), image_shape=shape, mean=(0.3,) * channels, std=(0.4,) * channels
    )


def own():
    """A network that takes the digits."""
    return _digits_teacher(TinyNet(num_classes=10))


def five_classes():
    """A network that knows only half of the digits."""
    return _digits_teacher(TinyNet(num_classes=5))


def colour():
    """A network for pictures of three channels."""
    return _digits_teacher(TinyNet(num_classes=10), (8, 8, 3))


def raw_pixels():
    """A network for pictures of CIFAR-10 that takes their pixels as they are, 0 to 255."""
    module = TinyNet(num_classes=10)
    variables = trained_variables(module, (32, 32, 3))
    return from_linen(module, variables, image_shape=(32, 32, 3), mean=(0.0,) * 3, std=(1 / 255,) * 3)


def broken():
    """A network whose weights are not numbers."""
    teacher = own()
    jax.tree.leaves(teacher.variables['params'])[-1].fill(np.nan)
    return teacher


def attentive():
    """A network with attention and without BatchNorm."""
    return _digits_teacher(VisionTransformer(10, channels=8, depth=1, patch=2, head=4, token=False))


def probabilities():
    """A network with a softmax at its end."""

    class Probable(TinyNet):
        @nn.compact
        def __call__(self, x):
            return nn.softmax(super().__call__(x))

    return _digits_teacher(Probable(num_classes=10))


class Plain(nn.Module):
    """A network without BatchNorm."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def without_batch_norm():
    """What cannot be inverted."""
    return _digits_teacher(Plain())


class Scanned(nn.Module):
    """A network with a loop over its layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x.reshape(x.shape[0], -1))
        kernels = self.param('kernels', nn.initializers.normal(), (2, 64, 64))
        x, _ = jax.lax.scan(lambda carry, kernel: (carry @ kernel, None), x, kernels)
        return nn.Dense(10)(x)


def scanned():
    """What holds its layers where no rule reaches."""
    return _digits_teacher(Scanned())


class Standardised(nn.Module):
    """A network whose weights are standardised when it runs."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Conv(4, (3, 3)))(x)
        return nn.Dense(10)(nn.BatchNorm(use_running_average=True)(x).mean((1, 2)))


def standardised():
    """What computes its weights."""
    return _digits_teacher(Standardised())


def no_teacher():
    """What is no network at all."""
    return {}


def module(num_classes):
    """A network that is yet to be trained."""
    return TinyNet(num_classes=num_classes)


def ten_classes():
    """The same, of so many classes whatever the data."""
    return TinyNet(num_classes=10)


def needs_more(num_classes, depth):
    """A function that asks for what nobody gives."""
    return TinyNet(num_classes=num_classes, channels=(4,) * depth)
