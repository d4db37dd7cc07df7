"""Networks as users have them, inverted with nothing chosen, beside an older recipe: a table in markdown.

    python benchmarks/own_networks.py --data ../shared/data

A small Flax network with BatchNorm and, as a verifier, one of another architecture and seed are trained here for each of:
the 8x8 digits inside scikit-learn, the same enlarged to 32x32, and, where the folder `--data` has
`cifar10_train_jpeg.npz` and `cifar10_test_jpeg.npz`, CIFAR-10 (all training images, about 5 minutes of one core a network).
Then `dvinv.invert(teacher, labels, key=...)` makes 100 images for each of the keys 0, 2 and 3, and so does the older recipe:
500 iterations by steps of .1, jitter 2, default weights. Shares are means and standard deviations over keys, beside that of
real test images that the verifier reads right. All feature losses are on the view of the default's last stage, those of 100
real images too. `--cache FOLDER` keeps the trained networks, and the pictures.
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
IMAGES, KEYS = 100, (0, 2, 3)  # the preset `32px_color` was chosen on a network of another seed, and the key 1


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


def trained(net: nn.Module, x, y, mean, std, seed: int, updates: int, shift: int, flip: bool, noise: float):
    """Variables of `net`, taught pixels x uint8 [N, H, W, C], normalised, shifted, mirrored and with noise, and labels y."""
    variables = net.init(jax.random.key(seed), np.zeros((1, *x.shape[1:]), np.float32), train=False)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, updates))
    state, rng = optimizer.init(variables['params']), np.random.default_rng(seed)

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
        images, (top, left) = np.pad(x[rows], pad), rng.integers(2 * shift + 1, size=(2, 64))
        images = np.stack(
            [image[a : a + x.shape[1], b : b + x.shape[2]] for image, a, b in zip(images, top, left, strict=True)]
        )
        if flip:
            images = np.where(rng.random((64, 1, 1, 1)) < 0.5, images, images[:, :, ::-1])
        images = (images / 255 - mean) / std + noise * rng.random((64, 1, 1, 1)) * rng.normal(size=images.shape)
        variables, state = update(variables, state, images.astype(np.float32), y[rows])
    return jax.device_get(variables)


def digits(size: int):
    """Images uint8 [N, size, size, 1] and labels to train on, and 360 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jax.image.resize(data.images[order, ..., None] / 16, (len(order), size, size, 1), 'linear')
    images, labels = np.rint(255 * np.asarray(images)).astype(np.uint8), data.target[order]
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def cifar(folder: Path):
    """All 50,000 images uint8 [N, 32, 32, 3] and labels to train on, and 2,000 to test."""

    def split(name: str, count: int):
        data = np.load(folder / f'cifar10_{name}_jpeg.npz')
        head, files, ends = data['header'].tobytes(), data['jpeg'].tobytes(), data['offsets']
        images = [np.asarray(Image.open(io.BytesIO(head + files[ends[i] : ends[i + 1]]))) for i in range(count)]
        return np.stack(images), data['labels'][:count].astype(np.int32)

    return split('train', 50_000), split('test', 2000)


def row(name: str, data, teacher_net, verifier_net, recipe: dict, cache: Path | None) -> str:
    """A line of the table for networks of the names and recipe, on `data` = ((images, labels) to train on, to test on)."""
    (x, y), (test_x, test_y) = data
    some = x[:: -(-len(x) // 5000)] / 255
    mean, std = some.mean((0, 1, 2)), some.std((0, 1, 2))

    def network(role, net, seed):
        path = cache and cache / f'{name.replace(" ", "_")}_{role}.npz'
        if path and path.exists():
            variables = unflatten_dict({tuple(key.split('/')): value for key, value in np.load(path).items()})
        else:
            variables = trained(net, x, y, mean, std, seed, **recipe)
            if path:
                np.savez(path, **{'/'.join(key): value for key, value in flatten_dict(variables).items()})
        apply = jax.jit(lambda pixels: net.apply(variables, (pixels / 255 - mean) / std, train=False).argmax(-1))
        return variables, apply, float((apply(test_x) == test_y).mean())

    variables, _, accuracy = network('teacher', teacher_net, 3)
    _, verify, verifier_accuracy = network('verifier', verifier_net, 2)
    teacher = dvinv.from_linen(teacher_net, variables, image_shape=x.shape[1:], mean=mean, std=std)
    labels = dvinv.balanced_labels(0, IMAGES, 10)
    cells = [name, f'{accuracy:.3f}', f'{verifier_accuracy:.3f}']
    real = np.stack([x[np.flatnonzero(y == label)[i // 10]] for i, label in enumerate(labels)])

    def losses(images):
        return np.mean([dvinv.feature_loss(teacher, images, key=key) for key in range(5)])

    cells.append(f'{losses(real):.2f}')
    for settings in (OLD, None):
        start = time.perf_counter()
        batches = [teacher.to_uint8(dvinv.invert(teacher, labels, settings, key).images) for key in KEYS]
        seconds = (time.perf_counter() - start) / len(KEYS)
        shares = [np.mean(np.asarray(verify(images)) == labels) for images in batches]
        loss = np.mean([losses(images) for images in batches])
        cells += [f'{loss:.2f}', f'{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}', f'{seconds:.0f}']
        if cache:
            grid = batches[0].reshape(-1, 10, *x.shape[1:]).transpose(0, 2, 1, 3, 4)
            grid = grid.reshape(-1, 10 * x.shape[2], x.shape[3]).squeeze()
            Image.fromarray(grid).save(cache / f'{name.replace(" ", "_")}_{"old" if settings else "default"}.png')
    return f'| {" | ".join(cells)} |'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--data', type=Path, help='folder with cifar10_train_jpeg.npz and cifar10_test_jpeg.npz; without, two networks'
    )
    parser.add_argument('--cache', type=Path, help='folder for the trained networks and the pictures')
    arguments = parser.parse_args()
    if arguments.cache:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}')
    print(
        '| network | accuracy | verifier on real images | real loss | old: loss | share | s | default: loss | share | s |\n|'
        + '---|' * 10
    )
    shifted = {'flip': False, 'noise': 0.3}
    rows = [
        ('digits 8 px', lambda: digits(8), Plain((32, 32, 64, 64)), Pooled((16, 32)), {'updates': 600, 'shift': 1}),
        ('digits 32 px', lambda: digits(32), Plain((16, 32, 32, 64, 64)), Pooled((8, 16, 16)), {'updates': 400, 'shift': 2}),
    ]
    for name, read, *networks, recipe in rows:
        print(row(name, read(), *networks, {**shifted, **recipe}, arguments.cache), flush=True)
    if arguments.data:
        recipe = {'updates': 3000, 'shift': 4, 'flip': True, 'noise': 0.0}
        networks = Plain((16, 32, 32, 64, 64, 128, 128)), Pooled((16, 32, 64))
        print(row('CIFAR-10 32 px', cifar(arguments.data), *networks, recipe, arguments.cache), flush=True)


if __name__ == '__main__':
    main()
