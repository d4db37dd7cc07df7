"""The VGGs of Simonyan and Zisserman (arXiv 1409.1556) with BatchNorm, as CIFAR's 32x32 pictures get them: one dense layer.

Submodules' paths spell PyTorch's keys ('features_4' is `features.4`), whose index counts every layer, the ReLU and the
pooling too.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dvinv.errors import DvinvError
from dvinv.networks.torch_layers import batch_norm, conv


class VGG(nn.Module):
    """VGG-11 with (1, 1, 2, 2, 2) convolutions, VGG-16 with (2, 2, 3, 3, 3). x [B, 32, 32, 3] -> logits [B, K].

    Of larger pictures the classifier gets the mean over what is left of space.
    """

    num_classes: int
    convolutions: Sequence[int]  # a stage, which ends by halving the picture
    channels: Sequence[int] = (64, 128, 256, 512, 512)  # a stage

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Raises DvinvError for a picture that is too small to be halved in every stage."""
        (height, width), smallest = x.shape[1:3], 2 ** len(self.convolutions)
        if min(height, width) < smallest:
            raise DvinvError(f'A VGG takes images of {smallest}x{smallest} or larger, not {height}x{width}.')
        index = 0
        for convolutions, channels in zip(self.convolutions, self.channels, strict=True):
            for _ in range(convolutions):
                x = conv(channels, 3, bias=True, name=f'features_{index}')(x)
                x = nn.relu(batch_norm(train, f'features_{index + 1}')(x))
                index += 3
            x = nn.max_pool(x, (2, 2), (2, 2))
            index += 1
        return nn.Dense(self.num_classes, name='classifier')(x.mean((1, 2)))
