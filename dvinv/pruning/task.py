"""The task `pruning`: channels of the teacher are removed step by step, each followed by fine-tuning on synthesized images.

Channels that can only be removed together form groups (`networks.channel_groups`). A step measures the importance of each
group, removes the least important ones until the cost is at the target of the step (`selection`), slices them out of the
arrays and fine-tunes the pruned network by distillation from the unpruned teacher (arXiv 1912.08795, section 4.3).
Optionally, images are first synthesized on which the pruned network disagrees with the unpruned one (sections 3.3 and 4.3).
These images are added to the pool for `pruned` only; controls, which would each need images of their own, use the pool.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from dvinv.config import DATA_FREE_CONTROLS, StudentSettings, validate_devices
from dvinv.data.dataset import Joined, RowArray
from dvinv.data.pool import ImagePool
from dvinv.distillation.student import distillation_loss
from dvinv.evaluation import HeldOut, test_accuracy, training_set
from dvinv.inversion import Teacher
from dvinv.inversion.linen_modules import trained_part
from dvinv.inversion.programs import in_precision
from dvinv.inversion.statistics import find_statistics
from dvinv.inversion.tap import Tap
from dvinv.networks import Classifier, apply_fn_of, classifier_of, load_network, module_of, save_network
from dvinv.networks.channel_groups import Cost, find_channels
from dvinv.networks.classifier import join_names
from dvinv.networks.pruned import PrunedModule
from dvinv.pipeline.run import Run
from dvinv.pruning.selection import (
    EXACT,
    Importance,
    latency,
    measure_latencies,
    predicted_latency,
    refuse_unreachable,
    removal_scores,
    unreachable,
    without_lowest,
)
from dvinv.report.charts import Chart, bars, line_chart
from dvinv.report.page import Section, Table, Tile, number, percent
from dvinv.runtime.devices import decide
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import write_atomic
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis.pools import controls_are_complete, finished_pool, missing_batches
from dvinv.synthesis.synthesizer import Synthesizer, control_pool, validate_count, validate_synthesis
from dvinv.training.step import Rounds, TrainJob
from dvinv.training.trainer import PlannedTraining, TrainTarget, seed_of, train_network

ROLE = 5  # see `training.trainer.TrainTarget`
CONTROLS = ('untuned', 'magnitude', 'random', *DATA_FREE_CONTROLS, 'real')
NAMES = {
    'test_accuracy': 'Synthesized images',
    'real_test_accuracy': 'Real training images (upper control)',
    'prior_only_test_accuracy': 'Images without the feature term',
    'noise_test_accuracy': 'Noise images',
    'magnitude_test_accuracy': 'Synthesized images, removed by magnitude',
    'random_test_accuracy': 'Synthesized images, removed by chance',
    'untuned_test_accuracy': 'No fine-tuning',
    'unpruned_test_accuracy': 'The whole network',
}
RATIOS = {
    'flops_ratio': 'FLOPs',
    'parameters_ratio': 'Parameters',
    'filters_ratio': 'Filters',
    'latency_ratio': 'Latency, measured',
    'predicted_latency_ratio': 'Latency, by the table of layers',
}


def validate(run: Run) -> None:
    """Validates, before anything is written, that the teacher can be pruned with these settings.

    Raises:
      DvinvError: it cannot; the message names the field, its value and the choices.
    """
    settings, teacher = run.settings.pruning, run.planned_teacher
    run.validate_real_control('pruning')
    validate_devices(settings, 'pruning', run.training_mesh.size)
    run.validate_changeable()
    module = teacher.module
    if isinstance(module, PrunedModule):
        raise DvinvError(
            f'teacher.weights is {run.settings.teacher.weights!r}, a network that is pruned already; give the weights of an '
            'unpruned one.'
        )
    if settings.adaptive_batches or run.settings.has_data_free_controls('pruning'):
        run.once(validate_synthesis)
    if settings.adaptive_batches:
        images = settings.adaptive_batches * run.settings.synthesis.batch_size
        validate_count(run, 'pruning.adaptive_batches', images, teacher.num_classes)
    channels = find_channels(module, teacher.image_shape, settings.ignored_layers)
    if settings.measure in EXACT:
        refuse_unreachable(channels, EXACT[settings.measure](channels), settings)


def run(run: Run) -> dict:
    """Prunes with synthesized images and with each control, and scores all on the real test images; returns the figures.

    Real data are read when every data-free network is finished: first for the upper control, then for the scores.
    """
    settings, pool = run.settings.pruning, finished_pool(run)
    pruner, controls = Pruner(run), settings.controls
    images, labels = training_set(run.settings, pool)
    networks = {'pruned': pruner.prune('pruned', images, labels, competing=settings.adaptive_batches > 0)}
    for control in ('untuned', 'magnitude', 'random'):
        if control in controls:
            networks[control] = pruner.prune(control, images, labels, control)
    for control in DATA_FREE_CONTROLS:
        if control in controls:
            control_images, control_labels = training_set(run.settings, control_pool(run, control, 'pruning'))
            networks[control] = pruner.prune(f'pruned_by_{control}', control_images, control_labels)
    data = run.data
    if 'real' in controls:
        real = run.training_split
        networks['real'] = pruner.prune('pruned_by_real', real.images, real.labels)
    held_out = HeldOut(run.settings, run.teacher, pool)
    unpruned_score, pruned = test_accuracy(run.teacher, data), networks['pruned']
    scores = [test_accuracy(step.network, data) for step in pruned]
    history = json.dumps(pruner.history(pruned, [unpruned_score, *scores]), indent=1)
    write_atomic(run.workdir.path / 'pruning.json', f'{history}\n'.encode())
    return {
        'test_accuracy': scores[-1],
        'unpruned_test_accuracy': unpruned_score,
        **{
            f'{control}_test_accuracy': test_accuracy(networks[control][-1].network, data) if control in networks else None
            for control in CONTROLS
        },
        **held_out.beside({name: steps[-1].network for name, steps in networks.items()}, 'pruned'),
        **pruner.ratios(pruned[-1]),
        'parameters': pruned[-1].network.parameters,
        'images': len(labels) + pruner.adaptive_images,
        'adaptive_images': pruner.adaptive_images,
        'updates': settings.steps * settings.updates_per_step + settings.updates,
    }


def planned_trainings(run: Run) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`; they are of unpruned networks, so the pruned ones take less time."""
    settings, teacher = run.settings.pruning, run.planned_teacher
    updates = settings.steps * settings.updates_per_step + settings.updates
    layers = _compared(teacher) if settings.hint else ()
    loss = distillation_loss(in_precision(teacher, settings.precision), settings.temperature, settings.hint, layers)
    rounds = Rounds(run.settings.synthesis.images)
    job = TrainJob(dataclasses.replace(settings, updates=updates), loss, rounds, teacher.variables)
    networks = 1 + sum(control != 'untuned' for control in settings.controls)
    return [PlannedTraining('pruned', teacher.module, job, teacher, networks, teacher)]


