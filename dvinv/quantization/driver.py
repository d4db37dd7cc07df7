"""The task `quantization`: the teacher in few bits, without data: by its BatchNorms, by the pool's ranges, by learning."""

import dataclasses

import jax
import numpy as np

from dvinv.configuration import quantization_of, recipe_of
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.held_out import HeldOut, learned_rows
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.networks.files import network_bytes
from dvinv.networks.quantized.folding import Folded, equalise, fold
from dvinv.networks.quantized.layers import find_layers
from dvinv.networks.quantized.learning import QuantizedModule, learned, module_of
from dvinv.networks.quantized.network import load_quantized, products_in_bfloat16, save_quantized, simulated
from dvinv.networks.quantized.observing import on_images, on_statistics
from dvinv.pools import finished_pool
from dvinv.quality import evenly
from dvinv.quantization.ladder import Ladder, Scores, rungs
from dvinv.rounds import Rounds
from dvinv.runtime.devices import make_mesh, training_mesh
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import distillation_loss
from dvinv.synthesizer import control_pool
from dvinv.teacher import description, load
from dvinv.training import Lesson, PlannedTraining, Training

TASK, ROLE = 'quantization', 6  # see `training.Learner`


def run(config, workdir) -> dict:
    """Quantize the teacher to every setting, and score each rung of the ladder on the real test images; returns figures.

    The rungs: ranges and corrections by BatchNorm's statistics alone; ranges from the pool; learning on the pool. Real
    images come in when every network is finished: for the upper control and the scores.
    """
    workdir = open_workdir(workdir, config)
    settings, teacher = quantization_of(config), load(config, workdir)
    pool = finished_pool(config, workdir, teacher) if settings.images or settings.distilled else None
    weights = teacher.without_moments().variables
    plain = fold(teacher.apply_fn, weights, teacher.image_shape)
    network = equalise(plain) if settings.equalise else plain
    ladder = _observed(config, teacher, network, pool)
    about = description(config, workdir)
    for setting in settings.settings:
        path = workdir.network(file_name(setting))
        if not workdir.has_network(path.stem):
            bits = settings.bits(setting, network.layers)
            variables = ladder.variables(bits, *_chosen(settings), settings.correct)
            if setting in settings.distilled:
                variables = _distil(config, workdir, teacher, network, variables, pool, setting)
            kernels = {layer.kernel: of.weights for layer, of in zip(network.layers, bits, strict=True) if of.weights}
            save_quantized(path, variables, kernels, about)

    data = load_real(config.data)
    for control in settings.controls:
        images = (
            data.train.images if control == 'real' else control_pool(config, workdir, teacher, 'noise', TASK).rows('images')
        )
        ladder = ladder.beside(control, on_images(network, teacher, _evenly(images, settings.images)))
    held_out = pool and HeldOut(config, teacher, pool)
    unequalised = _observed(config, teacher, plain, pool) if settings.equalise else None
    scores, float_bytes = Scores(teacher, data), len(network_bytes(weights, about))
    figures = {}
    for setting in settings.settings:
        path = workdir.network(file_name(setting))
        size = path.stat().st_size
        quantized = load_quantized(path, teacher)
        figures[setting] = {
            **scores.figures(quantized),
            **(held_out.beside({setting: quantized}, setting) if held_out else {}),
            'bytes': size,
            'bytes_ratio': size / float_bytes,
            'distilled': setting in settings.distilled,
            **rungs(settings, scores, ladder, unequalised, setting),
        }
    return {
        **figures,
        'float_test_accuracy': scores.float_accuracy,
        'float_bytes': float_bytes,
        'layers': len(network.layers),
        'folded_layers': sum(layer.norm is not None for layer in network.layers),
    }


def planned_trainings(config, teacher: Teacher) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`."""
    settings = quantization_of(config)
    if not settings.distilled:
        return []
    network = fold(teacher.apply_fn, teacher.variables, teacher.image_shape)
    bits = settings.bits(settings.distilled[0], network.layers)
    seen = {'no_images': on_statistics(network, teacher, jax.random.key(0))}
    variables = Ladder(network, seen).variables(bits, 'no_images', 'minmax', settings.correct)
    module, lesson = _training(config, teacher, network, variables, config.synthesis.images)
    return [PlannedTraining('quantized', module, lesson, teacher, len(settings.distilled), teacher)]


def check(config, teacher: Teacher) -> None:
    """Refuse, before anything is written, what cannot be quantized as the config says.

    Raises:
      DvinvError: names the field, its value and the way out, or the operation of the network.
    """
    settings = quantization_of(config)
    settings.check()
    recipe = recipe_of(config.quantization.training)
    recipe.check('quantization.training')
    recipe.check_devices('quantization.training', training_mesh(make_mesh(config.devices)).size)
    layers = find_layers(teacher.apply_fn, teacher.variables, teacher.image_shape)
    for setting in settings.settings:
        settings.bits(setting, layers)


def complete(config, workdir: Workdir) -> bool:
    """Whether the networks of the finished task are still there: a damaged file is deleted by its owner."""
    return all(workdir.has_network(file_name(setting)) for setting in config.quantization.settings)


def file_name(setting: str) -> str:
    """What the file of the network of a setting goes by."""
    return f'quantized_{setting}'


def _chosen(settings) -> tuple[str, str]:
    """Where ranges come from, and how they are taken from it."""
    return ('pool' if settings.images else 'no_images'), settings.ranges


def _observed(config, teacher: Teacher, network: Folded, pool: ImagePool | None) -> Ladder:
    """What the layers are fed with, without images and on the pool."""
    key, count = jax.random.fold_in(jax.random.key(config.seed), ROLE), config.quantization.images
    seen = {'no_images': on_statistics(network, teacher, key)}
    if count:
        seen['pool'] = on_images(network, teacher, _evenly(learned_rows(config, pool.rows('images')), count))
    return Ladder(network, seen)


def _distil(config, workdir: Workdir, teacher: Teacher, network: Folded, variables: dict, pool: ImagePool, setting: str):
    """The variables after quantization-aware distillation: the float teacher's answers on the pool's images."""
    images, labels = (learned_rows(config, pool.rows(name)) for name in ('images', 'labels'))
    module, lesson = _training(config, teacher, network, variables, len(labels))
    seed, mesh = 16 * config.seed + ROLE, training_mesh(make_mesh(config.devices))
    with Training(module, lesson, teacher, seed, mesh, workdir, TASK, setting, config.logging) as training:
        return learned(network, variables, training.finish(images, labels)['params'])


def _training(config, teacher: Teacher, network: Folded, variables: dict, count: int) -> tuple[QuantizedModule, Lesson]:
    """Returns the module that starts as the quantized `variables`, and how it learns from `count` images."""
    recipe, apply_fn = recipe_of(config.quantization.training), simulated(network.apply_fn, network.layers)
    if recipe.precision == 'bfloat16':
        apply_fn = products_in_bfloat16(apply_fn)
    module = module_of(network, apply_fn, variables)
    loss = distillation_loss(in_precision(teacher, recipe.precision), config.quantization.temperature)
    # The logarithms of steps are among the parameters, which bfloat16 would round by percents: products alone are in it.
    recipe = dataclasses.replace(recipe, precision='float32')
    return module, Lesson(recipe, loss, Rounds(count), teacher.variables)


def _evenly(images, most: int) -> np.ndarray:
    """At most so many of the images, evenly spaced."""
    return images[np.unique(evenly(len(images), most))]
