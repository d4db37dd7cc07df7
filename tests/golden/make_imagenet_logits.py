"""Writes imagenet_logits.npz with PyTorch: python tests/golden/make_imagenet_logits.py

Of narrow ImageNet networks the shapes of the state dict, as JSON, and the logits that weights drawn from a seed give. Needs
torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
from make_published_logits import create, logits_of, shapes_of

SIZE = 72  # of the pictures: halved it gets odd, and SqueezeNet's last pooling leaves a row out
WIDTH = 0.25


def main() -> None:
    golden = {'size': np.array(SIZE)}
    for name in ('mobilenet_v1', 'squeezenet1_1'):
        golden[f'{name}/width'] = np.array(WIDTH)
        golden[f'{name}/shapes'] = np.array(json.dumps(shapes_of(create(name, width=WIDTH))))
        golden[f'{name}/logits'] = logits_of(create(name, width=WIDTH), seed=0, size=SIZE)
        print(name, golden[f'{name}/logits'])
    np.savez_compressed(Path(__file__).with_name('imagenet_logits.npz'), **golden)


if __name__ == '__main__':
    main()
