"""Writes cifar_resnet_logits.npz with PyTorch: python tests/golden/make_cifar_resnet_logits.py DATA

For the published ResNet-20 and ResNet-32 in DATA the logits of the first 16 exact test images; and, so that a test runs
where the data are not, those of a ResNet-8 and its random weights on random pixels. Needs torch, which the tests do not.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet(nn.Module):
    def __init__(self, depth: int, channels=(16, 32, 64)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        before = channels[0]
        for stage, width in enumerate(channels, 1):
            blocks = [Block(before, width, 2 if stage > 1 else 1)]
            blocks += [Block(width, width, 1) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f'layer{stage}', nn.Sequential(*blocks))
            before = width
        self.linear = nn.Linear(channels[-1], 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def logits(network: ResNet, images: np.ndarray) -> np.ndarray:
    x = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()


def main(data: Path) -> None:
    golden = {}
    with np.load(data / 'cifar10_lossless_test1000.npz', allow_pickle=False) as test:
        images = test['x'][:16]
    for depth in (20, 32):
        network = ResNet(depth)
        with np.load(data / f'cifar10_resnet{depth}.npz', allow_pickle=False) as weights:
            network.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights}, strict=False)
        golden[f'resnet{depth}'] = logits(network, images)

    torch.manual_seed(0)
    network = ResNet(8, (4, 8, 16))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    golden['images'] = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    golden['random'] = logits(network, golden['images'])
    golden.update({f'state/{key}': value.numpy() for key, value in network.state_dict().items()})
    np.savez_compressed(Path(__file__).with_name('cifar_resnet_logits.npz'), **golden)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
