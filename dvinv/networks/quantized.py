"""Quantized networks: rounding to a few bits, the simulated network, and its file.

Weights are symmetric, with one step per channel: w = step q with |q| <= 2^(b-1) - 1. Activations are affine, with one step
per layer or per token: x = step (q - zero point) with 0 <= q <= 2^b - 1, so that 0 (padding, the negative side of a ReLU) is
represented exactly.

Both are simulated in float32 on whole numbers of steps. An integer convolution would give the same result up to the rounding
of sums, but XLA has no fast one on CPU.

The implementation is a set of rules on a network's jaxpr. The library qwix (0.1.8) intercepts Linen and NNX modules instead;
it has no percentile or least-squares ranges, learned steps, BatchNorm folding or packed file, and under this project's
versions of Flax its imports raise warnings, which are errors in our tests.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num, UInt8

from dvinv.graph.program import contraction_rules, rewritten
from dvinv.networks.calibration import Calibration, Folded, bias_corrected, quantization_parameters
from dvinv.networks.classifier import AnyArray, Classifier, flatten, shapes_of, unflatten
from dvinv.networks.files import classifier_of, load_network, module_of, save_network
from dvinv.networks.quantized_layers import Layer, find_layers, with_rules, with_token_ranges
from dvinv.runtime.errors import DvinvError, listed

# Fractions of the largest magnitude that are tried in the search for the step of least squared error.
STEP_SHARES = np.linspace(0.3, 1.0, 36)
INPUT_PARAMETERS = ('step', 'zero_point', 'top')  # of the inputs of a layer, in the order in which a file has them


def largest(bits: int) -> int:
    """Returns the largest magnitude, in steps, of a weight of `bits` bits."""
    return 2 ** (bits - 1) - 1


@jax.custom_jvp
def rounded(x: Float[AnyArray, '*S']) -> Float[jax.Array, '*S']:
    """Rounds to the nearest integer, with a straight-through gradient (Bengio et al., arXiv 1308.3432)."""
    return jnp.round(x)


rounded.defjvp(lambda x, dx: (jnp.round(x[0]), dx[0]))


def round_weights(weights: Float[AnyArray, '*S'], step, top) -> Float[jax.Array, '*S']:
    """Rounds `weights` to whole numbers of `step` (broadcast), of a magnitude of at most `top`.

    Differentiable in both; the gradient with respect to `step` is that of LSQ (Esser et al., arXiv 1902.08153, eq. 3).
    """
    return jnp.clip(rounded(weights / step), -top, top)


def integer_weights(kernel: Float[np.ndarray, '*S'], step: np.ndarray, bits: int) -> Float[np.ndarray, '*S']:
    """Computes the same as `round_weights` in NumPy, for `bits` bits and without a gradient."""
    return np.clip(np.rint(kernel / step), -largest(bits), largest(bits))


def round_inputs(x: Float[AnyArray, '*S'], step, zero_point, top) -> Float[jax.Array, '*S']:
    """Rounds activations to `top` + 1 values, `zero_point` of them below 0; float, differentiable as `round_weights`."""
    return (jnp.clip(rounded(x / step) + zero_point, 0, top) - zero_point) * step


def round_tokens(x: Float[AnyArray, '*S'], axis: int, top) -> Float[jax.Array, '*S']:
    """Rounds each token of activations to `top` + 1 values between its own extremes; float, differentiable in `x`.

    The range is computed in the call (dynamic quantization), so that it needs no calibration, and a token of large values
    does not make the steps of all others coarse.

    Args:
      x: activations, [..., C, ...].
      axis: the axis of the channels of a token.
      top: the number of steps, 2^b - 1.
    """
    fixed = jax.lax.stop_gradient(x)
    low, high = jnp.minimum(fixed.min(axis, keepdims=True), 0), jnp.maximum(fixed.max(axis, keepdims=True), 0)
    step = jnp.where(high > low, (high - low) / top, 1.0)
    return round_inputs(x, step, jnp.round(-low / step), top)


def weight_steps(kernel: Float[np.ndarray, '...'], bits: int, contracted: tuple[int, ...]) -> Float[np.ndarray, '...']:
    """Returns the step of least squared error for each output channel; float32, of length 1 along the `contracted` axes."""
    top = largest(bits)
    magnitude = np.abs(kernel).max(contracted, keepdims=True)
    magnitude = np.where(magnitude > 0, magnitude, 1.0)
    best, least_error = STEP_SHARES[0] * magnitude / top, np.full(magnitude.shape, np.inf)
    for share in STEP_SHARES:
        step = share * magnitude / top
        error = ((np.clip(np.rint(kernel / step), -top, top) * step - kernel) ** 2).sum(contracted, keepdims=True)
        best, least_error = np.where(error < least_error, step, best), np.minimum(error, least_error)
    return best.astype(np.float32)


def packed(integers: Num[np.ndarray, '...'], bits: int) -> UInt8[np.ndarray, 'bytes']:
    """Packs integers into a dense stream of `bits` bits each, uint8; two per byte at 4 bits."""
    unsigned = (integers.ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1)[:, -bits:].ravel())


def unpacked(stream: UInt8[AnyArray, 'bytes'], bits: int, shape) -> Float[AnyArray, '...']:
    """Unpacks the integers of such a stream, float32 of `shape`; also usable within a compiled function."""
    digits = (stream[:, None] >> np.arange(7, -1, -1, dtype=np.uint8)) & 1
    count = int(np.prod(shape))
    digits = digits.reshape(-1)[: count * bits].reshape(count, bits)
    powers = 2.0 ** np.arange(bits - 1, -1, -1, dtype=np.float32)
    return (digits.astype(jnp.float32) * powers).sum(1).reshape(shape) - 2.0 ** (bits - 1)


def products_in_bfloat16(apply_fn: Callable) -> Callable:
    """Returns `apply_fn` with its convolutions and matrix products in bfloat16 and everything else unchanged.

    Operands and results are rounded to bfloat16: operands of 8 bits by up to a quarter of a step, of 4 bits by a 64th.
    """

    def rule(primitive, params):
        def product(*operands):
            operands = [operand.astype(jnp.bfloat16) for operand in operands]
            return primitive.bind(*operands, **params | {'preferred_element_type': jnp.bfloat16}).astype(jnp.float32)

        return product

    return rewritten(apply_fn, contraction_rules(rule))


@functools.lru_cache(maxsize=8)  # returns the same function for the same network, so that it is compiled once
def simulated(apply_fn: Callable, layers: tuple[Layer, ...]) -> Callable:
    """Returns the simulated quantized network, `(variables, x) -> logits`, differentiable; kernels are rounded in the call.

    The variables are 'weights' (of the network, float32), 'steps' and 'tops' ({path of a kernel: its steps, its largest
    magnitude in steps}), 'inputs' (see `INPUT_PARAMETERS`, float32 [L] each, one number per layer) and 'ceilings'. A layer
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
        def compute_layer(index, bind, operands):
            layer = layers[index]
            if layer.kernel in steps:
                operands, side = list(operands), 1 - layer.side
                parameters = [inputs[name][index] for name in INPUT_PARAMETERS]
                if layer.per_token and layer.channel is not None:
                    operands[side] = round_tokens(operands[side], layer.channel, parameters[-1])
                else:
                    operands[side] = round_inputs(operands[side], *parameters)
            return bind(*operands)

        return with_rules(apply_fn, layers, compute_layer)(weights, ceilings, x)

    return run


