"""Networks with quantized kernels and layer inputs: the variables during quantization, and the file.

Both are simulated in float32 on whole numbers of steps. An integer convolution would give the same result up to the rounding
of sums, but XLA has no fast one on CPU.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import conv_general_dilated_p, dot_general_p

from dvinv.errors import DvinvError, listed
from dvinv.graph.rewriting import rewritten
from dvinv.networks import registry
from dvinv.networks.classifier import Classifier, flatten, unflatten
from dvinv.networks.files import classifier_of, load_network, module_of, save_network
from dvinv.networks.quantized.folding import Folded, corrected
from dvinv.networks.quantized.layers import CUT, Layer, find_layers
from dvinv.networks.quantized.ranges import Observation, grid_of
from dvinv.networks.quantized.rounding import (
    largest,
    packed,
    round_inputs,
    round_weights,
    unpacked,
    weight_steps,
    whole_weights,
)


def with_rules(apply_fn: Callable, layers: Sequence[Layer], around: Callable) -> Callable:
    """Returns `(weights, ceilings, x) -> logits`, which runs `apply_fn` with its layers computed by `around`.

    Args:
      around: called as `around(index of the layer, bind, operands)`; `bind(*operands)` is the operation itself.

    Returns:
      The function; for `ceilings` see `folding.Folded`.
    """
    index_of = {layer.number: index for index, layer in enumerate(layers)}

    def run(weights, ceilings, x):
        operations, cuts = itertools.count(), itertools.count()

        def layer_rule(primitive):
            def rule(params):
                index = index_of.get(next(operations))
                settings = {name: value for name, value in params.items() if name != 'avals'}
                if index is None:
                    return None
                return lambda *operands: around(index, lambda *arrays: primitive.bind(*arrays, **settings), operands)

            return rule

        def ceiling_rule(params):
            factor = ceilings.get(str(next(cuts)))
            if factor is None:
                return None
            inside = params.get('call_jaxpr')

            def scaled(*operands):
                operands = [o * factor if np.ndim(o) else o for o in operands]
                result = jaxpr_as_fun(inside)(*operands)[0] if inside else jnp.minimum(*operands)
                return result / factor

            return scaled

        rules = {primitive.name: layer_rule(primitive) for primitive in (conv_general_dilated_p, dot_general_p)}
        return rewritten(apply_fn, {**rules, **dict.fromkeys(CUT, ceiling_rule)})(weights, x)

    return run


def products_in_bfloat16(apply_fn: Callable) -> Callable:
    """Returns `apply_fn` with its convolutions and matrix products in bfloat16 and everything else unchanged.

    Operands and results are rounded to bfloat16: operands of 8 bits by up to a quarter of a step, of 4 bits by a 64th.
    """

    def rule(primitive):
        def product(params):
            settings = {name: value for name, value in params.items() if name not in ('avals', 'preferred_element_type')}

            def run(*operands):
                operands = [operand.astype(jnp.bfloat16) for operand in operands]
                return primitive.bind(*operands, preferred_element_type=jnp.bfloat16, **settings).astype(jnp.float32)

            return run

        return product

    return rewritten(apply_fn, {primitive.name: rule(primitive) for primitive in (conv_general_dilated_p, dot_general_p)})


@functools.lru_cache(maxsize=8)  # returns the same function for the same network, so that it is compiled once
def simulated(apply_fn: Callable, layers: tuple[Layer, ...]) -> Callable:
    """Returns the simulated quantized network, `(variables, x) -> logits`, differentiable; kernels are rounded in the call.

    The variables are 'weights' (of the network, float32), 'steps' and 'tops' ({path of a kernel: its steps, its largest
    magnitude in steps}), 'inputs' ('step', 'zero' and 'top', float32 [L], one number per layer) and 'ceilings'. A layer
    without steps stays in float32.
    """
    run = _rounding_inputs(apply_fn, layers)

    def apply(variables, x):
        flat = dict(flatten(variables['weights']))
        for path, step in variables['steps'].items():
            flat[path] = round_weights(flat[path], step, variables['tops'][path]) * step
        return run(unflatten(flat), variables['steps'], variables['inputs'], variables['ceilings'], x)

    return apply


def _rounding_inputs(apply_fn: Callable, layers: Sequence[Layer]) -> Callable:
    def run(weights, steps, inputs, ceilings, x):
        def around(index, bind, operands):
            layer = layers[index]
            if layer.kernel in steps:
                operands = list(operands)
                place = 1 - layer.side
                grid = [inputs[name][index] for name in ('step', 'zero', 'top')]
                operands[place] = round_inputs(operands[place], *grid)
            return bind(*operands)

        return with_rules(apply_fn, layers, around)(weights, ceilings, x)

    return run


@dataclasses.dataclass(frozen=True)
class Bits:
    """The numbers of bits of a layer's weights and inputs; 0: float32."""

    weights: int
    inputs: int


