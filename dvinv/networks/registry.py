"""The registry of networks by name."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dvinv.networks.convnext import ConvNeXt
from dvinv.networks.inception_v3 import InceptionV3
from dvinv.networks.mobilenet import V2_LAST, MobileNetV1, MobileNetV2, SqueezeNet, TimmMobileNetV1, in_eighths
from dvinv.networks.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet, SmallResNet, WideResNet, imagenet_stem
from dvinv.networks.torch_layers import group_norm
from dvinv.networks.vgg import VGG, ImageNetVGG, SmallConvNet
from dvinv.networks.vision_transformer import VisionTransformer, in_heads
from dvinv.runtime.errors import DvinvError


def rounded(channels: float) -> int:
    """Rounds to the nearest integer, at least 1."""
    return max(1, round(channels))


@dataclasses.dataclass(frozen=True)
class Network:
    """An entry of the registry: a module class and the values of its fields."""

    family: type[nn.Module]  # __call__(x, train) -> logits
    image_shape: tuple[int, int, int]  # H, W, C of the images that the network is designed for
    widths: dict[str, int | tuple[int, ...]]  # fields of `family` that are channel counts
    depths: dict[str, int | tuple[int, ...]] = dataclasses.field(default_factory=dict)  # fields that are layer counts
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)  # the other fields
    rounding: Callable[[float], int] = rounded  # of channel counts after scaling by a width
    pixels: tuple[tuple[float, ...], ...] = ((), ())  # mean and std of the published weights, if all of them use the same


CIFAR, DIGITS, IMAGENET = (32, 32, 3), (8, 8, 1), (224, 224, 3)
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision and Gluon
FROM_MINUS_ONE = (0.5,) * 3, (0.5,) * 3  # of Keras: pixels in [-1, 1]
RESNET, VGG_CHANNELS = (64, 128, 256, 512), (64, 128, 256, 512, 512)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # blocks per stage of a ResNet by depth
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}  # convolutions per stage of a VGG by depth

NETWORKS: dict[str, Network] = {
    **{
        f'resnet{6 * n + 2}': Network(CifarResNet, CIFAR, {'channels': (16, 32, 64)}, {'blocks': n}, pixels=IMAGENET_PIXELS)
        for n in (1, 3, 5, 7, 9, 18)
    },
    **{
        f'cifar_resnet{depth}': Network(ResNet, CIFAR, {'channels': RESNET}, {'blocks': BLOCKS[depth]}) for depth in (18, 34)
    },
    **{
        f'vgg{depth}_bn': Network(VGG, CIFAR, {'channels': VGG_CHANNELS}, {'convolutions': convolutions})
        for depth, convolutions in CONVOLUTIONS.items()
    },
    'cifar_vgg': Network(VGG, CIFAR, {'channels': (32, 64, 128)}, {'convolutions': (2, 2, 2)}),
    'cifar_mobilenet': Network(
        MobileNetV1,
        CIFAR,
        {'channels': (32, *[32] * 2, *[64] * 3, *[128] * 4)},
        {'strides': (1, *[1] * 2, 2, 1, 1, 2, 1, 1, 1)},
    ),
    **{
        f'wrn{6 * n + 4}_{k}': Network(WideResNet, CIFAR, {'channels': (16, 16 * k, 32 * k, 64 * k)}, {'blocks': n})
        for n, k in ((2, 1), (2, 2), (6, 1), (6, 2))
    },
    **{
        f'resnet{depth}': Network(
            ResNet,
            IMAGENET,
            {'channels': RESNET},
            {'blocks': blocks},
            {'block': BasicBlock if depth < 50 else Bottleneck, 'stem': imagenet_stem},
            pixels=IMAGENET_PIXELS,
        )
        for depth, blocks in BLOCKS.items()
    },
    **{
        f'imagenet_vgg{depth}_bn': Network(
            ImageNetVGG,
            IMAGENET,
            {'channels': VGG_CHANNELS, 'hidden': 4096},
            {'convolutions': convolutions},
            pixels=IMAGENET_PIXELS,
        )
        for depth, convolutions in CONVOLUTIONS.items()
    },
    'mobilenet_v2': Network(
        MobileNetV2,
        IMAGENET,
        {'channels': (32, 16, 24, 32, 64, 96, 160, 320), 'last': V2_LAST},
        rounding=in_eighths,
        pixels=IMAGENET_PIXELS,
    ),
    'mobilenet_v1': Network(
        MobileNetV1, IMAGENET, {'channels': (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)}, pixels=FROM_MINUS_ONE
    ),
    'timm_mobilenet_v1': Network(
        TimmMobileNetV1,
        IMAGENET,
        {'channels': (32, 64, 128, 256, 512, 1024)},
        rounding=in_eighths,
        pixels=FROM_MINUS_ONE,
    ),
    'inception_v3': Network(InceptionV3, (299, 299, 3), {'base_channels': 16}, pixels=FROM_MINUS_ONE),
    'squeezenet1_1': Network(
        SqueezeNet, IMAGENET, {'channels': (64, 16, 16, 32, 32, 48, 48, 64, 64)}, pixels=IMAGENET_PIXELS
    ),
    'resnet20_gn': Network(
        CifarResNet,
        CIFAR,
        {'channels': (16, 32, 64)},
        {'blocks': 3},
        {'norm': functools.partial(group_norm, groups=8)},
    ),
    'resnet50_gn': Network(
        ResNet,
        IMAGENET,
        {'channels': RESNET},
        {'blocks': BLOCKS[50]},
        {'block': Bottleneck, 'stem': imagenet_stem, 'norm': group_norm},
        pixels=IMAGENET_PIXELS,
    ),
    # The published weights of timm and torchvision take different pixels, so none are given here.
    'vit_b_16': Network(VisionTransformer, IMAGENET, {'channels': 768}, rounding=in_heads(64)),
    **{
        name: Network(VisionTransformer, IMAGENET, {'channels': channels}, rounding=in_heads(64), pixels=IMAGENET_PIXELS)
        for name, channels in (('deit_tiny', 192), ('deit_small', 384))
    },
    'convnext_tiny': Network(
        ConvNeXt, IMAGENET, {'channels': (96, 192, 384, 768)}, {'blocks': (3, 3, 9, 3)}, pixels=IMAGENET_PIXELS
    ),
    **{
        name: Network(
            VisionTransformer,
            shape,
            {'channels': channels},
            {'depth': depth},
            {'patch': patch, 'head': 16, 'spread': 0.5, 'token': False},
            rounding=in_heads(16),
        )
        for name, shape, channels, depth, patch in (('small_vit', DIGITS, 64, 4, 2), ('cifar_vit', CIFAR, 192, 6, 4))
    },
    'small_resnet': Network(SmallResNet, DIGITS, {'channels': (32, 64), 'hidden': 64}),
    'small_convnet': Network(SmallConvNet, DIGITS, {'channels': (32, 64), 'hidden': 128}),
}


def create(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """Returns the Linen module `name` with channel counts scaled by `width`.

    Raises:
      DvinvError: no network has this name, or the width is not positive and finite.
    """
    network = _named(name)
    if not 0 < width < math.inf:
        raise DvinvError(f'The width of {name} is {width}; it must be above 0 and finite.')
    widths = jax.tree.map(lambda channels: network.rounding(channels * width), network.widths)
    return network.family(num_classes, **widths, **network.depths, **network.parts)


def image_shape(name: str) -> tuple[int, int, int]:
    """Returns H, W, C of the images that the network `name` is designed for, the default where no other shape is given.

    Raises:
      DvinvError: no network has this name.
    """
    return _named(name).image_shape


def published_pixels(name: str, channels: int) -> tuple[tuple[float, ...], ...]:
    """Returns the (mean, std) of the published weights of the network `name`; ((), ()) if unknown for `channels` channels.

    Raises:
      DvinvError: no network has this name.
    """
    pixels = _named(name).pixels
    return pixels if len(pixels[0]) == channels else ((), ())


def _named(name: str) -> Network:
    if name not in NETWORKS:
        raise DvinvError(f'There is no network {name!r}; choose one of {", ".join(sorted(NETWORKS))}.')
    return NETWORKS[name]
