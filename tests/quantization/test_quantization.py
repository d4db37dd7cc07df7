"""Networks of few bits: layers found in any network, foldings that change nothing, roundings, ranges, files, the task."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from smoke import smoke_config, smoke_run
from tiny import IMAGE_SHAPE, MEAN, STD, TinyNet, saved, tiny_teacher, trained, trained_variables

import dvinv
from dvinv.config import QuantizationSettings
from dvinv.data.pool import ImagePool
from dvinv.inversion import from_linen, from_nnx
from dvinv.networks import create, load_classifier, quantized
from dvinv.networks.calibration import (
    Calibration,
    bias_corrected,
    equalise,
    fold,
    on_images,
    on_statistics,
    quantization_parameters,
)
from dvinv.networks.classifier import flatten
from dvinv.networks.quantized import Bits, load_quantized, products_in_bfloat16, quantize, save_quantized, simulated
from dvinv.networks.quantized_layers import find_layers, with_rules, with_token_ranges
from dvinv.pipeline import tasks as pipeline
from dvinv.quantization.task import CalibratedNetwork, Scores, ablation, bits_of_layers, quantization_section
from dvinv.report.page import render
from dvinv.runtime.errors import DvinvError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(256, size=(24, *IMAGE_SHAPE)).astype(np.uint8)


class Nnx(nnx.Module):
    """An NNX network; its convolution has a bias before the BatchNorm."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class Depthwise(nn.Module):
    """As in a MobileNet: a plain, a depthwise and a 1x1 convolution, ReLU6 after each."""

    @nn.compact
    def __call__(self, x):
        for channels, size, groups in ((4, 3, 1), (4, 3, 4), (6, 1, 1)):
            x = nn.Conv(channels, (size, size), feature_group_count=groups, use_bias=False)(x)
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
        return nn.Conv(3, (1, 1))(x).mean((1, 2))


def _nnx_teacher():
    teacher = from_nnx(Nnx(nnx.Rngs(0)), image_shape=IMAGE_SHAPE, mean=MEAN, std=STD)
    return teacher.__class__(**{**vars(teacher), 'variables': trained(teacher.variables)})


def _linen_teacher(module, shape):
    half = (0.5,) * shape[-1]
    return from_linen(module, trained_variables(module, shape), image_shape=shape, mean=half, std=half)


