"""The task `quantization`: data-free quantization with BatchNorm statistics, ranges on the pool, and further training."""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dvinv.config import BITS, QuantizationSettings, bits_of, validate_devices
from dvinv.data.dataset import RealData
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import distillation_loss
from dvinv.evaluation import (
    HeldOut,
    among_top,
    divergence,
    evenly,
    logits_of,
    top_accuracy,
    training_rows,
    training_set,
    validate_fits,
)
from dvinv.inversion import Teacher
from dvinv.inversion.programs import in_precision
from dvinv.networks import Classifier
from dvinv.networks.calibration import (
    RANGE_METHODS,
    Calibration,
    Folded,
    QuantizedModule,
    equalise,
    fold,
    on_images,
    on_statistics,
    quantized_module,
    trained_variables,
)
from dvinv.networks.files import network_bytes
from dvinv.networks.quantized import Bits, load_quantized, products_in_bfloat16, quantize, save_quantized, simulated
from dvinv.networks.quantized_layers import Layer, find_layers, with_token_ranges
from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, line_chart
from dvinv.report.page import Section, Table, Tile, percent
from dvinv.runtime.errors import DvinvError, listed
from dvinv.runtime.workdir import quantized_name
from dvinv.synthesis.pools import finished_pool
from dvinv.synthesis.synthesizer import control_pool, validate_synthesis
from dvinv.training.step import Rounds, TrainJob
from dvinv.training.trainer import PlannedTraining, Records, Training, seed_of

TASK, ROLE = 'quantization', 6  # see `training.trainer.TrainTarget`
ABLATIONS = {  # figure -> its label
    'no_images_test_accuracy': 'no images',
    'minmax_test_accuracy': 'pool, all values',
    'percentile_test_accuracy': 'pool, percentile',
    'mse_test_accuracy': 'pool, least error',
    'real_test_accuracy': 'real images',
    'noise_test_accuracy': 'noise',
    'uncorrected_test_accuracy': 'uncorrected',
    'unequalised_test_accuracy': 'not equalised',
    'per_layer_test_accuracy': 'pool, ranges per layer',
    'per_token_test_accuracy': 'pool, ranges per token',
}
FINAL = 'the network in the file'


def validate(run: Run) -> None:
    """Validates, before anything is written, that the teacher can be quantized with these settings.

    Raises:
      DvinvError: it cannot; the message names the field, its value and the way out, or the operation of the network.
    """
    settings, teacher = run.settings.quantization, run.planned_teacher
    run.validate_real_control('quantization')
    validate_devices(settings.training, 'quantization.training', run.training_mesh.size)
    if run.settings.has_data_free_controls('quantization'):
        run.once(validate_synthesis)
    layers = find_layers(teacher.apply_fn, teacher.variables, teacher.image_shape)
    for setting in settings.settings:
        bits_of_layers(settings, setting, layers)


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


def complete(run: Run) -> bool:
    """Returns whether the network files of the finished task still exist; users delete damaged files to recompute them."""
    return all(run.workdir.has_network(quantized_name(setting)) for setting in run.settings.quantization.settings)


def bits_of_layers(settings: QuantizationSettings, setting: str, layers: Sequence[Layer]) -> list[Bits]:
    """Returns the bits of weights and inputs of each layer.

    Args:
      setting: the bits of weights and inputs, for instance 'w8a8'.
      layers: the layers of the network.

    Raises:
      DvinvError: a pattern of `float_layers` matches no layer, or the patterns match all layers.
    """
    names = [layer.name for layer in layers]
    for pattern in settings.float_layers:
        if not fnmatch.filter(names, pattern):
            raise DvinvError(
                f'quantization.float_layers names {pattern!r}, which matches no layer; the layers are {listed(names)}.'
            )
    weights, inputs = bits_of(setting)
    edges = (layers[0].kernel, layers[-1].kernel)
    bits = []
    for layer in layers:
        least = settings.edge_bits if layer.kernel in edges else 0
        is_float = any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in settings.float_layers)
        bits.append(Bits(0, 0) if is_float else Bits(max(weights, least), max(inputs, least)))
    if not any(layer_bits.weights for layer_bits in bits):
        raise DvinvError(f'quantization.float_layers is {settings.float_layers}, which matches all layers; leave some out.')
    return bits


@dataclasses.dataclass(frozen=True)
class CalibratedNetwork:
    """A folded network and the calibration data of its layers.

    Attributes:
      network: the network.
      inputs: {source: one `Calibration` per layer}; sources are 'no_images', 'pool', 'noise' and 'real'.
    """

    network: Folded
    inputs: dict[str, list[Calibration]]

    def with_source(self, source: str, inputs: list[Calibration]) -> 'CalibratedNetwork':
        """Returns a copy with one more source."""
        return CalibratedNetwork(self.network, {**self.inputs, source: inputs})

    def variables(self, bits: list[Bits], source: str, method: str, correct: bool) -> dict:
        """Returns the quantized variables with ranges from one source, and with bias correction if `correct`.

        The means for bias correction are those of BatchNorm's statistics, or of the source for a network without any.
        """
        source_of_means = 'no_images' if self.network.statistics else source
        means = [layer.means for layer in self.inputs[source_of_means]] if correct else None
        return quantize(self.network, bits, self.inputs[source], method, means)


