"""Quantization-aware training of kernels, shifts and all steps, with the same training loop as other networks.

This is LSQ (Esser et al., arXiv 1902.08153). The parameters are the logarithms of the steps, so that steps stay positive and
one learning rate suits all.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dvinv.networks.classifier import flatten, unflatten
from dvinv.networks.quantized.folding import Folded


class QuantizedModule(nn.Module):
    """`simulated` as a Linen module with given initial parameters. x [B, H, W, C] -> logits [B, K].

    BatchNorms are folded, so train mode is the same as eval mode.
    """

    apply_fn: Callable  # from `network.simulated`
    start: Callable  # () -> {name: array}, the initial parameters
    assemble: Callable  # {name: array} -> the variables that apply_fn takes

    @nn.compact
    def __call__(self, x, train: bool = False):
        values = {name: self.param(name, lambda _, value=value: jnp.asarray(value)) for name, value in self.start().items()}
        return self.apply_fn(self.assemble(values), x)


def module_of(network: Folded, apply_fn: Callable, variables: dict) -> QuantizedModule:
    """Returns the module that starts at the quantized `variables` of a folded network; see `network.simulated`."""
    assemble, start = _assembler(network, variables)
    return QuantizedModule(apply_fn, lambda: start, assemble)


def trained_variables(network: Folded, variables: dict, params: dict) -> dict:
    """Returns the quantized variables with the trained `params` of the `module_of` them."""
    assemble, _ = _assembler(network, variables)
    return jax.device_get(jax.jit(assemble)(params))


def _assembler(network: Folded, variables: dict) -> tuple[Callable, dict]:
    """Returns (function of the parameters to all variables, initial parameters)."""
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
    """Returns the name of a parameter, without slashes, which separate names in a checkpoint."""
    return f'{kind}:{place}'.replace('/', '.')
