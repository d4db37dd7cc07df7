"""Writes imagenet_logits.npz with PyTorch: python tests/golden/make_imagenet_logits.py

Of narrow ImageNet networks the shapes of the state dict, as JSON, and the logits that weights drawn from a seed give. Needs
torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
from make_published_logits import create, logits_of, shapes_of

SIZE = 72  # of the pictures: halved it gets odd, and SqueezeNet's last pooling leaves a row out
WIDTHS = {
    'mobilenet_v1': 0.25,
    'timm_mobilenet_v1': 0.25,
    'squeezenet1_1': 0.25,
    'mobilenet_v2': 0.25,
    'imagenet_vgg11_bn': 0.125,
    'imagenet_vgg16_bn': 0.125,
    'resnet18': 0.25,
    'resnet34': 0.125,
    'resnet101': 0.125,
}
# Of a ResNet's kernels, or activations would double with every block.
GAINS = {f'resnet{depth}': 1.0 for depth in (18, 34, 50, 101)}


def main() -> None:
    golden = {'size': np.array(SIZE)}
    for name, width in WIDTHS.items():
        golden[f'{name}/width'] = np.array(width)
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(create(name, width=width))))
        golden[f'{name}/gain'] = np.array(GAINS.get(name, 2.0))
        golden[f'{name}/logits'] = logits_of(create(name, width=width), seed=0, size=SIZE, gain=GAINS.get(name, 2.0))
        print(name, golden[f'{name}/logits'])
    np.savez_compressed(Path(__file__).with_name('imagenet_logits.npz'), **golden)


if __name__ == '__main__':
    main()
