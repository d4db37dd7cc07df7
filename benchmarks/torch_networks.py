"""The networks of dvinv.networks in plain PyTorch, by the same names: what dvinv is measured against, and what the golden
logits of the tests come from. Needs torch, which neither dvinv nor its tests do.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d, pad, relu, relu6
from torch_inception import InceptionV3


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class BasicBlock(nn.Module):
    """With `projected`, torchvision's; else the one with He et al.'s option A."""

    expansion = 1

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs
        self.downsample = projection(inputs, outputs, stride) if projected else None

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.downsample:
            x = self.downsample(x)
        elif self.stride > 1 or self.missing:
            before = self.missing // 2
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))
        return relu(y + x)


class Bottleneck(nn.Module):
    """torchvision's: the 3x3 convolution has the stride."""

    expansion = 4

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool):
        super().__init__()
        inner = outputs // self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv3x3(inner, inner, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x):
        y = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return relu(y + (self.downsample(x) if self.downsample else x))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """torchvision's shortcut; None where shapes are alike."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """With `projected`, torchvision's with a head 'fc'; else CIFAR's of He et al. with a head 'linear'.

    The stem is CIFAR's, or with `pooled` ImageNet's.
    """

    def __init__(
        self, classes: int, channels: Sequence[int], blocks: Sequence[int], projected: bool, block=BasicBlock, pooled=False
    ):
        super().__init__()
        before, self.pooled, self.head = channels[0], pooled, 'fc' if projected else 'linear'
        self.conv1 = nn.Conv2d(3, before, 7, 2, 3, bias=False) if pooled else conv3x3(3, before)
        self.bn1 = nn.BatchNorm2d(before)
        self.stages = [f'layer{stage}' for stage in range(1, len(channels) + 1)]
        for stage, count, width in zip(self.stages, blocks, channels, strict=True):
            strides, outputs = [1 if stage == 'layer1' else 2, *[1] * (count - 1)], block.expansion * width
            layers = []
            for stride in strides:
                layers.append(block(before, outputs, stride, projected))
                before = outputs
            self.add_module(stage, nn.Sequential(*layers))
        self.add_module(self.head, nn.Linear(before, classes))

    def forward(self, x):
        x = relu(self.bn1(self.conv1(x)))
        if self.pooled:
            x = max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return getattr(self, self.head)(x.mean((2, 3)))


def vgg_features(channels: Sequence[int], convolutions: Sequence[int]) -> nn.Sequential:
    """So many convolutions a stage, each stage ends in a max-pooling."""
    layers, before = [], 3
    for outputs, count in zip(channels, convolutions, strict=True):
        for _ in range(count):
            layers += [conv3x3(before, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]
            before = outputs
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """CIFAR's: one dense layer."""

    def __init__(self, classes: int, channels: Sequence[int], convolutions: Sequence[int]):
        super().__init__()
        self.features, self.classifier = vgg_features(channels, convolutions), nn.Linear(channels[-1], classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class ImageNetVGG(nn.Module):
    """torchvision's: three dense layers. The last of `channels` is that of the hidden ones."""

    def __init__(self, classes: int, channels: Sequence[int], convolutions: Sequence[int]):
        super().__init__()
        *channels, hidden = channels
        self.features = vgg_features(channels, convolutions)
        first = [nn.Linear(7 * 7 * channels[-1], hidden), nn.ReLU(), nn.Dropout()]
        second = [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*first, *second, nn.Linear(hidden, classes))

    def forward(self, x):
        return self.classifier(adaptive_avg_pool2d(self.features(x), 7).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.convShortcut = None
        if stride > 1 or inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = relu(self.bn1(x))
        y = self.conv2(relu(self.bn2(self.conv1(active))))
        return y + (self.convShortcut(active) if self.convShortcut else x)


class WideStage(nn.Module):
    def __init__(self, count: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        blocks = [WideBlock(inputs, outputs, stride), *[WideBlock(outputs, outputs, 1) for _ in range(count - 1)]]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, classes: int, channels: Sequence[int], blocks: int):
        super().__init__()
        stem, one, two, three = channels
        self.conv1 = conv3x3(3, stem)
        self.block1 = WideStage(blocks, stem, one, 1)
        self.block2 = WideStage(blocks, one, two, 2)
        self.block3 = WideStage(blocks, two, three, 2)
        self.bn1, self.fc = nn.BatchNorm2d(three), nn.Linear(three, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(relu(self.bn1(x)).mean((2, 3)))


class MobileNetV1(nn.Module):
    """Keras's: TensorFlow's padding, ReLU6, BatchNorm's epsilon .001."""

    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(self, classes: int, channels: Sequence[int]):
        super().__init__()
        self.layers, (before, *outputs) = [], channels
        self.add('conv1', nn.Conv2d(3, before, 3, 2, bias=False))
        for i, (stride, after) in enumerate(zip(self.strides, outputs, strict=True), 1):
            margin = 1 if stride == 1 else 0  # where the stride is 2, it depends on the picture: see `forward`
            self.add(f'conv_dw_{i}', nn.Conv2d(before, before, 3, stride, margin, groups=before, bias=False))
            self.add(f'conv_pw_{i}', nn.Conv2d(before, after, 1, bias=False))
            before = after
        self.conv_preds = nn.Conv2d(before, classes, 1)

    def add(self, name: str, conv: nn.Conv2d) -> None:
        self.layers.append(name)
        self.add_module(name, conv)
        self.add_module(f'{name}_bn', nn.BatchNorm2d(conv.out_channels, eps=1e-3))

    def forward(self, x):
        for name in self.layers:
            conv, norm = getattr(self, name), getattr(self, f'{name}_bn')
            if conv.stride == (2, 2):  # an even length is padded at its end alone
                (height, width) = (1 - length % 2 for length in x.shape[2:])
                x = pad(x, (1 - width, 1, 1 - height, 1))
            x = relu6(norm(conv(x)))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


class Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = relu6(self.bn1(self.conv_dw(x)))
        return relu6(self.bn2(self.conv_pw(x)))


class TimmMobileNetV1(nn.Module):
    """timm's: margins of 1 on every side, BatchNorm's epsilon .00001."""

    def __init__(self, classes: int, channels: Sequence[int]):
        super().__init__()
        before, *outputs = channels
        self.conv_stem = nn.Conv2d(3, before, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        stages = []
        for stage, (count, after) in enumerate(zip((1, 2, 2, 6, 2), outputs, strict=True)):
            first = Separable(before, after, 2 if stage else 1)
            stages.append(nn.Sequential(first, *(Separable(after, after, 1) for _ in range(count - 1))))
            before = after
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x):
        x = self.blocks(relu6(self.bn1(self.conv_stem(x))))
        return self.classifier(x.mean((2, 3)))


def normalised(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, BatchNorm, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inner, self.added = expansion * inputs, stride == 1 and inputs == outputs
        layers = [normalised(inputs, inner, 1)] if expansion > 1 else []
        layers += [normalised(inner, inner, 3, stride, inner), nn.Conv2d(inner, outputs, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(outputs))

    def forward(self, x):
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's; the last of `channels` is that before the head."""

    def __init__(self, classes: int, channels: Sequence[int]):
        super().__init__()
        before, *stages, last = channels
        layers = [normalised(3, before, 3, 2)]
        for outputs, count, stride in zip(stages, (1, 2, 3, 4, 3, 3, 1), (1, 2, 2, 2, 1, 2, 1), strict=True):
            for block in range(count):
                layers.append(InvertedResidual(before, outputs, 1 if block else stride, 6 if len(layers) > 1 else 1))
                before = outputs
        self.features = nn.Sequential(*layers, normalised(before, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class SqueezeNet(nn.Module):
    def __init__(self, classes: int, channels: Sequence[int]):
        super().__init__()
        before, *squeezed = channels
        self.conv0 = nn.Conv2d(3, before, 3, 2)
        for fire, inner in enumerate(squeezed):
            self.add_module(f'conv{3 * fire + 1}', nn.Conv2d(before, inner, 1))
            self.add_module(f'conv{3 * fire + 2}', nn.Conv2d(inner, 4 * inner, 1))
            self.add_module(f'conv{3 * fire + 3}', nn.Conv2d(inner, 4 * inner, 3, padding=1))
            before = 8 * inner
        self.conv25 = nn.Conv2d(before, classes, 1)

    def forward(self, x):
        x = relu(self.conv0(x))
        for i in range(1, 25, 3):
            if i in (1, 7, 13):
                x = max_pool2d(x, 3, 2, ceil_mode=True)
            x = relu(getattr(self, f'conv{i}')(x))
            x = torch.cat([relu(getattr(self, f'conv{i + 1}')(x)), relu(getattr(self, f'conv{i + 2}')(x))], 1)
        return relu(self.conv25(x)).mean((2, 3))


RESNET, VGG_CHANNELS = (64, 128, 256, 512), (64, 128, 256, 512, 512)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}

# name -> (what builds it of classes, channels and the rest, its channels at full width, the rest)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], tuple]] = {
    **{f'resnet{6 * n + 2}': (ResNet, (16, 32, 64), ((n, n, n), False)) for n in (3, 5, 7, 9, 18)},
    **{f'cifar_resnet{depth}': (ResNet, RESNET, (BLOCKS[depth], True)) for depth in (18, 34)},
    **{f'resnet{depth}': (ResNet, RESNET, (BLOCKS[depth], True, BasicBlock, True)) for depth in (18, 34)},
    **{f'resnet{depth}': (ResNet, RESNET, (BLOCKS[depth], True, Bottleneck, True)) for depth in (50, 101)},
    **{f'vgg{depth}_bn': (VGG, VGG_CHANNELS, (convolutions,)) for depth, convolutions in CONVOLUTIONS.items()},
    **{
        f'imagenet_vgg{depth}_bn': (ImageNetVGG, (*VGG_CHANNELS, 4096), (convolutions,))
        for depth, convolutions in CONVOLUTIONS.items()
    },
    **{f'wrn{6 * n + 4}_{k}': (WideResNet, (16, 16 * k, 32 * k, 64 * k), (n,)) for n, k in ((2, 1), (2, 2), (6, 1), (6, 2))},
    'mobilenet_v1': (MobileNetV1, (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024), ()),
    'timm_mobilenet_v1': (TimmMobileNetV1, (32, 64, 128, 256, 512, 1024), ()),
    'mobilenet_v2': (MobileNetV2, (32, 16, 24, 32, 64, 96, 160, 320, 1280), ()),
    'inception_v3': (InceptionV3, (16,), ()),
    'squeezenet1_1': (SqueezeNet, (64, 16, 16, 32, 32, 48, 48, 64, 64), ()),
}


def create(name: str, classes: int = 10, width: float = 1.0) -> nn.Module:
    """The module `name`, randomly initialised, in train mode, with channel counts scaled by `width`."""
    build, channels, rest = NETWORKS[name]
    if build is MobileNetV2:
        *channels, last = channels
        widths = [*(in_eighths(width * count) for count in channels), in_eighths(max(width, 1) * last)]
    else:
        widths = [max(1, round(width * count)) for count in channels]
    return build(classes, widths, *rest)


def in_eighths(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and at least 90% of `channels`."""
    nearest = max(8, 8 * int((channels + 4) // 8))
    return nearest + 8 if nearest < 0.9 * channels else nearest


def load(network: nn.Module, variables: Mapping[str, np.ndarray]) -> None:
    """Give `network` the weights of its Flax counterpart: {'params/layer1_0/conv1/kernel': array in Flax's layout}.

    Dots, slashes and underscores being one, what spells a key there spells one here.
    """
    leaves = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith('num_batches_tracked')}
    keys = {key.replace('.', '_'): key for key in state}
    tensors = {}
    for path, array in variables.items():
        _, *modules, leaf = path.split('/')
        key = keys['_'.join([*modules, leaves[leaf]])]
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        tensors[key] = torch.from_numpy((array.T if array.ndim == 2 else array).copy())
    if missing := state.keys() - tensors.keys():
        raise ValueError(f'no variable for {", ".join(sorted(missing))}')
    network.load_state_dict(tensors, strict=False)