def _compared(teacher: Teacher) -> tuple[str, ...]:
    """Returns the layers with running statistics; the teacher may also have recorded moments of other layers."""
    normalised = find_statistics(trained_part(teacher.variables))
    return tuple(layer for layer in cast(Tap, teacher.tap).layers if layer in normalised)


def complete(run: Run) -> bool:
    """Returns whether networks and images of controls still exist; users delete damaged files to recompute them."""
    controls, by_images = run.settings.pruning.controls, (*DATA_FREE_CONTROLS, 'real')
    names = (f'pruned_by_{name}' if name in by_images else name for name in controls)
    return controls_are_complete(run, controls) and all(run.workdir.has_network(name) for name in ('pruned', *names))


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The network after a step, and the keep mask of the teacher's groups in it, bool [groups]."""

    network: Classifier
    keep: np.ndarray


class Pruner:
    """Prunes one teacher with synthesized and other images, always with the same number of steps and the same targets."""

    def __init__(self, run: Run):
        """Finds the channel groups, and measures the table of latencies if it is needed and not in the work directory."""
        self._run, self._workdir, self._teacher = run, run.workdir, run.teacher
        self._settings = settings = run.settings.pruning
        module, self._variables, self._about = run.teacher_parts
        self._user_module = run.user_module()
        self._channels = find_channels(module, run.teacher.image_shape, settings.ignored_layers)
        self._importance = Importance(module, run.teacher, self._channels)
        self._table = self._latencies() if settings.needs_latency else None
        if settings.measure == 'latency':
            refuse_unreachable(self._channels, self._price('latency'), settings)

    @property
    def adaptive_images(self) -> int:
        """The number of images synthesized in competition, over all steps."""
        return self._settings.steps * self._settings.adaptive_batches * self._run.settings.synthesis.batch_size

    def prune(
        self, name: str, images: RowArray, labels: RowArray, control: str = '', competing: bool = False
    ) -> list[Pruned]:
        """Prunes the teacher, and returns the network after each step.

        Args:
          name: the name of the file of the last network.
          images: uint8 [N, H, W, C], to measure importance on and to train on.
          labels: int [N].
          control: 'untuned' (no fine-tuning), 'magnitude' or 'random' (the importance used for removal), or '' for none.
          competing: whether images synthesized in competition are added in each step.
        """
        settings, keep = self._settings, np.ones(self._channels.count, bool)
        variables, networks = self._variables, []
        for step in range(1, settings.steps + 1):
            path = self._workdir.network(name if step == settings.steps else f'{name}_{step}')
            finished = self._workdir.has_network(path.stem)
            if competing or not finished:
                keep, target = self._sliced(path.stem, step, keep, variables, images, control)
            if competing:
                pool = images_against(self._run, target)
                images, labels = Joined(images, pool.rows('images')), Joined(labels, pool.rows('labels'))
            if not finished:
                updates = settings.updates_per_step + (settings.updates if step == settings.steps else 0)
                if control == 'untuned' or not updates:
                    save_network(path, target.start, target.about)
                else:
                    train_network(self._run, target, self._job(keep, updates, len(labels)), images, labels)
            variables, about = load_network(path)
            keep = self._channels.keep_mask(about.get('kept', {}))
            networks.append(Pruned(classifier_of(module_of(about, self._user_module), variables, about), keep))
        return networks

    def ratios(self, pruned: Pruned) -> dict[str, float | None]:
        """Returns the costs of `pruned` divided by those of the teacher; this call measures the latencies."""
        size = self._settings.latency_batch
        measures = (*EXACT, *(('latency',) if self._table else ()))
        ratios = {f'{measure}_ratio': self._ratio(measure, pruned.keep) for measure in measures}
        return {
            **ratios,
            'latency_ratio': latency(pruned.network, size) / latency(self._teacher, size),
            'predicted_latency_ratio': ratios.get('latency_ratio'),
        }

    def history(self, steps: list[Pruned], accuracies: list[float | None]) -> dict:
        """Returns data for the report: cost and score of the teacher and after each step, and layer widths.

        Args:
          steps: the network after each step.
          accuracies: the test accuracies of the teacher and of the network after each step.
        """
        keep = [np.ones(self._channels.count, bool), *(step.keep for step in steps)]
        rows = [{f'{measure}_ratio': self._ratio(measure, mask) for measure in EXACT} for mask in keep]
        return {
            'steps': [{**row, 'test_accuracy': score} for row, score in zip(rows, accuracies, strict=True)],
            'widths': {
                layer: [len(groups), int(self._channels.remaining(groups, keep[-1]).sum())]
                for layer, groups in self._channels.layers.items()
            },
        }

    def _ratio(self, measure: str, keep: np.ndarray) -> float:
        """Returns the cost of the network with these groups, divided by that of the unpruned network."""
        price = self._price(measure)
        return price.total(keep) / price.total(np.ones_like(keep))

    def _price(self, measure: str) -> Cost:
        """Returns the cost of the network as a function of its remaining groups."""
        if measure in EXACT:
            return EXACT[measure](self._channels)
        assert self._table is not None, 'the settings need no table of latencies'
        return predicted_latency(self._channels, self._table)

    def _read_or_compute(self, name: str, compute: Callable[[], dict]) -> dict:
        """Returns the content of a JSON file in the work directory; if it is missing, process 0 computes and writes it."""

        def read_or_compute() -> dict:
            value = self._workdir.read_json(name, None)
            if value is None:
                value = compute()
                write_atomic(self._workdir.path / name, (json.dumps(value) + '\n').encode())
            return value

        return decide(read_or_compute, name)

    def _choose(self, keep, variables: dict, images: RowArray, step: int, control: str) -> np.ndarray:
        """Chooses the groups that remain after a step; returns their keep mask, bool [groups].

        Args:
          keep: the keep mask before the step, bool [groups].
          variables: the variables of the network before the step.
          images: uint8 [N, H, W, C], to measure importance on.
          step: the number of the step, from 1.
          control: as in `prune`.

        Raises:
          DvinvError: the target of the last step is not reached.
        """
        settings = self._settings
        method = control if control in ('magnitude', 'random') else settings.importance
        full = self._channels.restored(keep, variables)
        seed = seed_of(self._run, ROLE)
        if method == 'taylor':
            rows = np.random.default_rng((seed, step)).permutation(len(images))
            size = min(settings.batch_size, len(rows))
            starts = range(0, min(len(rows) - size + 1, size * settings.importance_batches), size)
            batches = (images[np.sort(rows[start : start + size])] for start in starts)
            importance = self._importance.taylor(full, batches, equal=bool(keep.all()))
        elif method == 'magnitude':
            importance = self._importance.magnitude(full)
        else:
            importance = self._importance.random((seed, step))
        scores = removal_scores(settings, importance, self._price(settings.cost) if settings.eta else None, keep)
        price = self._price(settings.measure)
        most = settings.target_of_step(step) * price.total(np.ones_like(keep))
        remaining = without_lowest(self._channels, keep, scores, price, most, settings)
        if price.total(remaining) > most and step == settings.steps:
            raise unreachable(settings, f'{self._ratio(settings.measure, remaining):.3f}')
        return remaining

    def _sliced(
        self, name: str, step: int, keep, variables: dict, images: RowArray, control: str
    ) -> tuple[np.ndarray, TrainTarget]:
        """Returns the keep mask after a step, and the pruned network before fine-tuning.

        Args:
          name: the name of its file.
          step: the number of the step, from 1.
          keep, variables: the keep mask and the variables of the network before the step.
          images, control: as in `prune`.
        """
        channels = self._channels

        def choose() -> dict:
            return channels.kept(self._choose(keep, variables, images, step, control))

        # The choice is kept on disk, because a resumed run must remove the same groups.
        remaining = channels.keep_mask(self._read_or_compute(f'pruning/{name}.json', choose))
        start, kept = channels.sliced(remaining, channels.restored(keep, variables)), channels.kept(remaining)
        network = StudentSettings(network=self._about['network'], width=self._about['width'])
        return remaining, TrainTarget('pruning', name, network, self._teacher, ROLE, step, start, kept, self._user_module)

    def _job(self, keep: np.ndarray, updates: int, count: int) -> TrainJob:
        """Returns the fine-tuning of the network with the groups in the keep mask, on `count` images."""
        settings = dataclasses.replace(self._settings, updates=updates)
        compared, means = _compared(self._teacher), find_statistics(self._channels.shapes)
        kept_channels = {
            layer: np.flatnonzero(self._channels.remaining(groups, keep))
            for layer in compared
            if (groups := self._channels.axes[join_names(means[layer][0])][-1]) is not None
        }
        layers = compared if settings.hint else ()
        teacher = in_precision(self._teacher, settings.precision)
        loss = distillation_loss(teacher, settings.temperature, settings.hint, layers, kept_channels)
        return TrainJob(settings, loss, Rounds(count), self._teacher.variables)

    def _latencies(self) -> dict:
        """Returns the table of latencies, from the work directory if it has one.

        The table is kept so that a resumed run removes the same groups as an uninterrupted one.
        """

        def measure() -> dict:
            with Progress('pruning: latencies', len(self._channels.products), 'layers') as progress:
                batch_size, round_to = self._settings.latency_batch, self._settings.round_to
                return measure_latencies(self._channels, batch_size, round_to, lambda done, total: progress.update(done))

        return self._read_or_compute('latency.json', measure)