@dataclasses.dataclass(frozen=True)
class Bits:
    """The numbers of bits of a layer's weights and inputs; 0: float32."""

    weights: int
    inputs: int


def quantize(
    network: Folded,
    bits: Sequence[Bits],
    calibrations: Sequence[Calibration],
    method: str,
    means: list[np.ndarray] | None,
) -> dict:
    """Quantizes a folded network; returns the variables that `simulated` takes.

    Args:
      bits, calibrations: the bits, and the recorded inputs, one per layer.
      method: the range estimator, see `calibration.quantization_parameters`.
      means: the means of the layers' input channels, for bias correction; None: no correction.
    """
    flat = flatten(network.weights)
    steps, tops, rounded_kernels = {}, {}, {}
    for layer, layer_bits in zip(network.layers, bits, strict=True):
        if layer_bits.weights and layer.kernel not in steps:
            kernel = np.asarray(flat[layer.kernel])
            step = weight_steps(kernel, layer_bits.weights, layer.contracted)
            steps[layer.kernel] = step
            tops[layer.kernel] = np.float32(largest(layer_bits.weights))
            rounded_kernels[layer.kernel] = integer_weights(kernel, step, layer_bits.weights) * step
    parameters = [
        quantization_parameters(calibration, layer_bits.inputs, method) if layer_bits.inputs else (1.0, 0.0)
        for calibration, layer_bits in zip(calibrations, bits, strict=True)
    ]
    inputs = {
        'step': np.array([step for step, _ in parameters], np.float32),
        'zero_point': np.array([zero_point for _, zero_point in parameters], np.float32),
        'top': np.array([2.0**layer_bits.inputs - 1 for layer_bits in bits], np.float32),
    }
    weights = network.weights if means is None else bias_corrected(network, rounded_kernels, means)
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
            tensors[f'bits/{place}'] = packed(integer_weights(leaf, step, bits[place]), bits[place])
            tensors[f'step/{place}'] = step.ravel()
        elif leaf.size and (leaf == leaf.flat[0]).all():
            constants[place] = float(leaf.flat[0])
        else:
            tensors[f'is/{place}'] = leaf
    tensors['inputs'] = np.stack([np.asarray(variables['inputs'][name], np.float32) for name in INPUT_PARAMETERS])
    tensors |= {f'ceilings/{number}': np.asarray(factor) for number, factor in variables['ceilings'].items()}
    save_network(path, unflatten(tensors), {**about, 'bits': bits, 'constants': constants})


