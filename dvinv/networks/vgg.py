"""The VGGs of Simonyan and Zisserman (arXiv 1409.1556) with BatchNorm: as CIFAR's 32x32 pictures get them, with one dense
layer, and torchvision's for ImageNet, with three.

Submodules' paths spell PyTorch's keys ('features_4' is `features.4`), whose index counts every layer, the ReLU and the
pooling too.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.errors import DvinvError
from dvinv.networks.torch_layers import adaptive_mean, batch_norm, conv

SIDE = 7  # of what ImageNet's dense layers get: a picture of 224 px, halved five times


def vgg_features(x: jax.Array, train: bool, convolutions: Sequence[int], channels: Sequence[int]) -> jax.Array:
    """x [B, H, W, 3] through so many convolutions a stage, each stage ending in a max-pooling that halves the picture.

    To be called in a module's compact method: submodules 'features_0', 'features_1', ... become its own.

    Raises:
      DvinvError: the picture is too small to be halved in every stage.
    """
    (height, width), smallest = x.shape[1:3], 2 ** len(convolutions)
    if min(height, width) < smallest:
        raise DvinvError(f'A VGG takes images of {smallest}x{smallest} or larger, not {height}x{width}.')
    index = 0
    for count, outputs in zip(convolutions, channels, strict=True):
        for _ in range(count):
            x = conv(outputs, 3, bias=True, name=f'features_{index}')(x)
            x = nn.relu(batch_norm(train, f'features_{index + 1}')(x))
            index += 3
        x = nn.max_pool(x, (2, 2), (2, 2))
        index += 1
    return x


class VGG(nn.Module):
    """VGG-11 with (1, 1, 2, 2, 2) convolutions, VGG-16 with (2, 2, 3, 3, 3). x [B, 32, 32, 3] -> logits [B, K].

    Of larger pictures the classifier gets the mean over what is left of space; smaller ones raise DvinvError.
    """

    num_classes: int
    convolutions: Sequence[int]  # a stage, which ends by halving the picture
    channels: Sequence[int] = (64, 128, 256, 512, 512)  # a stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = vgg_features(x, train, self.convolutions, self.channels)
        return nn.Dense(self.num_classes, name='classifier')(x.mean((1, 2)))


class ImageNetVGG(nn.Module):
    """torchvision's, with two dense layers and dropout before the last. x [B, 224, 224, 3] -> logits [B, K].

    Pictures of other sizes too, from 32x32 up (smaller ones raise DvinvError): what is left of space is averaged to 7x7, as
    PyTorch's adaptive pooling does.
    """

    num_classes: int
    convolutions: Sequence[int]  # a stage, which ends by halving the picture
    channels: Sequence[int] = (64, 128, 256, 512, 512)  # a stage
    hidden: int = 4096

    # timm's names. Its first two are convolutions, 7x7 and 1x1, which over one place are the same sums in the same order.
    aliases: ClassVar[dict[str, str]] = {
        'classifier.0': 'pre_logits.fc1',
        'classifier.3': 'pre_logits.fc2',
        'classifier.6': 'head.fc',
    }

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = adaptive_mean(vgg_features(x, train, self.convolutions, self.channels), SIDE)
        # PyTorch flattens [C, H, W], which is the order that the rows of the published kernels have.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for name in ('classifier_0', 'classifier_3'):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(self.hidden, name=name)(x)))
        return nn.Dense(self.num_classes, name='classifier_6')(x)