class Scores:
    """Scores networks on the real test images; all scores are None without real data.

    Attributes:
      float_accuracy: the accuracy of the float network.
    """

    def __init__(self, teacher: Classifier, data: RealData | None):
        self._teacher, self._data = teacher, data
        if data is not None:
            validate_fits(teacher, data)
            self._float = logits_of(teacher, data.test.images)
            self._float_right = among_top(self._float, data.test.labels)
        self.float_accuracy = None if data is None else float(self._float_right.mean())

    def figures(self, network: Classifier) -> dict:
        """Returns the accuracy, the agreement with the float network, and the mean KL(float || quantized).

        The agreement is the share of images for which both networks predict the same class.
        """
        if self._data is None:
            return {'test_accuracy': None, 'test_agreement': None, 'test_kl': None}
        logits = logits_of(network, self._data.test.images)
        return {
            'test_accuracy': top_accuracy(logits, self._data.test.labels),
            'test_agreement': float((logits.argmax(1) == self._float.argmax(1)).mean()),
            'test_kl': float(divergence(self._float, logits)),
        }

    def right(self, apply_fn: Callable, variables: dict) -> np.ndarray | None:
        """Returns whether a network with the teacher's inputs and classes classifies each image correctly, bool [N]."""
        if self._data is None:
            return None
        teacher = self._teacher
        network = Classifier(apply_fn, variables, teacher.image_shape, teacher.num_classes, teacher.mean, teacher.std)
        return among_top(logits_of(network, self._data.test.images), self._data.test.labels)


def source_and_method(settings: QuantizationSettings) -> tuple[str, str]:
    """Returns the source of the ranges and the method to estimate them that the settings ask for."""
    return ('pool' if settings.images else 'no_images'), settings.ranges


def ablation(
    settings: QuantizationSettings,
    scores: Scores,
    calibration: CalibratedNetwork,
    plain: CalibratedNetwork | None,
    setting: str,
) -> dict:
    """Returns the figures of every way to calibrate `setting`, without training.

    Args:
      calibration: the calibration data of the folded network.
      plain: the same without equalisation; None: equalisation is off.
      setting: the bits of weights and inputs, for instance 'w8a8'.
    """
    bits, chosen = bits_of_layers(settings, setting, calibration.network.layers), source_and_method(settings)
    ways: dict[str, tuple[str, str]] = {'no_images': ('no_images', settings.ranges)}
    if settings.images:
        ways |= {method: ('pool', method) for method in RANGE_METHODS}
    ways |= {control: (control, settings.ranges) for control in settings.controls}
    apply_fn = simulated(calibration.network.apply_fn, calibration.network.layers)
    right = {name: scores.right(apply_fn, calibration.variables(bits, *way, settings.correct)) for name, way in ways.items()}
    right['uncorrected'] = scores.right(apply_fn, calibration.variables(bits, *chosen, False))
    layers = calibration.network.layers
    if any(layer.tokens for layer in layers):
        variables = calibration.variables(bits, *chosen, settings.correct)
        for name, kernels in (('per_layer', ()), ('per_token', None)):
            right[name] = scores.right(
                simulated(calibration.network.apply_fn, with_token_ranges(layers, kernels)), variables
            )
    if plain:
        right['unequalised'] = scores.right(apply_fn, plain.variables(bits, *chosen, settings.correct))
    figures = {f'{name}_test_accuracy': None if mask is None else float(mask.mean()) for name, mask in right.items()}
    for control in settings.controls:
        figures |= _difference(control, right[settings.ranges], right[control])
    return figures


def _difference(control: str, pool_right: np.ndarray | None, control_right: np.ndarray | None) -> dict:
    """Returns the accuracy with the pool minus that with a control, paired by image, and its standard error.

    Args:
      control: the name of the control.
      pool_right, control_right: whether each image is classified correctly, bool [N]; None without real data.
    """
    names = f'pool_minus_{control}', f'pool_minus_{control}_standard_error'
    if pool_right is None or control_right is None:
        return dict.fromkeys(names)
    difference = pool_right.astype(float) - control_right
    return dict(zip(names, (float(difference.mean()), float(difference.std() / len(difference) ** 0.5)), strict=True))


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
    module = quantized_module(network, apply_fn, variables)
    loss = distillation_loss(in_precision(teacher, training.precision), settings.temperature)
    # The parameters include logarithms of steps, which bfloat16 would change by percents, so only products use it.
    training = dataclasses.replace(training, precision='float32')
    return module, TrainJob(training, loss, Rounds(count), teacher.variables)