TEACHERS = {  # what they are, layers, how many are folded, how many feed another
    'tiny': (tiny_teacher, 3, 2, 1),
    'nnx': (_nnx_teacher, 2, 1, 0),
    'small_resnet': (lambda: _linen_teacher(create('small_resnet', 10, 0.125), (8, 8, 1)), 8, 7, 3),
    'depthwise': (lambda: _linen_teacher(Depthwise(), IMAGE_SHAPE), 4, 3, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', TEACHERS)
def test_folding_and_equalising_change_nothing(name):
    make, layers, folded, feeding = TEACHERS[name]
    teacher = make()
    plain = fold(teacher.apply_fn, teacher.variables, teacher.image_shape)
    equal = equalise(plain)
    assert len(plain.layers) == layers
    assert sum(layer.norm is not None for layer in plain.layers) == folded == len(plain.statistics)
    assert sum(layer.feeds is not None for layer in plain.layers) == feeding
    x = 4 * RNG.normal(size=(2, *teacher.image_shape)).astype(np.float32)  # far enough for a ReLU6 to cut
    expected = jax.jit(teacher.apply_fn)(teacher.variables, x)
    for network in (plain, equal):
        run = with_rules(network.apply_fn, network.layers, lambda index, bind, operands: bind(*operands))
        np.testing.assert_allclose(jax.jit(run)(network.weights, network.ceilings, x), expected, rtol=2e-3, atol=2e-4)
    changed = [path for path, leaf in flatten(equal.weights).items() if not np.allclose(leaf, flatten(plain.weights)[path])]
    assert bool(changed) == bool(feeding)
    assert bool(equal.ceilings) == (name == 'depthwise')


def test_what_is_pre_activated_is_left_alone():
    """A BatchNorm on a sum belongs to no layer, nor does one whose input is used elsewhere too."""

    class PreActivated(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(2, (1, 1), name='alone')(x)
            x = nn.BatchNorm(use_running_average=True, name='on_sum')(x + y)
            y = nn.Conv(2, (1, 1), name='twice')(x)
            return nn.Dense(3)((y + nn.BatchNorm(use_running_average=True)(y)).mean((1, 2)))

    module = PreActivated()
    layers = find_layers(module.apply, trained_variables(module), IMAGE_SHAPE)
    assert [(layer.name, layer.norm) for layer in layers] == [('alone', None), ('twice', None), ('Dense_0', None)]


# Rounding and ranges


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 7, 8])
def test_numbers_are_packed_as_densely_as_their_bits(bits):
    top = quantized.largest(bits)
    whole = RNG.integers(-top, top + 1, size=(3, 5, 7))
    stream = quantized.packed(whole, bits)
    assert stream.dtype == np.uint8
    assert len(stream) == -(-whole.size * bits // 8)
    np.testing.assert_array_equal(jax.jit(lambda s: quantized.unpacked(s, bits, whole.shape))(stream), whole)


def test_gradients_pass_the_rounding_as_learned_steps_have_it():
    x, step = np.array([-9.0, -0.3, 1.4, 9.0], np.float32), np.float32(0.5)
    by_x, by_step = jax.jacobian(lambda x, s: quantized.round_weights(x, s, 7.0) * s, (0, 1))(x, step)
    np.testing.assert_array_equal(np.diag(by_x), [0, 1, 1, 0])
    np.testing.assert_allclose(by_step, [-7, -1 + 0.6, 3 - 2.8, 7], rtol=1e-5)  # LSQ, equation 3
    np.testing.assert_allclose(quantized.round_inputs(x, step, 2.0, 15.0), [-1, -0.5, 1.5, 6.5])


def test_steps_of_weights_have_the_least_error():
    kernel = RNG.normal(size=(3, 3, 4, 8)).astype(np.float32)
    kernel[..., 1] *= 100
    kernel[..., 2] = 0
    step = quantized.weight_steps(kernel, 3, (0, 1, 2))
    assert step.shape == (1, 1, 1, 8)
    assert (step > 0).all()

    def error(step):
        return ((quantized.round_weights(kernel, step, 3) * step - kernel) ** 2).sum((0, 1, 2))

    for other in (0.8, 1.3):
        assert (error(step) <= error(other * step)).all()


def test_ranges_by_every_method():
    sample = np.concatenate([np.zeros(50), RNG.exponential(size=10_000), [80.0]]).astype(np.float32)
    inputs = Calibration(-0.1, 80.0, sample, np.zeros(1))
    (whole, zero), (cut, _), (best, _) = (
        quantization_parameters(inputs, 4, method) for method in ('minmax', 'percentile', 'mse')
    )
    assert whole == pytest.approx(80.1 / 15)
    assert zero == 0
    assert best < cut < whole or cut < best < whole

    def error(step):
        return np.mean((np.clip(np.rint(sample / step), 0, 15) * step - sample) ** 2)

    assert error(best) < min(error(cut), error(whole))
    assert quantization_parameters(Calibration(0.0, 0.0, np.zeros(3), np.zeros(1)), 4, 'mse') == (1.0, 0.0)


# A network of few bits


@pytest.fixture(scope='module')
def prepared(teacher):
    """(folded network, what it sees on images, what its statistics tell)."""
    network = equalise(fold(teacher.apply_fn, teacher.variables, teacher.image_shape))
    return network, on_images(network, teacher, IMAGES), on_statistics(network, teacher, jax.random.key(0))


def test_layers_are_observed_on_images(prepared, teacher):
    _, calibrations, _ = prepared
    x = np.asarray(teacher.normalise(IMAGES))
    assert (calibrations[0].low, calibrations[0].high) == pytest.approx((x.min(), x.max()), rel=1e-5)
    np.testing.assert_allclose(calibrations[0].means, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert [len(calibration.means) for calibration in calibrations] == [2, 4, 5]
    assert calibrations[1].low == 0  # after a ReLU


def test_statistics_tell_the_moments_of_rectified_gaussians(prepared):
    network, _, calibrations = prepared
    mean, deviation = network.statistics['0']
    shift = -flatten(network.weights)[network.layers[0].norm.mean]
    draws = np.maximum(mean + shift + deviation * RNG.normal(size=(20_000, 1)), 0)
    np.testing.assert_allclose(calibrations[1].means, draws.mean(0), atol=0.15 * deviation.max())


def test_a_corrected_shift_keeps_the_mean(prepared, teacher):
    network, calibrations, _ = prepared
    layer, flat = network.layers[-1], flatten(network.weights)
    whole = {layer.kernel: flat[layer.kernel] + 0.5}
    found = flatten(bias_corrected(network, whole, [calibration.means for calibration in calibrations]))
    moved = calibrations[-1].means @ whole[layer.kernel] + found[layer.bias]
    np.testing.assert_allclose(moved, calibrations[-1].means @ flat[layer.kernel] + flat[layer.bias], rtol=1e-4)


@pytest.mark.slow
def test_more_bits_are_nearer_to_float_and_the_file_is_what_was_sought(prepared, teacher, tmp_path):
    network, calibrations, _ = prepared
    x = teacher.normalise(IMAGES)
    apply_fn, errors, sizes = simulated(network.apply_fn, network.layers), [], []
    expected = teacher.apply_fn(teacher.variables, x)
    for bits in (2, 4, 8):
        variables = quantize(network, [Bits(bits, bits)] * 3, calibrations, 'mse', None)
        path = tmp_path / f'{bits}.safetensors'
        about = {'network': '', 'width': 1.0, 'num_classes': 3, 'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}
        save_quantized(path, variables, {layer.kernel: bits for layer in network.layers}, about)
        loaded = load_quantized(path, teacher)
        logits = jax.jit(apply_fn)(variables, x)
        np.testing.assert_allclose(jax.jit(loaded.apply_fn)(loaded.variables, x), logits, rtol=1e-4, atol=1e-4)
        kernels = [leaf for name, leaf in flatten(loaded.variables).items() if name.startswith('bits/')]
        assert {leaf.dtype for leaf in kernels} == {np.dtype(np.uint8)}
        errors.append(float(np.abs(logits - expected).mean()))
        sizes.append(path.stat().st_size)
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]
    with pytest.raises(DvinvError, match='not among those of dvinv'):
        load_quantized(path)
    (tmp_path / 'networks').mkdir()
    path.rename(tmp_path / 'networks' / 'quantized_w8a8.safetensors')
    with pytest.raises(DvinvError, match=r'dvinv\.load\(\.\.\., teacher=teacher\)'):
        dvinv.load(tmp_path, 'quantization')
    apply_fn, variables = dvinv.load(tmp_path, 'quantization', teacher=teacher)
    np.testing.assert_allclose(jax.jit(apply_fn)(variables, x), logits, rtol=1e-4, atol=1e-4)


def test_products_in_bfloat16_are_nearly_the_same_and_learn(prepared, teacher):
    network, calibrations, _ = prepared
    variables = quantize(network, [Bits(8, 8)] * 3, calibrations, 'mse', None)
    apply_fn, x = simulated(network.apply_fn, network.layers), teacher.normalise(IMAGES)
    in_bfloat16 = products_in_bfloat16(apply_fn)
    logits, expected = jax.jit(in_bfloat16)(variables, x), jax.jit(apply_fn)(variables, x)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()
    text = str(jax.make_jaxpr(in_bfloat16)(variables, x))
    assert len(re.findall(r':bf16\[[^=]*= conv_general_dilated', text)) == 2
    slopes = jax.jit(jax.grad(lambda steps: in_bfloat16({**variables, 'steps': steps}, x).std()))(variables['steps'])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(slopes))


class Tokens(nn.Module):
    """Two dense layers on every pixel, which makes it a token, with a LayerNorm between them, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(6, name='first')(x))
        return nn.Dense(3, name='head')(nn.relu(nn.Dense(8, name='second')(x)).mean((1, 2)))


def test_a_token_of_large_values_does_not_make_the_others_coarse():
    x = np.array([[[0.1, 0.2, -0.1], [100.0, 0.0, -50.0], [0.0, 0.0, 0.0]]], np.float32)
    rounded = np.asarray(quantized.round_tokens(x, 2, 255.0))
    np.testing.assert_allclose(rounded[0, 0], x[0, 0], atol=0.3 / 255)
    np.testing.assert_allclose(rounded[0, 1], x[0, 1], atol=0.5 * 150 / 255)
    assert not rounded[0, 2].any()
    by_x = jax.grad(lambda x: (quantized.round_tokens(x, 2, 255.0) * x[:, ::-1]).sum())(x)
    assert np.isfinite(by_x).all()


@pytest.mark.slow
def test_ranges_per_token_are_kept_in_the_file_and_compared_with_those_per_layer(tmp_path):
    teacher = _linen_teacher(Tokens(), IMAGE_SHAPE)
    recorded = teacher.with_moments(dvinv.record_moments(teacher, IMAGES))  # which the file need not have
    network = fold(teacher.apply_fn, teacher.variables, teacher.image_shape)
    assert [layer.tokens for layer in network.layers] == [True, True, False]
    per_token = with_token_ranges(network.layers)
    assert [layer.per_token for layer in per_token] == [True, True, False]
    calibrations, x = on_images(network, teacher, IMAGES), teacher.normalise(IMAGES)
    variables = quantize(network, [Bits(8, 3), Bits(8, 3), Bits(8, 8)], calibrations, 'minmax', None)
    bits = {layer.kernel: 8 for layer in network.layers}
    expected, logits = teacher.apply_fn(teacher.variables, x), {}
    about = {'network': '', 'width': 1.0, 'num_classes': 3, 'image_shape': IMAGE_SHAPE, 'mean': MEAN, 'std': STD}
    for name, layers in (('layer', network.layers), ('token', per_token)):
        logits[name] = jax.jit(simulated(network.apply_fn, layers))(variables, x)
        kernels = [layer.kernel for layer in layers if layer.per_token]
        save_quantized(tmp_path / name, variables, bits, about | {'per_token': kernels})
        loaded = load_quantized(tmp_path / name, recorded)
        np.testing.assert_allclose(jax.jit(loaded.apply_fn)(loaded.variables, x), logits[name], rtol=1e-4, atol=1e-4)
    errors = {name: float(np.abs(value - expected).mean()) for name, value in logits.items()}
    assert errors['token'] < 0.8 * errors['layer']

    settings = QuantizationSettings(('w8a8',), distilled=(), controls=(), token_ranges=True)
    inputs = {'no_images': calibrations, 'pool': calibrations}
    figures = ablation(settings, Scores(teacher, None), CalibratedNetwork(network, inputs), None, 'w8a8')
    assert {'per_layer_test_accuracy', 'per_token_test_accuracy'} <= figures.keys()


def test_without_statistics_the_means_for_bias_correction_are_those_of_the_calibration_images():
    teacher = _linen_teacher(Tokens(), IMAGE_SHAPE)
    network = fold(teacher.apply_fn, teacher.variables, teacher.image_shape)
    on_pool, blank = on_images(network, teacher, IMAGES), on_images(network, teacher, np.zeros_like(IMAGES))
    calibrated = CalibratedNetwork(network, {'no_images': blank, 'pool': on_pool})
    found = calibrated.variables([Bits(3, 8)] * 3, 'pool', 'mse', correct=True)
    expected = quantize(network, [Bits(3, 8)] * 3, on_pool, 'mse', [layer.means for layer in on_pool])
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_float_file_is_no_quantized_one(tmp_path):
    with pytest.raises(DvinvError, match='holds a network in float32'):
        load_quantized(Path(saved(tmp_path / 'float.safetensors')))


# The task


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    """What the config tells of a teacher of random weights, and of a pool of noise."""
    folder = tmp_path_factory.mktemp('given')
    weights = saved(folder / 'teacher.safetensors', 'small_convnet', 10, (8, 8, 1))
    images = RNG.integers(256, size=(40, 8, 8, 1)).astype(np.uint8)
    network = {'teacher__network': 'small_convnet', 'teacher__weights': weights, 'verifier__network': ''}
    network |= {'teacher__mean': (), 'teacher__std': (), 'teacher__width': 0.125}
    digest = smoke_run(**network, distillation__controls=()).teacher.digest()
    ImagePool(folder / 'pool', digest).write(0, images, np.zeros(40, int), np.zeros((40, 10)), {})
    training = {'updates': 4, 'warmup': 0}
    return {
        **network,
        'pool': str(folder / 'pool'),
        'tasks': ('quantization',),
        'distillation__controls': (),
        'quantization__images': 20,
        'quantization__equalise': True,
        **{f'quantization__training__{field}': value for field, value in training.items()},
    }


@pytest.fixture(scope='module')
def quantized_run(given, tmp_path_factory):
    """(work directory, figures): 8 bits by calibration, 4 by learning."""
    workdir = tmp_path_factory.mktemp('quantized') / 'run'
    config = smoke_config(**given, quantization__settings=('w8a8', 'w4a4'), quantization__controls=('real',))
    return workdir, pipeline.run(config, workdir)['quantization']


def test_the_task_ends_with_files_that_load(quantized_run, given):
    workdir, figures = quantized_run
    weights = Path(given['teacher__weights'])
    teacher = load_classifier(weights)
    assert {'test_accuracy', 'bytes_ratio', 'test_agreement', 'test_kl', 'pool_minus_real'} <= figures['w8a8'].keys()
    assert figures['w4a4']['bytes'] < figures['w8a8']['bytes'] < figures['float_bytes'] == weights.stat().st_size
    assert figures['w4a4']['distilled']
    assert not figures['w8a8']['distilled']
    x = teacher.normalise(RNG.integers(256, size=(5, 8, 8, 1)).astype(np.uint8))
    expected = teacher.apply_fn(teacher.variables, x)
    apply_fn, variables = dvinv.load(workdir, 'quantization', 'w8a8')
    np.testing.assert_allclose(apply_fn(variables, x), expected, atol=0.1 * np.abs(expected).max())
    smallest = dvinv.load(workdir, 'quantization')[1]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(smallest)) < sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    with pytest.raises(DvinvError, match='no network quantized to w3a3; there are w4a4, w8a8'):
        dvinv.load(workdir, 'quantization', 'w3a3')


def test_neither_controls_nor_scores_change_the_network(quantized_run, given, tmp_path):
    fewer = {'data__name': '', 'held_out': 0.0, 'quantization__settings': ('w4a4',), 'quantization__controls': ()}
    figures = pipeline.run(smoke_config(**{**given, **fewer}), tmp_path / 'run')['quantization']
    assert figures['w4a4']['test_accuracy'] is figures['w4a4']['no_images_test_accuracy'] is None
    plain, scored = (folder / 'networks' / 'quantized_w4a4.safetensors' for folder in (tmp_path / 'run', quantized_run[0]))
    assert plain.read_bytes() == scored.read_bytes()


def test_the_report_draws_accuracy_against_bits_and_megabytes(quantized_run):
    page = render('t', 's', sections=[quantization_section(quantized_run[1])])
    for words in ('w4a4, distilled', 'Accuracy against bits', 'against the size of the file', 'not equalised'):
        assert words in page


def test_layers_that_stay_in_float():
    layers = find_layers(TinyNet().apply, trained_variables(TinyNet()), IMAGE_SHAPE)
    settings = QuantizationSettings(float_layers=('Conv_1',), edge_bits=6)
    assert bits_of_layers(settings, 'w4a3', layers) == [Bits(6, 6), Bits(0, 0), Bits(6, 6)]
    assert bits_of_layers(QuantizationSettings(edge_bits=2), 'w4a3', layers) == [Bits(4, 3)] * 3
