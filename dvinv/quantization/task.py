"""The task `quantization`: data-free quantization with BatchNorm statistics, ranges on the pool, and further training."""

import dataclasses

import jax
import numpy as np

from dvinv.config import QuantizationSettings, validate_devices
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import distillation_loss
from dvinv.evaluation.held_out import HeldOut, training_rows, training_set
from dvinv.evaluation.quality import evenly
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.networks.files import network_bytes
from dvinv.networks.quantized.calibration import on_images, on_statistics
from dvinv.networks.quantized.folding import Folded, equalise, fold
from dvinv.networks.quantized.layers import find_layers, with_token_ranges
from dvinv.networks.quantized.learning import QuantizedModule, module_of, trained_variables
from dvinv.networks.quantized.network import load_quantized, products_in_bfloat16, save_quantized, simulated
from dvinv.pipeline.run import Run
from dvinv.quantization.ablation import CalibratedNetwork, Scores, ablation, source_and_method
from dvinv.quantization.bits import bits_of_layers
from dvinv.runtime.workdir import quantized_name
from dvinv.synthesis import synthesizer
from dvinv.synthesis.pools import finished_pool
from dvinv.synthesis.synthesizer import control_pool
from dvinv.training.sampling import Rounds
from dvinv.training.step import TrainJob
from dvinv.training.targets import PlannedTraining, seed_of
from dvinv.training.trainer import Records, Training

TASK, ROLE = 'quantization', 6  # see `training.targets.TrainTarget`


def run(run: Run) -> dict:
    """Quantizes the teacher to every setting, and scores the ablation on the real test images; returns the figures.

    The ablation compares ranges and bias correction from BatchNorm statistics, ranges from the pool, and training on the
    pool. Real images are read when every network is finished: for the upper control and the scores.
    """
    settings, teacher, workdir = run.settings.quantization, run.teacher, run.workdir
    pool = finished_pool(run) if settings.images or settings.distilled else None
    weights = teacher.without_moments().variables
    plain = _prepared(settings, fold(teacher.apply_fn, weights, teacher.image_shape))
    network = equalise(plain) if settings.equalise else plain
    calibration = _calibrated(run, network, pool)
    about = run.teacher_parts[2]
    for setting in settings.settings:
        path = workdir.network(quantized_name(setting))
        if not workdir.has_network(path.stem):
            bits = bits_of_layers(settings, setting, network.layers)
            variables = calibration.variables(bits, *source_and_method(settings), settings.correct)
            if setting in settings.distilled:
                assert pool is not None  # it was read above
                variables = _distil(run, network, variables, pool, setting)
            layers = zip(network.layers, bits, strict=True)
            kernel_bits = {layer.kernel: layer_bits.weights for layer, layer_bits in layers if layer_bits.weights}
            save_quantized(path, variables, kernel_bits, about | _token_ranges(network))

    for control in settings.controls:
        images = run.training_split.images if control == 'real' else control_pool(run, 'noise', TASK).rows('images')
        calibration = calibration.with_source(control, on_images(network, teacher, _evenly(images, settings.images)))
    held_out = pool and HeldOut(run.settings, teacher, pool)
    unequalised = _calibrated(run, plain, pool) if settings.equalise else None
    scores, float_bytes = Scores(teacher, run.data), len(network_bytes(weights, about))
    figures = {}
    for setting in settings.settings:
        path = workdir.network(quantized_name(setting))
        size = path.stat().st_size
        quantized = load_quantized(path, teacher)
        figures[setting] = {
            **scores.figures(quantized),
            **(held_out.beside({setting: quantized}, setting) if held_out else {}),
            'bytes': size,
            'bytes_ratio': size / float_bytes,
            'distilled': setting in settings.distilled,
            **ablation(settings, scores, calibration, unequalised, setting),
        }
    return {
        **figures,
        'float_test_accuracy': scores.float_accuracy,
        'float_bytes': float_bytes,
        'layers': len(network.layers),
        'folded_layers': sum(layer.norm is not None for layer in network.layers),
    }


