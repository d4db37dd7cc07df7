"""The task `pruning`: the teacher loses channels, step by step, and learns on synthesized images to do without them.

The channels that can only go together are units (`networks.channels`). A step measures how much the network would miss each
(`importance`), removes the least missed until it costs what the step may leave (`removal`), slices them out of the arrays
and fine-tunes what is left by distillation from the whole teacher (arXiv 1912.08795, section 4.3). Where the config asks for
it, images are first made in competition with what is left (`competition`). They join the pool for `pruned` alone;
controls, each of which would need some of its own, go by the pool.
"""

import dataclasses
import json
import math
from collections.abc import Callable

import ml_collections
import numpy as np

from dvinv.configuration import DATA_FREE_CONTROLS, check_count, recipe_of
from dvinv.data.joined import Joined
from dvinv.data.real import load_real
from dvinv.errors import DvinvError
from dvinv.held_out import HeldOut, learned_rows
from dvinv.inversion import Teacher
from dvinv.inversion.execution import in_precision
from dvinv.inversion.modules import trained_part
from dvinv.inversion.tap import find_statistics
from dvinv.networks import Classifier, load_classifier, load_network, save_network
from dvinv.networks.channels import Narrow, find_channels
from dvinv.networks.channels.cost import Cost
from dvinv.networks.classifier import join_names
from dvinv.pools import controls_are_whole, finished_pool
from dvinv.pruning import competition
from dvinv.pruning.importance import Importance
from dvinv.pruning.latency import latency, measure_table, predicted
from dvinv.pruning.removal import EXACT, Removal, refuse_unreachable, without_lowest
from dvinv.rounds import Rounds
from dvinv.runtime.files import write_atomic
from dvinv.runtime.processes import decide
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import distillation_loss
from dvinv.synthesizer import control_pool
from dvinv.teacher import check_changeable, load, own_module, read, test_accuracy
from dvinv.training import Array, Learner, Lesson, PlannedTraining, learn

ROLE = 5  # see `training.Learner`
CONTROLS = ('untuned', 'magnitude', 'random', *DATA_FREE_CONTROLS, 'real')


def run(config, workdir) -> dict:
    """Prune by synthesized images, and the controls, then score all on the real test images; returns the figures.

    Real data come in when every data-free network is finished: first for the upper control, then for the scores.
    """
    workdir = open_workdir(workdir, config)
    teacher = load(config, workdir)
    pool = finished_pool(config, workdir, teacher)
    pruner, controls = Pruner(config, workdir, teacher), config.pruning.controls
    images, labels = (learned_rows(config, pool.rows(name)) for name in ('images', 'labels'))
    networks = {'pruned': pruner.prune('pruned', images, labels, competing=config.pruning.adaptive_batches > 0)}
    for control in ('untuned', 'magnitude', 'random'):
        if control in controls:
            networks[control] = pruner.prune(control, images, labels, control)
    for control in DATA_FREE_CONTROLS:
        if control in controls:
            lesser = control_pool(config, workdir, teacher, control, 'pruning')
            rows = [learned_rows(config, lesser.rows(name)) for name in ('images', 'labels')]
            networks[control] = pruner.prune(f'pruned_by_{control}', *rows)
    data = load_real(config.data)
    if 'real' in controls:
        networks['real'] = pruner.prune('pruned_by_real', data.train.images, data.train.labels)
    held_out = HeldOut(config, teacher, pool)
    whole, pruned = test_accuracy(teacher, data), networks['pruned']
    scores = [test_accuracy(step.network, data) for step in pruned]
    write_atomic(
        workdir.path / 'pruning.json', (json.dumps(pruner.story(pruned, [whole, *scores]), indent=1) + '\n').encode()
    )
    return {
        'test_accuracy': scores[-1],
        'unpruned_test_accuracy': whole,
        **{
            f'{control}_test_accuracy': test_accuracy(networks[control][-1].network, data) if control in networks else None
            for control in CONTROLS
        },
        **held_out.beside({name: steps[-1].network for name, steps in networks.items()}, 'pruned'),
        **pruner.ratios(pruned[-1]),
        'parameters': pruned[-1].network.parameters,
        'images': len(labels) + pruner.adaptive_images,
        'adaptive_images': pruner.adaptive_images,
        'updates': pruner.removal.steps * config.pruning.updates_per_step + config.pruning.updates,
    }


