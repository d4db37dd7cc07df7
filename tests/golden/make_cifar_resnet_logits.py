"""Writes cifar_resnet_logits.npz with PyTorch: python tests/golden/make_cifar_resnet_logits.py DATA

For the published ResNet-20 and ResNet-32 in DATA the logits of the first 16 exact test images; and, so that a test runs
where the data are not, those of a ResNet-8 and its random weights on random pixels. Needs torch, which the tests do not.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))
from torch_networks import ResNet, create

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def logits(network: ResNet, images: np.ndarray) -> np.ndarray:
    x = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()


def main(data: Path) -> None:
    golden = {}
    with np.load(data / 'cifar10_lossless_test1000.npz', allow_pickle=False) as test:
        images = test['x'][:16]
    for depth in (20, 32):
        network = create(f'resnet{depth}')
        with np.load(data / f'cifar10_resnet{depth}.npz', allow_pickle=False) as weights:
            network.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights}, strict=False)
        golden[f'resnet{depth}'] = logits(network, images)

    torch.manual_seed(0)
    network = ResNet(10, (4, 8, 16), (1, 1, 1), projected=False)
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
