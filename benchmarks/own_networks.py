"""Networks as users have them, inverted with nothing chosen, beside the README's older recipe: a table in markdown.

    python benchmarks/own_networks.py --data ../shared/data

A small Flax network with BatchNorm and, as a verifier, one of another architecture and seed are trained here for each of:
the 8x8 digits inside scikit-learn, the same enlarged to 32x32, and, where the folder `--data` has
`cifar10_train_jpeg.npz`, its first 6,000 images. Then `dvinv.invert(teacher, labels)` makes 50 images, and so does the older
recipe: 500 iterations by steps of .1, jitter 2, default weights. All feature losses are on the view of the default's last
stage, that of real images too. `--cache FOLDER` keeps the trained networks, and the pictures.
"""

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

import dvinv

OLD = dvinv.InversionConfig((dvinv.Stage(iterations=500, learning_rate=0.1, jitter=2),), pixel_scale='network')
IMAGES = 50


class Plain(nn.Module):
    """3x3 convolutions with BatchNorm, of stride 2 where there are more channels than before; the mean over space."""

    channels: Sequence[int]

    @nn.compact
    def __call__(self, x, train):
        before = self.channels[0]
        for channels in self.channels:
            x = nn.Conv(channels, (3, 3), 2 if channels > before else 1, use_bias=False)(x)
            x, before = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)), channels
        return nn.Dense(10)(x.mean((1, 2)))


class Pooled(nn.Module):
    """5x5 convolutions with BatchNorm and max-pooling, a hidden dense layer: the verifier."""

    channels: Sequence[int]

    @nn.compact
    def __call__(self, x, train):
        for channels in self.channels:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(channels, (5, 5), use_bias=False)(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def trained(net: nn.Module, x, y, seed: int, updates: int, shift: int, flip: bool, noise: float):
    """Variables of `net`, taught x float32 [N, H, W, C] normalised, shifted, mirrored and with noise, and labels y [N]."""
    variables = net.init(jax.random.key(seed), x[:1], train=False)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, updates))
    state, rng, black = optimizer.init(variables['params']), np.random.default_rng(seed), x.min((0, 1, 2))

    @jax.jit
    def update(variables, state, x, y):
        def loss(params):
            logits, changed = net.apply({**variables, 'params': params}, x, train=True, mutable=['batch_stats'])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        gradient, changed = jax.grad(loss, has_aux=True)(variables['params'])
        change, state = optimizer.update(gradient, state)
        return {'params': optax.apply_updates(variables['params'], change), **changed}, state

    for _ in range(updates):
        rows = rng.integers(len(y), size=64)
        pad = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        images, (top, left) = np.pad(x[rows] - black, pad) + black, rng.integers(2 * shift + 1, size=(2, 64))
        images = np.stack(
            [image[a : a + x.shape[1], b : b + x.shape[2]] for image, a, b in zip(images, top, left, strict=True)]
        )
        if flip:
            images = np.where(rng.random((64, 1, 1, 1)) < 0.5, images, images[:, :, ::-1])
        images += noise * rng.random((64, 1, 1, 1)) * rng.normal(size=images.shape)
        variables, state = update(variables, state, images.astype(np.float32), y[rows])
    return jax.device_get(variables)