def run_of_step(run: Run, role: int, step: int) -> Run:
    """Returns the run with the synthesis settings of a step: its number of batches, and a seed of its own.

    Args:
      role: see `training.trainer.TrainTarget`.
    """
    count, synthesis = run.settings.pruning.adaptive_batches, run.settings.synthesis
    images = count * synthesis.batch_size
    synthesis = dataclasses.replace(synthesis, method='adaptive', images=images, batches_per_round=count)
    return run.with_synthesis(synthesis, seed_of(run, role, step))


def images_against(run: Run, target: TrainTarget) -> ImagePool:
    """Synthesizes the pool of a step from the unpruned teacher, in competition with the network just pruned.

    Args:
      target: the pruned network before fine-tuning.

    Returns:
      The finished pool.
    """
    run, name = run_of_step(run, target.role, target.part), f'pruned_{target.part}'
    pool = ImagePool(run.workdir.path / 'pools' / name, run.teacher.digest(), quarantine=True)
    if missing := missing_batches(run.settings.synthesis, pool):
        student_fn, series = apply_fn_of(target.module), f'images_{name}'
        with Synthesizer(run, run.teacher, pool, 'adaptive', 'pruning', series, student_fn=student_fn) as synthesizer:
            synthesizer.fill(missing, target.start, step=target.part)
    return pool


