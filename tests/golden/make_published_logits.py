"""Writes published_logits.npz with PyTorch: python tests/golden/make_published_logits.py

Of every published network the shapes of its state dict at full width, as JSON; and of narrow ones also the logits that
weights drawn from a seed give. Needs torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
import torch
from drawn import draw_images, draw_state
from torch import nn
from torch.nn.functional import pad, relu


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class BasicBlock(nn.Module):
    """With `projected`, torchvision's; else the one with He et al.'s option A."""

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2
        self.downsample = None
        if projected and (stride != 1 or inputs != outputs):
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.downsample:
            return relu(y + self.downsample(x))
        return relu(y + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)))


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], channels: tuple[int, ...], projected: bool, head: str):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, channels[0]), nn.BatchNorm2d(channels[0])
        self.stages = [f'layer{stage}' for stage in range(1, len(channels) + 1)]
        before, self.head = channels[0], head
        for stage, count, outputs in zip(self.stages, blocks, channels, strict=True):
            strides = [1 if stage == 'layer1' else 2, *[1] * (count - 1)]
            layers = []
            for stride in strides:
                layers.append(BasicBlock(before, outputs, stride, projected))
                before = outputs
            self.add_module(stage, nn.Sequential(*layers))
        self.add_module(head, nn.Linear(before, 10))

    def forward(self, x):
        x = relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return getattr(self, self.head)(x.mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, plan: str, unit: int):
        """`plan` has a digit a convolution (channels, in multiples of `unit`) and an M a max-pooling."""
        super().__init__()
        layers, before = [], 3
        for step in plan:
            if step == 'M':
                layers.append(nn.MaxPool2d(2, 2))
            else:
                outputs = unit * int(step)
                layers += [conv3x3(before, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]
                before = outputs
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(before, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

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
    def __init__(self, depth: int, factor: int, unit: int):
        super().__init__()
        stem, one, two, three = unit, factor * unit, 2 * factor * unit, 4 * factor * unit
        count = (depth - 4) // 6
        self.conv1 = conv3x3(3, stem)
        self.block1 = WideStage(count, stem, one, 1)
        self.block2 = WideStage(count, one, two, 2)
        self.block3 = WideStage(count, two, three, 2)
        self.bn1, self.fc = nn.BatchNorm2d(three), nn.Linear(three, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(relu(self.bn1(x)).mean((2, 3)))


def cifar_resnet(depth: int, width: float) -> ResNet:
    return ResNet(3 * ((depth - 2) // 6,), tuple(int(width * n) for n in (16, 32, 64)), False, 'linear')


def resnet(blocks: tuple[int, ...], width: float) -> ResNet:
    return ResNet(blocks, tuple(int(width * n) for n in (64, 128, 256, 512)), True, 'fc')


# name -> (what builds it, given a width; the width whose logits are kept)
NETWORKS = {
    **{f'resnet{depth}': (lambda width, depth=depth: cifar_resnet(depth, width), None) for depth in (20, 32, 44, 56, 110)},
    'cifar_resnet18': (lambda width: resnet((2, 2, 2, 2), width), 0.125),
    'cifar_resnet34': (lambda width: resnet((3, 4, 6, 3), width), None),
    'vgg11_bn': (lambda width: VGG('1M2M44M88M88M', int(64 * width)), 0.125),
    'vgg16_bn': (lambda width: VGG('11M22M444M888M888M', int(64 * width)), 0.125),
    'wrn16_1': (lambda width: WideResNet(16, 1, int(16 * width)), 0.5),
    'wrn16_2': (lambda width: WideResNet(16, 2, int(16 * width)), 0.5),
    'wrn40_1': (lambda width: WideResNet(40, 1, int(16 * width)), None),
    'wrn40_2': (lambda width: WideResNet(40, 2, int(16 * width)), None),
}


def shapes_of(network: nn.Module) -> dict[str, list[int]]:
    state = network.state_dict().items()
    return {key: list(tensor.shape) for key, tensor in state if not key.endswith('num_batches_tracked')}


def logits_of(network: nn.Module, seed: int, size: int = 32) -> np.ndarray:
    state = draw_state(shapes_of(network), seed)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(draw_images(seed, size).transpose(0, 3, 1, 2))).numpy()


def main() -> None:
    golden = {}
    for name, (build, narrow) in NETWORKS.items():
        network = build(1)
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(network)))
        print(name, sum(parameter.numel() for parameter in network.parameters()))
        if narrow:
            golden[f'{name}/width'] = np.array(narrow)
            golden[f'{name}/narrow_shapes'] = np.array(json.dumps(shapes_of(build(narrow))))
            golden[f'{name}/logits'] = logits_of(build(narrow), seed=0)
            print(golden[f'{name}/logits'])
    np.savez_compressed(Path(__file__).with_name('published_logits.npz'), **golden)


if __name__ == '__main__':
    main()
