"""A template for a network of your own: images from it, and a student of your own that learns from them.

    python -m dvinv.main --config configs/own_network.py --workdir runs/own_network

As it stands it trains a small Linen CNN on the digits inside scikit-learn, makes 512 images from it alone and teaches them
to a student with a quarter of its parameters: a minute or two on a CPU. Copy the file and put your own in; comments
say what each place takes. `:nnx` does the same with networks of NNX, `:smoke` shrinks the run to seconds.
"""

import functools
import sys
from pathlib import Path

import flax.linen as nn
import ml_collections
from flax import nnx

from dvinv.config import default_config, shrink

sys.path.append(str(Path(__file__).parent))  # 'own_network:teacher' is this file; any other module on Python's path will do


class Net(nn.Module):
    """Any Flax network with BatchNorm, Linen or NNX, will do: x [B, H, W, C] to logits [B, classes]."""

    num_classes: int
    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool = False):
        for channels in self.channels:
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """The same in NNX; a model is put in train and eval mode by its own train() and eval()."""

    def __init__(self, num_classes, channels, rngs):
        layers, pool = [], functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        for before, after in zip((1, *channels), channels, strict=False):
            layers.append(nnx.Conv(before, after, (3, 3), use_bias=False, rngs=rngs))
            layers += [nnx.BatchNorm(after, momentum=0.9, rngs=rngs), nnx.relu, pool]
        self.body, self.head = nnx.Sequential(*layers), nnx.Linear(channels[-1], num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(x).mean((1, 2)))


def teacher(num_classes):
    """An untrained network, which the task `teacher` trains on the data below; of NNX see `nnx_teacher`.

    Of a trained one return a Teacher, without arguments; image_shape, mean and std below are then not needed:

        template = Net(10, (32, 64)).init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
        variables = flax.serialization.from_bytes(template, Path('net.msgpack').read_bytes())  # of to_bytes(variables)
        return dvinv.from_linen(Net(10, (32, 64)), variables, image_shape=(8, 8, 1), mean=[0.3], std=[0.37])
    """
    return Net(num_classes, (32, 64))


def student(num_classes):
    """The network that learns from the images; it need not be like the teacher."""
    return Net(num_classes, (16, 32))


def nnx_teacher(num_classes, rngs):
    """The untrained network in NNX; of a trained one return a Teacher, without arguments:

    return dvinv.from_nnx(model, image_shape=(8, 8, 1), mean=[0.3], std=[0.37])
    """
    return NnxNet(num_classes, (32, 64), rngs)


def nnx_student(num_classes, rngs):
    """The network in NNX that learns from the images; teacher and student need not both be of NNX."""
    return NnxNet(num_classes, (16, 32), rngs)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'nnx' or 'smoke'."""
    config = default_config()  # settings of the synthesis by the size of the images; or by a name of dvinv.PRESETS
    config.teacher.factory, config.student.factory = 'own_network:teacher', 'own_network:student'
    # Data: 'npz' or 'folders' with data.path and data.train_path are your own (docs/real_data.md). None, for a Teacher:
    # config.data.name = config.verifier.network = '', and no 'real' in distillation.controls; agreement with the teacher on
    # images that are held out then takes the place of test accuracy.
    config.data.name = 'digits'
    # Of pixels in [0, 1], one number a channel; () is: of the training images. The shape of images is that of the data.
    config.teacher.mean, config.teacher.std = (), ()
    config.synthesis.update(images=512, batch_size=256)
    # How teacher, verifier (a second network that judges the images) and student are trained; all fields: docs/settings.md.
    augmentation = {
        'shift': 1,
        'noise': 0.1,
    }  # in pixels; a deviation of pixels in [0, 1]; 'flip': True for pictures of things
    config.teacher.training.update(updates=400, batch_size=64, learning_rate=5e-3, warmup=40, **augmentation)
    config.verifier.training.update(updates=400, batch_size=64, learning_rate=2e-3, warmup=40, **augmentation)
    config.distillation.update(updates=400, batch_size=64, learning_rate=1e-2, warmup=40, **augmentation)
    # A student of real use wants more: hints from the teacher's stages, and thousands of images and updates.
    # config.distillation.update(hint=100.0, learning_rate=0.1, clip_norm=30.0, updates=5000); synthesis.images=5120
    config.distillation.controls = ('noise',)  # the same student on noise; 'prior_only', 'real' tell more and take longer
    if arg == 'nnx':
        config.teacher.factory, config.student.factory = 'own_network:nnx_teacher', 'own_network:nnx_student'
    elif arg == 'smoke':
        shrink(config)
    elif arg:
        raise ValueError(f'This config knows the arguments nnx and smoke, not {arg!r}')
    return config