def quantize(
    network: Folded, bits: Sequence[Bits], seen: Sequence[Observation], method: str, means: list[np.ndarray] | None
) -> dict:
    """Quantizes a folded network; returns the variables that `simulated` takes.

    Args:
      bits, seen: the bits, and the calibration data of the inputs, one per layer.
      method: the range estimator for `seen`, see `ranges.grid_of`.
      means: the means of the layers' input channels, for bias correction; None: no correction.
    """
    flat = flatten(network.weights)
    steps, tops, whole = {}, {}, {}
    for layer, of in zip(network.layers, bits, strict=True):
        if of.weights and layer.kernel not in steps:
            kernel = np.asarray(flat[layer.kernel])
            steps[layer.kernel] = weight_steps(kernel, of.weights, layer.contracted)
            tops[layer.kernel] = np.float32(largest(of.weights))
            whole[layer.kernel] = whole_weights(kernel, steps[layer.kernel], of.weights)
    grids = [grid_of(told, of.inputs, method) if of.inputs else (1.0, 0.0) for told, of in zip(seen, bits, strict=True)]
    inputs = {
        'step': np.array([step for step, _ in grids], np.float32),
        'zero': np.array([zero for _, zero in grids], np.float32),
        'top': np.array([2.0**of.inputs - 1 for of in bits], np.float32),
    }
    rounded = {path: whole[path] * steps[path] for path in whole}
    weights = network.weights if means is None else corrected(network, rounded, means)
    return {'weights': weights, 'steps': steps, 'tops': tops, 'inputs': inputs, 'ceilings': network.ceilings}


def save_quantized(path: Path, variables: dict, bits: dict[str, int], about: dict) -> None:
    """Writes a quantized network as a file that contains its description.

    A kernel is stored as a dense stream of its bits (two numbers per byte at 4 bits), and its steps as a float32 array. Of
    the other variables (shifts), an array of equal numbers is stored as one number in the header.

    Args:
      variables: as `simulated` takes them.
      bits: {path of a kernel: the number of bits of its weights}.
      about: as for `networks.save_network`; 'network' is '' if the network is not in the registry.
    """
    tensors, constants = {}, {}
    for place, leaf in flatten(variables['weights']).items():
        leaf = np.asarray(leaf, np.float32)
        if place in bits:
            step = np.asarray(variables['steps'][place], np.float32)
            tensors[f'bits/{place}'] = packed(whole_weights(leaf, step, bits[place]), bits[place])
            tensors[f'step/{place}'] = step.ravel()
        elif leaf.size and (leaf == leaf.flat[0]).all():
            constants[place] = float(leaf.flat[0])
        else:
            tensors[f'is/{place}'] = leaf
    tensors['inputs'] = np.stack([np.asarray(variables['inputs'][name], np.float32) for name in ('step', 'zero', 'top')])
    tensors |= {f'ceilings/{number}': np.asarray(factor) for number, factor in variables['ceilings'].items()}
    save_network(path, unflatten(tensors), {**about, 'bits': bits, 'constants': constants})


def load_quantized(path: Path, like: Classifier | None = None) -> Classifier:
    """Loads the network of a file that `save_quantized` wrote; its kernels stay packed in memory.

    Args:
      like: the float network (its shapes and function are used); required if the network is not in the registry.

    Raises:
      DvinvError: the file is missing, damaged, not a quantized network, of another network than `like`, or needs `like`.
    """
    stored, about = load_network(path)
    if 'bits' not in about:
        raise DvinvError(f'{path} holds a network in float32; dvinv.networks.load_classifier reads it.')
    if like is None:
        if not about['network']:
            raise DvinvError(
                f'{path} was made from a network that is not among those of dvinv; give the teacher that it was made from '
                '(what teacher.factory returned): dvinv.load(..., teacher=teacher).'
            )
        module = module_of(about)
        like = classifier_of(module, registry.shapes_of(module, tuple(about['image_shape'])), about)
    shapes = {place: leaf.shape for place, leaf in flatten(like.variables).items()}
    layers = find_layers(like.apply_fn, like.variables, like.image_shape)
    run, bits, constants = _rounding_inputs(like.apply_fn, layers), about['bits'], about['constants']
    here = {name.split('/', 1)[1] for name in flatten(stored) if name.startswith(('bits/', 'is/'))} | constants.keys()
    if here != shapes.keys() or not bits.keys() <= {layer.kernel for layer in layers}:
        differing = listed(sorted(here ^ shapes.keys()) or sorted(bits))
        raise DvinvError(f'{path} holds another network than the one it is to be: {differing} differ; give it its own.')
    axes = {layer.kernel: layer.contracted for layer in layers}

    def apply(variables, x):
        flat, weights = flatten(variables), {}
        for place, shape in shapes.items():
            if place in bits:
                along = [1 if axis in axes[place] else length for axis, length in enumerate(shape)]
                step = flat[f'step/{place}'].reshape(along)
                weights[place] = unpacked(flat[f'bits/{place}'], bits[place], shape) * step
            elif place in constants:
                weights[place] = jnp.full(shape, constants[place], jnp.float32)
            else:
                weights[place] = flat[f'is/{place}']
        inputs = dict(zip(('step', 'zero', 'top'), flat['inputs'], strict=True))
        ceilings = {name.removeprefix('ceilings/'): leaf for name, leaf in flat.items() if name.startswith('ceilings/')}
        return run(unflatten(weights), bits, inputs, ceilings, x)

    return Classifier(apply, stored, like.image_shape, like.num_classes, like.mean, like.std)
