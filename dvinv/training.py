"""One training loop: teachers and verifiers learn from labels with it, students from a teacher.

Randomness is a function of the seed and the update's number alone, and everything that an update depends on is in the
checkpoint, so a training that was killed ends with the bits of one that was not.
"""

import dataclasses
from collections.abc import Callable

import flax
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.data.rows import Rows
from dvinv.errors import DvinvError
from dvinv.inversion.tap import features_in_training
from dvinv.networks import Classifier, apply_fn_of, initialise, load_classifier, module_of, save_network, shapes_of
from dvinv.networks.head import grown
from dvinv.recipe import Recipe
from dvinv.rounds import Rounds, chosen_images
from dvinv.runtime import preemption
from dvinv.runtime.checkpoints import Checkpoints
from dvinv.runtime.devices import AXIS, make_mesh, training_mesh
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir

Array = np.ndarray | Rows  # in memory, or read by rows


@flax.struct.dataclass
class TrainState:
    """What changes while a network learns.

    Attributes:
      params, batch_stats: the network's variables, float32.
      opt_state: the optimiser's.
      step: int32 scalar, updates done.
    """

    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    step: jax.Array

    @property
    def variables(self) -> dict:
        """As a Linen module takes them."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a network is taught, and how.

    Attributes:
      recipe: how.
      loss_fn: (logits, features, x, labels, frozen) -> scalar; x is the augmented, normalised batch [B, H, W, C], features
        are the network's BatchNorm inputs (see `inversion.tap.features_in_training`).
      rounds: when its images come.
      frozen: variables that `loss_fn` needs beside, those of a teacher for instance.
      beside: when a second set of images comes, which follow the first ones; the second half of every batch is of them.
      head: path of a layer that is heard too, see `inversion.tap.features_in_training`.
    """

    recipe: Recipe
    loss_fn: Callable
    rounds: Rounds
    frozen: dict | None = None
    beside: Rounds | None = None
    head: str = ''

    def rows(self, seed: int, update: int) -> np.ndarray:
        """Which images make up the batch of an update, int32 [B]."""
        size = self.recipe.batch_size
        if self.beside is None:
            return chosen_images(seed, update, size, self.rounds)
        first = chosen_images(seed, update, size // 2, self.rounds)
        second = chosen_images(2**32 + seed, update, size // 2, self.beside)  # not in step with the first, if as many
        return np.concatenate([first, self.rounds.images * self.rounds.count + second])

    def come_by(self, update: int) -> int:
        """How many images there must be for this update."""
        if self.beside is None:
            return self.rounds.come_by(update)
        return self.rounds.images * self.rounds.count + self.beside.come_by(update)


def initial_state(recipe: Recipe, variables: dict) -> TrainState:
    """The state before the first update of a network with these variables."""
    optimiser_state = recipe.optimizer().init(variables['params'])
    return TrainState(variables['params'], variables.get('batch_stats', {}), optimiser_state, np.zeros((), np.int32))


def _first_variables(module, key: jax.Array, image_shape, start: dict | None) -> dict:
    """Those of `start` as far as they go, the others at random."""
    if start is None:
        return initialise(module, key, image_shape)
    if jax.tree.map(np.shape, start) == jax.tree.map(np.shape, shapes_of(module, image_shape)):
        return start
    return grown(jax.device_get(initialise(module, key, image_shape)), start)


def make_update(module, recipe: Recipe, loss_fn: Callable, classifier: Classifier, head: str = ''):
    """The pure update `(state, images, labels, frozen, key) -> (state, loss)`, for images uint8 [B, H, W, C], labels [B].

    Args:
      loss_fn, head: see `Lesson`; `frozen` is handed to the loss.
      classifier: tells how pixels are normalised.
    """
    optimizer = recipe.optimizer()

    def update(state: TrainState, images, labels, frozen, key):
        look_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = recipe.look(look_key, classifier.normalise(images), classifier)

        def loss_of(params):
            variables = {'params': params, 'batch_stats': state.batch_stats}
            logits, features, batch_stats = features_in_training(module, variables, x, {'dropout': dropout_key}, head)
            return loss_fn(logits, features, x, labels, frozen), batch_stats

        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state, state.step + 1), loss

    return update


def make_reestimate(module, recipe: Recipe, classifier: Classifier):
    """`(state, images, key) -> state`: one batch in train mode moves the running statistics, weights stay."""

    def reestimate(state: TrainState, images, key):
        look_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = recipe.look(look_key, classifier.normalise(images), classifier)
        _, _, batch_stats = features_in_training(module, state.variables, x, {'dropout': dropout_key})
        return state.replace(batch_stats=batch_stats, step=state.step + 1)

    return reestimate


class Training:
    """A network that learns, in one go or in stretches; a context manager, for its progress.

    A training that was killed goes on from its last checkpoint when it is made again.

    Attributes:
      step: updates done.
      apply_fn: (variables, x) -> logits, of the network in eval mode.
    """

    def __init__(
        self,
        module,
        lesson: Lesson,
        like: Classifier,
        seed: int,
        mesh: Mesh,
        workdir: Workdir,
        task: str,
        series: str,
        logging,
        start: dict | None = None,
    ):
        """From random weights, from given ones, or from the last checkpoint.

        Args:
          module: the Linen module; takes x and `train`.
          like: image shape, mean and std of the network to be; its variables are not used.
          mesh: batches are split over it; BatchNorm sees the whole batch.
          task, series: what its metrics and checkpoints go by in `workdir`.
          logging: `every` so many updates a line of metrics, `checkpoint_every` so many a checkpoint.
          start: variables to go on from, of a network with as many classes or fewer (see `networks.head.grown`).

        Raises:
          DvinvError: a batch that the devices do not divide, or a damaged checkpoint.
        """
        recipe = lesson.recipe
        recipe.check_devices(series, mesh.size)
        self.apply_fn = apply_fn_of(module)
        self._lesson, self._seed, self._logging = lesson, seed, logging
        self._workdir, self._task, self._series = workdir, task, series
        everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        self._update = jax.jit(
            make_update(module, recipe, lesson.loss_fn, like, lesson.head),
            donate_argnums=0,
            in_shardings=(everywhere, split, split, everywhere, everywhere),
        )
        self._reestimate = jax.jit(make_reestimate(module, recipe, like), in_shardings=(everywhere, split, everywhere))
        self._checkpoints = Checkpoints(workdir.path / 'checkpoints' / series)
        key = jax.random.key(seed)
        state = initial_state(recipe, _first_variables(module, jax.random.fold_in(key, 0), like.image_shape, start))
        self.step, state = self._checkpoints.restore(state) or (0, state)
        self._losses = self._checkpoints.notes().get('losses', [])  # since the last line of metrics
        workdir.metrics.cut(task, series, self.step)
        self._state, self._frozen, self._key = jax.device_put((state, lesson.frozen, jax.random.fold_in(key, 1)), everywhere)
        self._progress = Progress(f'{task}: {series}', recipe.updates, self.step)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._progress.__exit__(*exception)

    @property
    def variables(self) -> dict:
        """The network's variables after `step` updates, numpy arrays."""
        return jax.device_get(self._state.variables)

    def advance(self, images: Array, labels: Array, until: int) -> None:
        """Learn up to update `until`, and keep a checkpoint of it where it is not the last.

        Args:
          images: uint8 [N, H, W, C], all that have come until then, in order; `labels`: int [N].

        Raises:
          DvinvError: a loss that is not a number (names the update), or a full disk.
          ValueError: images that should have come by then are not there.
          SystemExit: SIGTERM came; a checkpoint was kept.
        """
        recipe = self._lesson.recipe
        losses, self._losses = self._losses, []
        saved = self.step
        expected = self._lesson.come_by(max(until - 1, 0))
        if len(images) < expected:
            raise ValueError(f'by update {until} there should be {expected} images, not {len(images)}')
        while self.step < until:
            if preemption.asked():
                if self.step > saved:
                    notes = {'losses': [float(loss) for loss in jax.device_get(losses)]}
                    self._checkpoints.save(self.step, jax.device_get(self._state), notes)
                preemption.leave_if_asked()
            rows = self._lesson.rows(self._seed, self.step)
            self._state, loss = self._update(self._state, images[rows], labels[rows], self._frozen, self._key)
            losses.append(loss)
            self.step += 1
            if self.step % self._logging.every == 0 or self.step == until:
                mean = _checked_mean(losses, self.step, self._series)
                losses = []
                self._workdir.metrics.append(self._task, self._series, [{'step': self.step, 'loss': mean}])
                self._progress.update(self.step, loss=mean)
                pause = self.step % self._logging.checkpoint_every == 0 or self.step == until
                if pause and self.step < recipe.updates:
                    self._checkpoints.save(self.step, jax.device_get(self._state))
                    saved = self.step

    def finish(self, images: Array, labels: Array) -> dict:
        """Learn to the end and, where the recipe says so, estimate BatchNorm statistics again; returns the variables.

        Raises:
          DvinvError: as `advance`, or weights that are not finite.
        """
        recipe = self._lesson.recipe
        self.advance(images, labels, recipe.updates)
        for step in range(recipe.updates, recipe.updates + recipe.reestimate):
            preemption.leave_if_asked()
            rows = self._lesson.rows(self._seed, step)
            self._state = self._reestimate(self._state, images[rows], self._key)
        variables = self.variables
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):  # by the last update, which no loss saw
            raise DvinvError(
                f'The weights of the {self._series} are not finite after the last update: lower its learning_rate.'
            )
        return variables