def pruning_section(workdir: Workdir, found: dict) -> Section:
    """Returns the section for the figures of the task and the file pruning.json."""
    story = workdir.read_json('pruning.json', {'steps': [], 'widths': {}})
    names, competing = {**NAMES}, found.get('adaptive_images')
    if competing:
        names['test_accuracy'] += f', and {competing:,} more made in competition with it'
    scores = Table(
        ('Pruned and fine-tuned on', 'real test accuracy'),
        [[name, percent(found[key])] for key, name in names.items() if found[key] is not None],
        highlight=0,
        caption=f'As many removals and, but for the untuned, {found["updates"]:,} updates each; the last, never the best.',
    )
    costs = Table(
        ('Pruned over whole', 'share'),
        [[name, number(found[key])] for key, name in RATIOS.items() if found[key] is not None],
        caption=f'{found["parameters"]:,} parameters are left.',
    )
    accuracy, sentence = found['test_accuracy'], pruning_sentence(found)
    note = f'real test accuracy with {percent(found["flops_ratio"], 0)} of the FLOPs'
    return Section(
        'Pruning',
        sentence,
        tables=[scores, costs],
        charts=[accuracy_by_flops(story['steps']), channels_left(story['widths'])],
        tiles=[Tile('Pruned', percent(accuracy), note, accuracy)],
        summary=sentence,
    )