def load_quantized(path: Path, unquantized: Classifier | None = None) -> Classifier:
    """Loads the network of a file that `save_quantized` wrote; its kernels stay packed in memory.

    Args:
      unquantized: the network in float32, for its shapes and function; required if the network is not in the registry.

    Raises:
      DvinvError: the file is missing, damaged, not a quantized network, of another network than `unquantized`, or needs
        `unquantized`.
    """
    stored, about = load_network(path)
    if 'bits' not in about:
        raise DvinvError(f'{path} holds a network in float32; dvinv.networks.load_classifier reads it.')
    if unquantized is None:
        if not about['network']:
            raise DvinvError(
                f'{path} was made from a network that is not among those of dvinv; give the teacher that it was made from '
                '(what teacher.factory returned): dvinv.load(..., teacher=teacher).'
            )
        module = module_of(about)
        unquantized = classifier_of(module, shapes_of(module, tuple(about['image_shape'])), about)
    variables = unquantized.without_moments().variables  # what was quantized
    shapes = {place: leaf.shape for place, leaf in flatten(variables).items()}
    layers = find_layers(unquantized.apply_fn, variables, unquantized.image_shape)
    layers = with_token_ranges(layers, about.get('per_token', ()))
    run, bits, constants = _rounding_inputs(unquantized.apply_fn, layers), about['bits'], about['constants']
    names = {name.split('/', 1)[1] for name in flatten(stored) if name.startswith(('bits/', 'is/'))} | constants.keys()
    if names != shapes.keys() or not bits.keys() <= {layer.kernel for layer in layers}:
        differing = listed(sorted(names ^ shapes.keys()) or sorted(bits))
        raise DvinvError(
            f'{path} holds another network than the one that it is loaded for: {differing} differ; give the network that it '
            'was made from.'
        )
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
        inputs = dict(zip(INPUT_PARAMETERS, flat['inputs'], strict=True))
        ceilings = {name.removeprefix('ceilings/'): leaf for name, leaf in flat.items() if name.startswith('ceilings/')}
        return run(unflatten(weights), bits, inputs, ceilings, x)

    return Classifier(
        apply,
        stored,
        unquantized.image_shape,
        unquantized.num_classes,
        unquantized.mean,
        unquantized.std,
    )
