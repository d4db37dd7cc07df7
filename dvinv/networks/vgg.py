"""Networks without shortcuts: the VGGs, and a small one for small images.

The VGGs of Simonyan and Zisserman (arXiv 1409.1556) have BatchNorm here. There are the variant for CIFAR's 32x32 images,
with one dense layer, and torchvision's for ImageNet, with three. The paths of submodules correspond to PyTorch's keys
('features_4' is `features.4`); the index counts every layer, including ReLU and pooling.
"""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import adaptive_mean, batch_norm, conv, refuse_small_images

SIDE = 7  # height and width of the input of ImageNet's dense layers: 224 px, halved five times


def vgg_features(x: jax.Array, train: bool, convolutions: Sequence[int], channels: Sequence[int]) -> jax.Array:
    """Applies the stages of a VGG to x [B, H, W, 3]; each ends with a max-pooling that halves the image.

    It must be called in a compact method of a module, and creates the submodules 'features_0', 'features_1' and so on there.

    Args:
      convolutions: the number of convolutions per stage.
      channels: the number of channels per stage.

    Raises:
      DvinvError: the image is too small to be halved in every stage.
    """
    refuse_small_images('A VGG', x, 2 ** len(convolutions))
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

    For larger images, the classifier gets the mean over the remaining spatial positions; smaller images raise DvinvError.
    """

    num_classes: int
    convolutions: Sequence[int]  # per stage; each stage ends by halving the image
    channels: Sequence[int] = (64, 128, 256, 512, 512)  # per stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = vgg_features(x, train, self.convolutions, self.channels)
        return nn.Dense(self.num_classes, name='classifier')(x.mean((1, 2)))


class ImageNetVGG(nn.Module):
    """torchvision's VGG, with two dense layers and dropout before the last. x [B, 224, 224, 3] -> logits [B, K].

    Images of other sizes from 32x32 up work too (smaller ones raise DvinvError): the last feature map is averaged to 7x7, as
    PyTorch's adaptive pooling does.
    """

    num_classes: int
    convolutions: Sequence[int]  # per stage; each stage ends by halving the image
    channels: Sequence[int] = (64, 128, 256, 512, 512)  # per stage
    hidden: int = 4096

    # The names in timm. There the first two are convolutions, 7x7 and 1x1, which at a single position compute the same sums
    # in the same order.
    aliases: ClassVar[dict[str, str]] = {
        'classifier.0': 'pre_logits.fc1',
        'classifier.3': 'pre_logits.fc2',
        'classifier.6': 'head.fc',
    }

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = adaptive_mean(vgg_features(x, train, self.convolutions, self.channels), SIDE)
        # PyTorch flattens [C, H, W], which is the order of the rows of the published kernels.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for name in ('classifier_0', 'classifier_3'):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(self.hidden, name=name)(x)))
        return nn.Dense(self.num_classes, name='classifier_6')(x)


class SmallConvNet(nn.Module):
    """3x3 convolutions with BatchNorm and max-pooling, dropout, and a wide dense layer. x [B, H, W, C] -> logits [B, K]."""

    num_classes: int
    channels: Sequence[int] = (32, 64)  # per convolution
    hidden: int = 128
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for channels in self.channels:
            x = nn.max_pool(nn.relu(batch_norm(train)(nn.Conv(channels, (3, 3))(x))), (2, 2), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(self.hidden)(x)))
