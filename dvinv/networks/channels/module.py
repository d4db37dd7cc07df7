"""A pruned network as an ordinary Linen module."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax

from dvinv.networks.channels.groups import find_channels
from dvinv.networks.channels.pruned_function import pruned_function


class PrunedModule(nn.Module):
    """`network` with fewer channels: the same layers and variable names, but smaller arrays.

    It maps x [B, H, W, C] to logits [B, K], and can be initialised, applied, trained, saved and tapped (its BatchNorm inputs
    captured by `inversion.tap`) like the network itself.

    Raises, when called:
      DvinvError: `kept` names layers or channels that this network does not have, or removes channels without others that
        must be removed together with them.
    """

    network: Any  # a Linen module that takes x and `train`, or an object with its `init` and `apply`
    kept: Mapping[str, tuple[int, ...]]  # {a layer with removed channels: the indices of its remaining output channels}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        network = self.network
        if isinstance(network, nn.Module):
            # Detached, so that it is not a submodule of this module, which has variables of its own.
            network = network.clone(parent=None, _deep_clone=True)
        channels = find_channels(network, x.shape[1:])
        keep = channels.keep_mask(self.kept)
        if self.is_initializing():
            unpruned = network.init(self.make_rng('params'), x, train=train)
            self._put(channels.sliced(keep, unpruned))
            return network.apply(unpruned, x, train=False)
        rngs = {name: self.make_rng(name) for name in ('dropout',) if self.has_rng(name)}

        def apply(variables, x, rngs):
            return network.apply(variables, x, train=train, rngs=rngs, mutable=self.scope.mutable or [])

        variables = {name: tree for name, tree in flax.core.unfreeze(dict(self.variables)).items() if tree}
        # The shapes of the full network's variables, but the dtypes of this module's, which may be a half-precision copy.
        example = jax.tree.map(lambda full, leaf: jax.ShapeDtypeStruct(full.shape, leaf.dtype), channels.shapes, variables)
        logits, changed = pruned_function(apply, (example, x, rngs), channels.places(keep))(variables, x, rngs)
        self._put(changed)
        return logits

    def _put(self, variables) -> None:
        for collection, tree in flax.core.unfreeze(variables).items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)
