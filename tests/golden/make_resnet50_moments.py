"""Writes resnet50_moments.npz with PyTorch: python tests/golden/make_resnet50_moments.py

Of a ResNet-50 of full width, whose weights and statistics are drawn from a seed, the logits and every BatchNorm's input
moments: mean and biased variance over batch and space, of every fourth channel. Needs torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
from make_imagenet_logits import GAINS, SIZE
from make_published_logits import create, logits_of, shapes_of
from torch import nn

EVERY = 4  # channels, or the file would be large


def main() -> None:
    network, moments = create('resnet50'), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, x, name=name: moments.update({name: moments_of(*x)}))
    logits = logits_of(network, seed=0, size=SIZE, gain=GAINS['resnet50'])
    for name, (mean, variance) in moments.items():
        print(f'{name:24} mean {np.abs(mean).max():8.3f} variance {variance.max():8.3f}')
    print(logits)
    golden = {
        'size': np.array(SIZE),
        'every': np.array(EVERY),
        'gain': np.array(GAINS['resnet50']),
        'shapes': np.array(json.dumps(shapes_of(network))),
        'logits': logits,
        # One array, layer after layer: with one each, half the file would be headers.
        'channels': np.array(json.dumps({name: mean.size for name, (mean, _) in moments.items()})),
        'moments': np.concatenate([*moments.values()], axis=1),
    }
    np.savez_compressed(Path(__file__).with_name('resnet50_moments.npz'), **golden)


def moments_of(x) -> np.ndarray:
    """[2, C / EVERY] of the input [B, C, H, W] of a BatchNorm: mean and biased variance."""
    x = x.double()
    return np.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])[:, ::EVERY].astype(np.float32)


if __name__ == '__main__':
    main()
