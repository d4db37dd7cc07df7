"""Writes imagenet_logits.npz with PyTorch: python tests/golden/make_imagenet_logits.py

Of narrow ImageNet networks the shapes of the state dict, as JSON, and the logits that weights drawn from a seed give. Needs
torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
import torch
from make_published_logits import logits_of, shapes_of
from torch import nn
from torch.nn.functional import max_pool2d, pad, relu, relu6

SIZE = 72  # of the pictures: halved it gets odd, and SqueezeNet's last pooling leaves a row out


class MobileNetV1(nn.Module):
    """Keras's: TensorFlow's padding, ReLU6, BatchNorm's epsilon .001."""

    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    outputs = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)

    def __init__(self, stem: int):
        super().__init__()
        self.layers, before = [], stem
        self.add('conv1', nn.Conv2d(3, stem, 3, 2, bias=False))
        for i, (stride, factor) in enumerate(zip(self.strides, self.outputs, strict=True), 1):
            self.add(f'conv_dw_{i}', nn.Conv2d(before, before, 3, stride, groups=before, bias=False))
            self.add(f'conv_pw_{i}', nn.Conv2d(before, stem * factor, 1, bias=False))
            before = stem * factor
        self.conv_preds = nn.Conv2d(before, 10, 1)

    def add(self, name: str, conv: nn.Conv2d) -> None:
        self.layers.append(name)
        self.add_module(name, conv)
        self.add_module(f'{name}_bn', nn.BatchNorm2d(conv.out_channels, eps=1e-3))

    def forward(self, x):
        for name in self.layers:
            conv, norm = getattr(self, name), getattr(self, f'{name}_bn')
            (kernel, _), (stride, _), size = conv.kernel_size, conv.stride, x.shape[-1]
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            before, after = missing // 2, missing - missing // 2
            x = relu6(norm(conv(pad(x, (before, after, before, after)))))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


class SqueezeNet(nn.Module):
    def __init__(self, width: float):
        super().__init__()
        self.conv0, before = nn.Conv2d(3, int(64 * width), 3, 2), int(64 * width)
        for fire, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
            inner = int(squeezed * width)
            self.add_module(f'conv{3 * fire + 1}', nn.Conv2d(before, inner, 1))
            self.add_module(f'conv{3 * fire + 2}', nn.Conv2d(inner, 4 * inner, 1))
            self.add_module(f'conv{3 * fire + 3}', nn.Conv2d(inner, 4 * inner, 3, padding=1))
            before = 8 * inner
        self.conv25 = nn.Conv2d(before, 10, 1)

    def forward(self, x):
        x = relu(self.conv0(x))
        for i in range(1, 25, 3):
            if i in (1, 7, 13):
                x = max_pool2d(x, 3, 2)
            x = relu(getattr(self, f'conv{i}')(x))
            x = torch.cat([relu(getattr(self, f'conv{i + 1}')(x)), relu(getattr(self, f'conv{i + 2}')(x))], 1)
        return relu(self.conv25(x)).mean((2, 3))


# name -> (what builds it, the width of what that builds)
NETWORKS = {
    'mobilenet_v1': (lambda: MobileNetV1(8), 0.25),
    'squeezenet1_1': (lambda: SqueezeNet(0.25), 0.25),
}


def main() -> None:
    golden = {'size': np.array(SIZE)}
    for name, (build, width) in NETWORKS.items():
        golden[f'{name}/width'] = np.array(width)
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(build())))
        golden[f'{name}/logits'] = logits_of(build(), seed=0, size=SIZE)
        print(name, golden[f'{name}/logits'])
    np.savez_compressed(Path(__file__).with_name('imagenet_logits.npz'), **golden)


if __name__ == '__main__':
    main()