def planned_trainings(run: Run) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`."""
    settings, teacher = run.settings.quantization, run.planned_teacher
    if not settings.distilled:
        return []
    weights = teacher.without_moments().variables
    network = _prepared(settings, fold(teacher.apply_fn, weights, teacher.image_shape))
    bits = bits_of_layers(settings, settings.distilled[0], network.layers)
    inputs = {'no_images': on_statistics(network, teacher, jax.random.key(0))}
    variables = CalibratedNetwork(network, inputs).variables(bits, 'no_images', 'minmax', settings.correct)
    module, job = _training(settings, teacher, network, variables, run.settings.synthesis.images)
    return [PlannedTraining('quantized', module, job, teacher, len(settings.distilled), teacher)]


def validate(run: Run) -> None:
    """Validates, before anything is written, that the teacher can be quantized with these settings.

    Raises:
      DvinvError: it cannot; the message names the field, its value and the way out, or the operation of the network.
    """
    settings, teacher = run.settings.quantization, run.planned_teacher
    run.validate_real_control('quantization')
    validate_devices(settings.training, 'quantization.training', run.training_mesh.size)
    if run.settings.has_data_free_controls('quantization'):
        run.once(synthesizer.validate)
    layers = find_layers(teacher.apply_fn, teacher.variables, teacher.image_shape)
    for setting in settings.settings:
        bits_of_layers(settings, setting, layers)


def complete(run: Run) -> bool:
    """Returns whether the network files of the finished task still exist; users delete damaged files to recompute them."""
    return all(run.workdir.has_network(quantized_name(setting)) for setting in run.settings.quantization.settings)


def _prepared(settings: QuantizationSettings, network: Folded) -> Folded:
    """Returns the folded network, with ranges per token if the settings ask for them."""
    return dataclasses.replace(network, layers=with_token_ranges(network.layers)) if settings.token_ranges else network


def _token_ranges(network: Folded) -> dict:
    """Returns what the file of a network says about ranges per token; nothing if all ranges are per layer."""
    kernels = [layer.kernel for layer in network.layers if layer.per_token]
    return {'per_token': kernels} if kernels else {}


def _calibrated(run: Run, network: Folded, pool: ImagePool | None) -> CalibratedNetwork:
    """Returns the calibration data of the layers, without images and on the pool."""
    teacher, count = run.teacher, run.settings.quantization.images
    key = jax.random.fold_in(jax.random.key(run.settings.seed), ROLE)
    inputs = {'no_images': on_statistics(network, teacher, key)}
    if count:
        assert pool is not None  # it is read if ranges are taken from images
        inputs['pool'] = on_images(network, teacher, _evenly(training_rows(run.settings, pool.rows('images')), count))
    return CalibratedNetwork(network, inputs)


def _distil(run: Run, network: Folded, variables: dict, pool: ImagePool, setting: str):
    """Returns the variables after quantization-aware distillation from the float teacher on the pool's images."""
    images, labels = training_set(run.settings, pool)
    module, job = _training(run.settings.quantization, run.teacher, network, variables, len(labels))
    records = Records(run.workdir, TASK, setting, run.settings.logging)
    with Training(module, job, run.teacher, seed_of(run, ROLE), run.training_mesh, records) as training:
        return trained_variables(network, variables, training.finish(images, labels)['params'])


def _training(
    settings: QuantizationSettings, teacher: Teacher, network: Folded, variables: dict, count: int
) -> tuple[QuantizedModule, TrainJob]:
    """Returns the module that starts at the quantized `variables`, and the job that trains it on `count` images."""
    training, apply_fn = settings.training, simulated(network.apply_fn, network.layers)
    if training.precision == 'bfloat16':
        apply_fn = products_in_bfloat16(apply_fn)
    module = module_of(network, apply_fn, variables)
    loss = distillation_loss(in_precision(teacher, training.precision), settings.temperature)
    # The parameters include logarithms of steps, which bfloat16 would change by percents, so only products use it.
    training = dataclasses.replace(training, precision='float32')
    return module, TrainJob(training, loss, Rounds(count), teacher.variables)


def _evenly(images, most: int) -> np.ndarray:
    """Returns at most `most` of the images, evenly spaced."""
    return images[evenly(len(images), most)]