def digits(size: int):
    """Images float32 [N, size, size, 1] in [0, 1] and labels: the last 360 are left to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = data.images[order, ..., None].astype(np.float32) / 16
    return np.asarray(jax.image.resize(images, (len(images), size, size, 1), 'linear')), data.target[order], 360


def cifar(folder: Path):
    """6,000 images float32 [N, 32, 32, 3] in [0, 1] to train on, 1,000 to test, and labels."""
    data = np.load(folder / 'cifar10_train_jpeg.npz')
    head, files, ends = data['header'].tobytes(), data['jpeg'].tobytes(), data['offsets']
    images = [np.asarray(Image.open(io.BytesIO(head + files[ends[i] : ends[i + 1]]))) for i in range(7000)]
    return np.stack(images).astype(np.float32) / 255, data['labels'][:7000].astype(np.int32), 1000


def row(name: str, data, teacher_net, verifier_net, recipe: dict, cache: Path | None) -> str:
    """A line of the table for networks of the names and recipe, on `data` = (images, labels, images to test on)."""
    x, y, test = data
    mean, std = x[:-test].mean((0, 1, 2)), x[:-test].std((0, 1, 2))

    def network(role, net, seed):
        path = cache and cache / f'{name.replace(" ", "_")}_{role}.npz'
        if path and path.exists():
            variables = unflatten_dict({tuple(key.split('/')): value for key, value in np.load(path).items()})
        else:
            variables = trained(net, (x[:-test] - mean) / std, y[:-test], seed, **recipe)
            if path:
                np.savez(path, **{'/'.join(key): value for key, value in flatten_dict(variables).items()})
        apply = jax.jit(lambda pixels: net.apply(variables, (pixels - mean) / std, train=False).argmax(-1))
        return variables, apply, float((apply(x[-test:]) == y[-test:]).mean())

    variables, _, accuracy = network('teacher', teacher_net, 1)
    _, verify, verifier_accuracy = network('verifier', verifier_net, 2)
    teacher = dvinv.from_linen(teacher_net, variables, image_shape=x.shape[1:], mean=mean, std=std)
    labels = dvinv.balanced_labels(0, IMAGES, 10)
    cells = [name, f'{accuracy:.3f}', f'{verifier_accuracy:.3f}']
    real = np.stack([x[:-test][np.flatnonzero(y[:-test] == label)[i // 10]] for i, label in enumerate(labels)])

    def losses(images):
        return np.mean([dvinv.feature_loss(teacher, images, key=key) for key in range(5)])

    cells.append(f'{losses(np.rint(255 * real).astype(np.uint8)):.2f}')
    for settings in (OLD, None):
        start = time.perf_counter()
        images = teacher.to_uint8(dvinv.invert(teacher, labels, settings).images)
        seconds = time.perf_counter() - start
        share = np.mean(np.asarray(verify(images.astype(np.float32) / 255)) == labels)
        cells += [f'{losses(images):.2f}', f'{share:.2f}', f'{seconds:.0f}']
        if cache:
            grid = images.reshape(-1, 10, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
            grid = grid.reshape(-1, 10 * x.shape[2], x.shape[3]).squeeze()
            Image.fromarray(grid).save(cache / f'{name.replace(" ", "_")}_{"old" if settings else "default"}.png')
    return f'| {" | ".join(cells)} |'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, help='folder with cifar10_train_jpeg.npz; without, two networks')
    parser.add_argument('--cache', type=Path, help='folder for the trained networks and the pictures')
    arguments = parser.parse_args()
    if arguments.cache:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}')
    print(
        '| network | accuracy | verifier | real loss | old: loss | share | s | default: loss | share | s |\n|' + '---|' * 10
    )
    shifted = {'flip': False, 'noise': 0.3}
    rows = [
        ('digits 8 px', lambda: digits(8), Plain((32, 32, 64, 64)), Pooled((16, 32)), {'updates': 600, 'shift': 1}),
        ('digits 32 px', lambda: digits(32), Plain((16, 32, 32, 64, 64)), Pooled((8, 16, 16)), {'updates': 400, 'shift': 2}),
    ]
    for name, read, *networks, recipe in rows:
        print(row(name, read(), *networks, {**shifted, **recipe}, arguments.cache), flush=True)
    if arguments.data:
        recipe = {'updates': 1200, 'shift': 4, 'flip': True, 'noise': 0.0}
        networks = Plain((32, 64, 128)), Pooled((16, 32, 64))
        print(row('CIFAR-10 32 px', cifar(arguments.data), *networks, recipe, arguments.cache), flush=True)


if __name__ == '__main__':
    main()
