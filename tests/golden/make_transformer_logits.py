"""Writes transformer_logits.npz with PyTorch: python tests/golden/make_transformer_logits.py

Of networks without BatchNorm the shapes of the state dicts at full size, as JSON, in the names of torchvision and timm; of
the same with few blocks the logits that weights drawn from a seed give; and positions as timm resamples them. Needs torch,
torchvision and timm, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from drawn import draw_state
from make_published_logits import logits_of, shapes_of
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch_networks import ResNet

# As published, for 1,000 classes.
PUBLISHED = {
    'vit_b_16': torchvision.models.vit_b_16,
    'convnext_tiny': torchvision.models.convnext_tiny,
    **{
        f'{name}/timm': lambda timm_name=timm_name: timm.create_model(timm_name)
        for name, timm_name in (
            ('vit_b_16', 'vit_base_patch16_224'),
            ('deit_tiny', 'deit_tiny_patch16_224'),
            ('deit_small', 'deit_small_patch16_224'),
            ('convnext_tiny', 'convnext_tiny'),
            ('resnet50_gn', 'resnet50_gn'),
        )
    },
}
GRIDS = {'up': (7, 7), 'down': (3, 3), 'oblong': (2, 6)}  # that the positions of 4x4 patches are resampled to


def with_group_norm(network: nn.Module, groups: int) -> nn.Module:
    """The network with GroupNorm in place of every BatchNorm."""
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(groups, child.num_features))
        else:
            with_group_norm(child, groups)
    return network


def main() -> None:
    golden = {}
    for name, build in PUBLISHED.items():
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(build())))
    # (the network with 10 classes and few blocks, the size of its pictures, the gain of its kernels)
    cases = {
        'vit_b_16': (torchvision.models.VisionTransformer(224, 16, 2, 12, 768, 3072, num_classes=10), 224, 1.0),
        'deit_tiny': (timm.create_model('deit_tiny_patch16_224', num_classes=10, depth=4), 224, 1.0),
        'convnext_tiny': (timm.create_model('convnext_tiny', num_classes=10, depths=(1, 1, 2, 1)), 72, 1.0),
        'resnet20_gn': (with_group_norm(ResNet(10, (16, 32, 64), (1, 1, 1), projected=False), 8), 32, 2.0),
    }
    for name, (network, size, gain) in cases.items():
        golden[f'{name}/drawn'] = np.array(json.dumps(shapes_of(network)))
        golden[f'{name}/size'], golden[f'{name}/gain'] = np.array(size), np.array(gain)
        golden[f'{name}/logits'] = logits_of(network, seed=0, size=size, gain=gain)
        print(name, golden[f'{name}/logits'])
    positions = draw_state({'pos_embed': [1, 17, 8]}, seed=0)['pos_embed']
    for name, grid in GRIDS.items():
        golden[f'positions/{name}'] = resample_abs_pos_embed(torch.from_numpy(positions), grid).numpy()
    np.savez_compressed(Path(__file__).with_name('transformer_logits.npz'), **golden)


if __name__ == '__main__':
    main()
