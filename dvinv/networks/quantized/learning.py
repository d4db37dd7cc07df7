"""A quantized network that learns: kernels, shifts and all steps, by the one training loop.

This is LSQ (Esser et al., arXiv 1902.08153). Steps are learned by their logarithm, so that they stay positive and one
learning rate suits all.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.quantized.folding import Folded


class QuantizedModule(nn.Module):
    """`simulated` as a Linen module whose parameters start at given variables. x [B, H, W, C] -> logits [B, K].

    BatchNorms are folded, so nothing is different in train mode.
    """

    apply_fn: Callable  # of `network.simulated`
    start: Callable  # () -> {name: array}, what is learned
    assemble: Callable  # {name: array} -> the variables that apply_fn takes

    @nn.compact
    def __call__(self, x, train: bool = False):
        values = {name: self.param(name, lambda _, value=value: jnp.asarray(value)) for name, value in self.start().items()}
        return self.apply_fn(self.assemble(values), x)


def module_of(network: Folded, apply_fn: Callable, variables: dict) -> QuantizedModule:
    """The module that begins as the quantized `variables` (see `network.simulated`) of a folded network."""
    assemble, start = _assembler(network, variables)
    return QuantizedModule(apply_fn, lambda: start, assemble)


def learned(network: Folded, variables: dict, params: dict) -> dict:
    """The quantized variables with what a `module_of` them has learned."""
    assemble, _ = _assembler(network, variables)
    return jax.device_get(jax.jit(assemble)(params))


def _assembler(network: Folded, variables: dict) -> tuple[Callable, dict]:
    """(function of the learned values to all variables, the values to start from)."""
    flat = flatten(variables['weights'])
    shifts = [layer.norm.mean if layer.norm else layer.bias for layer in network.layers]
    places = dict.fromkeys([*(layer.kernel for layer in network.layers), *filter(None, shifts)])
    start = {_name('weights', place): flat[place] for place in places}
    start |= {_name('step', place): np.log(step) for place, step in variables['steps'].items()}
    start['inputs'] = np.log(variables['inputs']['step'])

    def assemble(values: dict) -> dict:
        weights = {place: values.get(_name('weights', place), leaf) for place, leaf in flat.items()}
        steps = {place: jnp.exp(values[_name('step', place)]) for place in variables['steps']}
        inputs = {**variables['inputs'], 'step': jnp.exp(values['inputs'])}
        return {**variables, 'weights': unflatten(weights), 'steps': steps, 'inputs': inputs}

    return assemble, start


def _name(kind: str, place: str) -> str:
    """A parameter's name, without the slash that divides the names of a checkpoint."""
    return f'{kind}:{place}'.replace('/', '.')