def planned_trainings(config, teacher: Teacher) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`: of whole networks, so pruned ones will take less."""
    group = config.pruning
    updates = group.steps * group.updates_per_step + group.updates
    recipe, module = dataclasses.replace(recipe_of(group), updates=updates), teacher.module
    layers = _compared(teacher) if group.hint else ()
    loss = distillation_loss(in_precision(teacher, group.precision), group.temperature, group.hint, layers)
    lesson = Lesson(recipe, loss, Rounds(config.synthesis.images), teacher.variables)
    networks = 1 + sum(control != 'untuned' for control in group.controls)
    return [PlannedTraining('pruned', module, lesson, teacher, networks, teacher)]


def _compared(teacher: Teacher) -> tuple[str, ...]:
    """Returns the layers with running statistics: the teacher may have recorded moments of others, too."""
    own = find_statistics(trained_part(teacher.variables))
    return tuple(layer for layer in teacher.tap.layers if layer in own)


def complete(config, workdir: Workdir) -> bool:
    """Whether networks and controls' images are still there: what is damaged is deleted by its owner."""
    by_images = (*DATA_FREE_CONTROLS, 'real')
    controls = (f'pruned_by_{name}' if name in by_images else name for name in config.pruning.controls)
    whole = controls_are_whole(config, workdir, config.pruning.controls)
    return whole and all(workdir.has_network(name) for name in ('pruned', *controls))


def check(config, teacher: Teacher) -> None:
    """Refuse, before anything is written, what cannot be pruned as asked.

    Args:
      teacher: with shapes for weights where it is yet to be trained.

    Raises:
      DvinvError: names the field, its value and the choices.
    """
    removal, group = removal_of(config), config.pruning
    removal.check()
    competition.check(config)
    if group.updates_per_step < 0:
        raise DvinvError(f'pruning.updates_per_step is {group.updates_per_step}; it must be at least 0.')
    if 0 < group.updates_per_step <= group.warmup:
        raise DvinvError(f'pruning.warmup is {group.warmup}, but a step has only {group.updates_per_step} updates.')
    if group.temperature <= 0:
        raise DvinvError(f'pruning.temperature is {group.temperature}; it must be above 0.')
    if not 0 <= group.hint < math.inf:
        raise DvinvError(f'pruning.hint is {group.hint}; it must be at least 0 and finite.')
    if group.latency_batch < 1:
        raise DvinvError(f'pruning.latency_batch is {group.latency_batch}; it must be at least 1.')
    for control in group.controls:
        if control not in CONTROLS:
            raise DvinvError(f'pruning.controls names {control!r}; choose among {", ".join(CONTROLS)}.')
    check_changeable(config, teacher)
    module = teacher.module
    if isinstance(module, Narrow):
        raise DvinvError(
            f'teacher.weights is {config.teacher.weights!r}, a network that has lost channels; prune a whole one.'
        )
    if group.adaptive_batches:
        images = group.adaptive_batches * config.synthesis.batch_size
        check_count(config, 'pruning.adaptive_batches', images, teacher.num_classes)
    channels = find_channels(module, teacher.image_shape, tuple(removal.protected))
    if removal.measure in EXACT:
        refuse_unreachable(channels, EXACT[removal.measure](channels), removal)


def removal_of(config) -> Removal:
    """The `Removal` among the fields of the group `pruning`."""
    return Removal(**{field.name: config.pruning[field.name] for field in dataclasses.fields(Removal)})


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The network after a step, and which of the teacher's units are left in it, bool [units]."""

    network: Classifier
    alive: np.ndarray


class Pruner:
    """Prunes one teacher, by synthesized and other images; all that are compared lose as much in as many steps."""

    def __init__(self, config, workdir: Workdir, teacher: Teacher):
        """Measures a table of latencies where the config needs one and the work directory has none yet."""
        self.removal = removal_of(config)
        self._config, self._workdir, self._teacher = config, workdir, teacher
        module, self._variables, self._about = read(config, workdir)
        self._own = own_module(config, teacher)
        self._channels = find_channels(module, teacher.image_shape, tuple(self.removal.protected))
        self._importance = Importance(module, teacher, self._channels)
        self._table = self._latencies() if self.removal.needs_latency else None
        if self.removal.measure == 'latency':
            refuse_unreachable(self._channels, self._price('latency'), self.removal)

    @property
    def adaptive_images(self) -> int:
        """How many images are made in competition, in all steps."""
        return self.removal.steps * self._config.pruning.adaptive_batches * self._config.synthesis.batch_size

    def prune(self, name: str, images: Array, labels: Array, control: str = '', competing: bool = False) -> list[Pruned]:
        """The network after each step; the last one's file is called `name`.

        Args:
          images: uint8 [N, H, W, C] to measure on and to learn from; `labels`: int [N].
          control: 'untuned' (never learns), 'magnitude' or 'random' (removed by these), or '' for none.
          competing: whether images made in competition join them in each step.
        """
        removal, alive = self.removal, np.ones(self._channels.count, bool)
        variables, done = self._variables, []
        for step in range(1, removal.steps + 1):
            path = self._workdir.network(name if step == removal.steps else f'{name}_{step}')
            there = self._workdir.has_network(path.stem)
            if competing or not there:
                learner = self._slimmed(path.stem, step, alive, variables, images, control)
            if competing:
                pool = competition.images_against(self._config, self._workdir, self._teacher, learner)
                images, labels = Joined(images, pool.rows('images')), Joined(labels, pool.rows('labels'))
            if not there:
                updates = self._config.pruning.updates if step == removal.steps else 0
                updates += self._config.pruning.updates_per_step
                if control == 'untuned' or not updates:
                    save_network(path, learner.start, learner.about)
                else:
                    learn(self._config, self._workdir, learner, self._lesson(learner, updates, len(labels)), images, labels)
            variables, about = load_network(path)
            alive = self._channels.alive(about.get('kept', {}))
            done.append(Pruned(load_classifier(path, self._own), alive))
        return done

    def ratios(self, pruned: Pruned) -> dict[str, float | None]:
        """What `pruned` costs, as shares of what the teacher does; latencies are measured here and now."""
        size = self._config.pruning.latency_batch
        measures = (*EXACT, *(('latency',) if self._table else ()))
        ratios = {f'{measure}_ratio': self._share(measure, pruned.alive) for measure in measures}
        return {
            **ratios,
            'latency_ratio': latency(pruned.network, size) / latency(self._teacher, size),
            'predicted_latency_ratio': ratios.get('latency_ratio'),
        }

    def story(self, steps: list[Pruned], accuracies: list[float | None]) -> dict:
        """For the report: what the teacher and the network after each step cost and score, and how wide its layers are."""
        alive = [np.ones(self._channels.count, bool), *(step.alive for step in steps)]
        rows = [{f'{measure}_ratio': self._share(measure, one) for measure in EXACT} for one in alive]
        return {
            'steps': [{**row, 'test_accuracy': score} for row, score in zip(rows, accuracies, strict=True)],
            'widths': {
                layer: [len(units), int(self._channels.there(units, alive[-1]).sum())]
                for layer, units in self._channels.layers.items()
            },
        }

    def _share(self, measure: str, alive: np.ndarray) -> float:
        price = self._price(measure)
        return price.of(alive) / price.of(np.ones_like(alive))

    def _price(self, measure: str) -> Cost:
        """What the network costs, by its units that are left."""
        return EXACT[measure](self._channels) if measure in EXACT else predicted(self._channels, self._table)

    def _decided(self, name: str, choose: Callable[[], np.ndarray]) -> np.ndarray:
        """The units left by `choose`, kept on disk before any learning: a checkpoint is of these, whatever rounding does."""
        return self._channels.alive(self._kept_in(f'pruning/{name}.json', lambda: self._channels.kept(choose())))

    def _kept_in(self, name: str, compute: Callable[[], dict]) -> dict:
        """What a JSON file of the work directory has, or what process 0 computes, who writes it there."""

        def read_or_compute() -> dict:
            value = self._workdir.read_json(name, None)
            if value is None:
                value = compute()
                write_atomic(self._workdir.path / name, (json.dumps(value) + '\n').encode())
            return value

        return decide(read_or_compute, name)

    def _next(self, alive, variables: dict, images: Array, step: int, control: str) -> np.ndarray:
        """The units that are left after a step of those, bool [units], before it."""
        removal = self.removal
        method = control if control in ('magnitude', 'random') else removal.importance
        whole = self._channels.restored(alive, variables)
        seed = 16 * self._config.seed + ROLE
        if method == 'taylor':
            rows = np.random.default_rng((seed, step)).permutation(len(images))
            size = min(self._config.pruning.batch_size, len(rows))
            starts = range(0, min(len(rows) - size + 1, size * removal.importance_batches), size)
            batches = (images[np.sort(rows[start : start + size])] for start in starts)
            importance = self._importance.taylor(whole, batches, equal=bool(alive.all()))
        else:
            importance = (
                self._importance.magnitude(whole) if method == 'magnitude' else self._importance.random((seed, step))
            )
        scores = removal.scores(importance, self._price(removal.cost) if removal.eta else None, alive)
        price = self._price(removal.measure)
        most = removal.target(step) * price.of(np.ones_like(alive))
        left = without_lowest(self._channels, alive, scores, price, most, removal)
        if price.of(left) > most and step == removal.steps:
            raise DvinvError(
                f'pruning.left is {removal.left}, but with {removal.least} channels in every layer '
                f'{price.of(left) / price.of(np.ones_like(alive)):.3f} of the {removal.measure} are left; ask for more, or '
                'lower pruning.least.'
            )
        return left

    def _slimmed(self, name: str, step: int, alive, variables: dict, images: Array, control: str) -> Learner:
        """The network that a step makes of that with `variables` and the units `alive`, before it learns."""
        left = self._decided(name, lambda: self._next(alive, variables, images, step, control))
        kept, start = self._channels.kept(left), self._channels.sliced(left, self._channels.restored(alive, variables))
        network = ml_collections.ConfigDict({field: self._about[field] for field in ('network', 'width')})
        return Learner('pruning', name, network, self._teacher, ROLE, step, start, kept, self._own)

    def _lesson(self, learner: Learner, updates: int, count: int) -> Lesson:
        group, alive = self._config.pruning, self._channels.alive(learner.kept)
        recipe, means = dataclasses.replace(recipe_of(group), updates=updates), find_statistics(self._channels.shapes)
        left = {
            layer: np.flatnonzero(self._channels.there(units, alive))
            for layer in _compared(self._teacher)
            if (units := self._channels.axes[join_names(means[layer][0])][-1]) is not None
        }
        layers = _compared(self._teacher) if group.hint else ()
        teacher = in_precision(self._teacher, group.precision)
        loss = distillation_loss(teacher, group.temperature, group.hint, layers, left)
        return Lesson(recipe, loss, Rounds(count), self._teacher.variables)

    def _latencies(self) -> dict:
        """The table of the work directory; a resumed run must remove what an undisturbed one would."""

        def measure() -> dict:
            with Progress('pruning: latencies', len(self._channels.products), 'layers') as progress:
                batch_size, multiple = self._config.pruning.latency_batch, self.removal.multiple
                return measure_table(self._channels, batch_size, multiple, lambda done, of: progress.update(done))

        return self._kept_in('latency.json', measure)
