"""Writes published_logits.npz with PyTorch: python tests/golden/make_published_logits.py

Of every published network the shapes of its state dict at full width, as JSON; and of narrow ones also the logits that
weights drawn from a seed give. Needs torch, which the tests do not.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from drawn import draw_images, draw_state
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))
from torch_networks import create

# name -> the width whose logits are kept
NETWORKS = {
    **{f'resnet{depth}': None for depth in (20, 32, 44, 56, 110)},
    'cifar_resnet18': 0.125,
    'cifar_resnet34': None,
    'vgg11_bn': 0.125,
    'vgg16_bn': 0.125,
    'wrn16_1': 0.5,
    'wrn16_2': 0.5,
    'wrn40_1': None,
    'wrn40_2': None,
}


def shapes_of(network: nn.Module) -> dict[str, list[int]]:
    state = network.state_dict().items()
    return {key: list(tensor.shape) for key, tensor in state if not key.endswith('num_batches_tracked')}


def logits_of(network: nn.Module, seed: int, size: int = 32, gain: float = 2.0) -> np.ndarray:
    state = draw_state(shapes_of(network), seed, gain)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(draw_images(seed, size).transpose(0, 3, 1, 2))).numpy()


def main() -> None:
    golden = {}
    for name, narrow in NETWORKS.items():
        network = create(name)
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(network)))
        print(name, sum(parameter.numel() for parameter in network.parameters()))
        if narrow:
            golden[f'{name}/width'] = np.array(narrow)
            golden[f'{name}/narrow_shapes'] = np.array(json.dumps(shapes_of(create(name, width=narrow))))
            golden[f'{name}/logits'] = logits_of(create(name, width=narrow), seed=0)
            print(golden[f'{name}/logits'])
    np.savez_compressed(Path(__file__).with_name('published_logits.npz'), **golden)


if __name__ == '__main__':
    main()
