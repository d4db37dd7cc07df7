"""Writes inception_logits.npz with PyTorch: python tests/golden/make_inception_logits.py

Of a narrow Inception-v3 the shapes of the state dict, as JSON, and the logits that weights drawn from a seed give. Needs
torch, which the tests do not.
"""

import json
from pathlib import Path

import numpy as np
from make_published_logits import create, logits_of, shapes_of

SIZE = 110  # of the pictures: poolings and strides leave rows out, and two are left at the end
WIDTH = 0.125


def main() -> None:
    network = create('inception_v3', width=WIDTH)
    golden = {
        'size': np.array(SIZE),
        'width': np.array(WIDTH),
        'shapes': np.array(json.dumps(shapes_of(network))),
        'logits': logits_of(network, seed=0, size=SIZE),
    }
    print(golden['logits'])
    np.savez_compressed(Path(__file__).with_name('inception_logits.npz'), **golden)


if __name__ == '__main__':
    main()