def _evenly(images, most: int) -> np.ndarray:
    """Returns at most `most` of the images, evenly spaced."""
    return images[evenly(len(images), most)]


def smallest(figures: dict) -> str:
    """Returns the setting with the fewest bytes among the figures of the task."""
    return min((name for name in figures if BITS.fullmatch(name)), key=lambda setting: (figures[setting]['bytes'], setting))


def quantization_section(figures: dict) -> Section:
    """Returns the section for the figures of the task `quantization` in results.json."""
    settings = _settings(figures)
    rows = [
        [
            setting + (', distilled' if row['distilled'] else ''),
            f'{row["bytes"] / 1e6:.3f}',
            f'{row["bytes_ratio"]:.3f}',
            percent(row['test_accuracy']),
            percent(row['test_agreement']),
            row['test_kl'],
        ]
        for setting, row in ((setting, figures[setting]) for setting in settings)
    ]
    score = figures['float_test_accuracy']
    same = (None, None) if score is None else (percent(1.0), 0)
    rows.append(['float32', f'{figures["float_bytes"] / 1e6:.3f}', '1', percent(score), *same])
    files = Table(
        ('Network', 'MB', 'of the float file', 'real test accuracy', 'agrees with float', 'KL to float'),
        rows,
        caption='Whole files. Weights (w) and inputs of layers (a) have so many bits; the first and the last layer may have '
        'more. Agreement: the share of test images that both put into one class.',
    )
    calibrations = Table(
        ('Ranges from', *settings),
        [
            [label, *(percent(figures[setting].get(name)) for setting in settings)]
            for name, label in _ablations(figures).items()
        ],
        caption='Real test accuracy by calibration alone, before any learning.',
    )
    setting, sentence = smallest(figures), quantization_sentence(figures)
    accuracy, ratio = figures[setting]['test_accuracy'], percent(figures[setting]['bytes_ratio'], 0)
    tile = Tile(setting, percent(accuracy), f'real test accuracy in {ratio} of the bytes', accuracy)
    return Section(
        'Quantization',
        sentence,
        tables=[files, calibrations],
        charts=[accuracy_by_bits(figures), accuracy_by_size(figures)],
        tiles=[Tile(setting, ratio, "of the float network's bytes") if accuracy is None else tile],
        summary=sentence,
    )


def accuracy_by_bits(figures: dict) -> Chart | None:
    """Draws accuracy against the mean of the bits of weights and inputs; for `figures` see `quantization_section`."""
    bits = {
        setting: sum(bits_of(setting)) / 2 for setting in sorted(_settings(figures), key=lambda name: sum(bits_of(name)))
    }
    lines = {
        label: ([*bits.values()], [figures[setting].get(name) for setting in bits])
        for name, label in {'test_accuracy': FINAL, **_ablations(figures)}.items()
        if name not in ('minmax_test_accuracy', 'percentile_test_accuracy', 'uncorrected_test_accuracy')
    }
    return line_chart(lines, 'Accuracy against bits', 'bits, mean of weights and inputs', 'real test accuracy')


def accuracy_by_size(figures: dict) -> Chart | None:
    """Draws accuracy against the size of the file in megabytes; for `figures` see `quantization_section`."""
    networks = [figures[setting] for setting in _settings(figures)]
    networks.append({'bytes': figures['float_bytes'], 'test_accuracy': figures['float_test_accuracy']})
    networks.sort(key=lambda network: network['bytes'])
    line = [network['bytes'] / 1e6 for network in networks], [network['test_accuracy'] for network in networks]
    return line_chart({FINAL: line}, 'Accuracy against the size of the file', 'megabytes', 'real test accuracy')


def _settings(figures: dict) -> list[str]:
    """Returns the settings that were measured, those with the most bits first."""
    return sorted((name for name in figures if BITS.fullmatch(name)), key=bits_of, reverse=True)


def _ablations(figures: dict) -> dict[str, str]:
    """Returns {figure: its label} for the figures of `ABLATIONS` that were measured."""
    return {
        name: label for name, label in ABLATIONS.items() if any(name in figures[setting] for setting in _settings(figures))
    }


def quantization_sentence(figures: dict) -> str:
    """Returns a sentence that states the result."""
    setting = smallest(figures)
    text, score = f'In {setting} the network takes {percent(figures[setting]["bytes_ratio"])} of its bytes', ''
    if (accuracy := figures[setting]['test_accuracy']) is not None:
        score = f' and reads {percent(accuracy)} of the real test images right, in float32 '
        score += percent(figures['float_test_accuracy'])
    return f'{text}{score}.'