def accuracy_by_flops(steps: Sequence[dict]) -> Chart | None:
    """Draws the accuracy after each step against the FLOPs that are left; `steps` are those in pruning.json."""
    known = [step for step in steps if step['test_accuracy'] is not None]
    curve = [step['flops_ratio'] for step in known], [step['test_accuracy'] for step in known]
    return line_chart({'Pruned network': curve}, 'Accuracy after each step', 'FLOPs left', 'real test accuracy')


def channels_left(widths: Mapping[str, Sequence[int]]) -> Chart:
    """Draws the channels of each layer before and after; `widths` are those in pruning.json."""
    return bars(
        {layer: (before, after) for layer, (before, after) in widths.items()}, 'Channels that layers make', 'channels'
    )


def pruning_sentence(found: dict) -> str:
    """Returns a sentence that states the result."""
    flops, parameters = (percent(found[name], 0) for name in ('flops_ratio', 'parameters_ratio'))
    text = f'With {flops} of its FLOPs and {parameters} of its parameters '
    if found['test_accuracy'] is None:
        return f'{text}left, the network was fine-tuned on synthesized images alone.'
    before = percent(found['unpruned_test_accuracy'])
    return f'{text}left, the network reads {percent(found["test_accuracy"])} of the real test images right, {before} before.'