@dataclasses.dataclass(frozen=True)
class Learner:
    """Which network of a run learns.

    Attributes:
      task: during which.
      name: what its file, metrics and checkpoints go by.
      network: a config group with the fields `network` and `width`.
      like: a classifier of the same image shape, classes, mean and std.
      role: makes a seed of its own of the run's; students that are compared share it, and so their start and shuffles.
      part: of a network that learns in several trainings, which one this is; each shuffles anew.
      start: variables that it goes on from (see `Training`); None: random ones.
      kept: the channels that are left of a pruned network (see `networks.channels.Narrow`).
    """

    task: str
    name: str
    network: ml_collections.ConfigDict
    like: Classifier
    role: int
    part: int = 0
    start: dict | None = None
    kept: dict[str, tuple[int, ...]] | None = None

    @property
    def about(self) -> dict:
        """Its description, as `networks.save_network` takes it."""
        about = {field: getattr(self.like, field) for field in ('num_classes', 'image_shape', 'mean', 'std')}
        pruned = {'kept': self.kept} if self.kept else {}
        return {'network': self.network.network, 'width': self.network.width, **about, **pruned}


def training_of(config, workdir: Workdir, learner: Learner, lesson: Lesson) -> Training:
    """The `Training` of a network of a run."""
    seed, mesh = 16 * config.seed + learner.role, training_mesh(make_mesh(config.devices))
    if learner.part:
        seed = int(np.random.SeedSequence([seed, learner.part]).generate_state(1)[0])
    where = workdir, learner.task, learner.name, config.logging
    return Training(module_of(learner.about), lesson, learner.like, seed, mesh, *where, learner.start)


def learn(config, workdir: Workdir, learner: Learner, lesson: Lesson, images: Array, labels: Array) -> Classifier:
    """The trained network: from its file where it is finished, else trained (or trained on) and written.

    Args:
      images: uint8 [N, H, W, C] to learn from; `labels`: int [N].
    """
    path = workdir.network(learner.name)
    if not path.exists():
        with training_of(config, workdir, learner, lesson) as training:
            variables = training.finish(images, labels)
        save_network(path, variables, learner.about)
    return load_classifier(path)


def _checked_mean(losses: list, step: int, series: str) -> float:
    """Mean of the last updates' losses; stops at the first that is not a number."""
    values = np.asarray(jax.device_get(losses), np.float64)
    if not np.isfinite(values).all():
        wrong = step - len(values) + int(np.argmin(np.isfinite(values))) + 1
        raise DvinvError(f'The loss of the {series} is not a finite number at update {wrong}: lower its learning_rate.')
    return float(values.mean())
