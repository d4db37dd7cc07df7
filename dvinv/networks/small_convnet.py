"""x."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from dvinv.networks.torch_layers import batch_norm


class SmallConvNet(nn.Module):
    """3x3 convolutions with BatchNorm and max-pooling, dropout, and a wide dense layer. x [B, H, W, C] -> logits [B, K]."""

    num_classes: int
    channels: Sequence[int] = (32, 64)  # per convolution
    hidden: int = 128
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for channels in self.channels:
            x = nn.max_pool(nn.relu(batch_norm(train)(nn.Conv(channels, (3, 3))(x))), (2, 2), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(self.hidden)(x)))
