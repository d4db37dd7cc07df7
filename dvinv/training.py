"""One training loop: teachers and verifiers learn from labels with it, students from a teacher.

Randomness is a function of the seed and the update's number alone, and everything that an update depends on is in the
checkpoint, so a training that was killed ends with the bits of one that was not.
"""

import dataclasses
from collections.abc import Callable

import flax
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.errors import DvinvError
from dvinv.inversion.augmentation import Augmentation
from dvinv.networks import Classifier, create, initialise, load_classifier, save_network
from dvinv.runtime.checkpoints import Checkpoints
from dvinv.runtime.devices import AXIS, make_mesh, training_mesh
from dvinv.runtime.progress import Progress
from dvinv.runtime.workdir import Workdir


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
class Recipe:
    """How a network is trained; a group of the config, field for field."""

    updates: int
    batch_size: int
    learning_rate: float
    optimiser: str = 'adam'  # 'adam' (with decoupled weight decay) or 'sgd' (Nesterov momentum .9)
    schedule: str = 'cosine'  # 'cosine' (to 0) or 'step' (times .1 after each of `milestones`)
    milestones: tuple[float, ...] = (0.4, 0.8)  # shares of `updates`
    warmup: int = 0  # updates of linear warm-up
    weight_decay: float = 0.0
    shift: int = 0  # pixels; random crops of a picture padded with black
    flip: bool = False  # a coin an image
    noise: float = 0.0  # deviation, up to, of Gaussian noise an image, for pixels in [0, 1]
    reestimate: int = 0  # batches on which BatchNorm statistics are estimated again at the end, weights frozen

    def check(self, name: str) -> None:
        """Refuse a recipe that cannot be followed; `name` is that of its config group."""
        for field in ('updates', 'batch_size'):
            if getattr(self, field) < 1:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)}; it must be at least 1.')
        for field in ('warmup', 'weight_decay', 'shift', 'noise', 'reestimate'):
            if getattr(self, field) < 0:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)}; it must be at least 0.')
        if self.learning_rate <= 0:
            raise DvinvError(f'{name}.learning_rate is {self.learning_rate}; it must be above 0.')
        if self.warmup >= self.updates:
            raise DvinvError(f'{name}.warmup is {self.warmup}, but there are only {self.updates} updates.')
        if not all(isinstance(share, int | float) and 0 < share < 1 for share in self.milestones):
            raise DvinvError(
                f'{name}.milestones is {self.milestones}; they must be shares of the updates, above 0 and below 1.'
            )
        for field, choices in (('optimiser', ('adam', 'sgd')), ('schedule', ('cosine', 'step'))):
            if getattr(self, field) not in choices:
                raise DvinvError(f'{name}.{field} is {getattr(self, field)!r}; choose one of {", ".join(choices)}.')

    def check_devices(self, name: str, devices: int) -> None:
        """Refuse a batch that cannot be split evenly over so many devices; `name` is that of the config group."""
        if self.batch_size % devices:
            raise DvinvError(
                f'A batch of {self.batch_size} images cannot be split evenly over {devices} devices; choose a '
                f'{name}.batch_size that {devices} divides, or another number of devices.'
            )

    @property
    def look(self) -> Augmentation:
        """How the network is shown its training images."""
        return Augmentation('crop', self.shift, self.flip, self.noise)

    def optimizer(self) -> optax.GradientTransformation:
        """The Optax optimiser with its schedule."""
        if self.schedule == 'cosine':
            rate = optax.cosine_decay_schedule(self.learning_rate, max(1, self.updates - self.warmup))
        else:
            rate = optax.piecewise_constant_schedule(
                self.learning_rate, {round(share * self.updates) - self.warmup: 0.1 for share in self.milestones}
            )
        if self.warmup:
            rate = optax.join_schedules([optax.linear_schedule(0.0, self.learning_rate, self.warmup), rate], [self.warmup])
        if self.optimiser == 'adam':
            return optax.adamw(rate, weight_decay=self.weight_decay)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optax.sgd(rate, 0.9, nesterov=True))


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a network is taught, and how.

    Attributes:
      recipe: how.
      loss_fn: (logits, x, labels, frozen) -> scalar; x is the augmented, normalised batch [B, H, W, C].
      images: uint8 [N, H, W, C]; `labels`: int [N].
      frozen: variables that `loss_fn` needs beside, those of a teacher for instance.
    """

    recipe: Recipe
    loss_fn: Callable
    images: np.ndarray
    labels: np.ndarray
    frozen: dict | None = None


def initial_state(module, recipe: Recipe, key: jax.Array, image_shape) -> TrainState:
    """Random weights for images [H, W, C], and the optimiser's state for them."""
    variables = initialise(module, key, image_shape)
    optimiser_state = recipe.optimizer().init(variables['params'])
    return TrainState(variables['params'], variables.get('batch_stats', {}), optimiser_state, np.zeros((), np.int32))


def make_update(module, recipe: Recipe, loss_fn: Callable, classifier: Classifier):
    """The pure update `(state, images, labels, frozen, key) -> (state, loss)`, for images uint8 [B, H, W, C], labels [B].

    Args:
      loss_fn: see `Lesson`; `frozen` is handed to it.
      classifier: tells how pixels are normalised.
    """
    optimizer = recipe.optimizer()

    def update(state: TrainState, images, labels, frozen, key):
        look_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = recipe.look(look_key, classifier.normalise(images), classifier)

        def loss_of(params):
            logits, changed = module.apply(
                {'params': params, 'batch_stats': state.batch_stats},
                x,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': dropout_key},
            )
            return loss_fn(logits, x, labels, frozen), changed.get('batch_stats', {})

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
        _, changed = module.apply(state.variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': dropout_key})
        return state.replace(batch_stats=changed.get('batch_stats', {}), step=state.step + 1)

    return reestimate


def chosen_images(seed: int, update: int, batch_size: int, count: int) -> np.ndarray:
    """Which of `count` images make up the batch of an update, int32 [B]: shuffled epochs, one after the other."""
    first = update * batch_size
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    return order[first - epochs[0] * count :][:batch_size].astype(np.int32)


def learn(
    config, workdir: Workdir, task: str, name: str, network, lesson: Lesson, like: Classifier, role: int
) -> Classifier:
    """The trained network `name`: from its file where it is finished, else trained (or trained on) and written.

    Args:
      network: a config group with the fields `network` and `width`.
      like: a classifier of the same image shape, classes, mean and std.
      role: makes a seed of its own of the run's; students that are compared share it, and so their start and shuffles.
    """
    path = workdir.network(name)
    if not path.exists():
        module = create(network.network, like.num_classes, network.width)
        mesh = training_mesh(make_mesh(config.devices))
        variables = fit(module, lesson, like, 16 * config.seed + role, mesh, workdir, task, name, config.logging)
        about = {field: getattr(like, field) for field in ('num_classes', 'image_shape', 'mean', 'std')}
        save_network(path, variables, {'network': network.network, 'width': network.width, **about})
    return load_classifier(path)


def fit(
    module, lesson: Lesson, like: Classifier, seed: int, mesh: Mesh, workdir: Workdir, task: str, series: str, logging
) -> dict:
    """Train `module` from scratch, or from its last checkpoint; returns its variables as numpy arrays.

    Args:
      like: image shape, mean and std of the network to be; its variables are not used.
      mesh: batches are split over it; BatchNorm sees the whole batch.
      task, series: what its metrics and checkpoints go by in `workdir`.
      logging: `every` so many updates a line of metrics, `checkpoint_every` so many a checkpoint.

    Raises:
      DvinvError: a batch that the devices do not divide, a loss that is not a number, a damaged checkpoint.
    """
    recipe = lesson.recipe
    recipe.check_devices(series, mesh.size)
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    update = jax.jit(
        make_update(module, recipe, lesson.loss_fn, like),
        donate_argnums=0,
        in_shardings=(everywhere, split, split, everywhere, everywhere),
    )
    reestimate = jax.jit(make_reestimate(module, recipe, like), in_shardings=(everywhere, split, everywhere))
    key = jax.random.key(seed)
    checkpoints = Checkpoints(workdir.path / 'checkpoints' / series)
    state = initial_state(module, recipe, jax.random.fold_in(key, 0), like.image_shape)
    step, state = checkpoints.restore(state) or (0, state)
    workdir.metrics.cut(task, series, step)
    state, frozen, batch_key = jax.device_put((state, lesson.frozen, jax.random.fold_in(key, 1)), everywhere)

    def chosen(step):
        return chosen_images(seed, step, recipe.batch_size, len(lesson.images))

    losses = []
    with Progress(f'{task}: {series}', recipe.updates, step) as progress:
        while step < recipe.updates:
            rows = chosen(step)
            state, loss = update(state, lesson.images[rows], lesson.labels[rows], frozen, batch_key)
            losses.append(loss)
            step += 1
            last = step == recipe.updates
            if step % logging.every == 0 or last:
                mean = _checked_mean(losses, step, series)
                losses = []
                workdir.metrics.append(task, series, [{'step': step, 'loss': mean}])
                progress.update(step, loss=mean)
                if step % logging.checkpoint_every == 0 and not last:
                    checkpoints.save(step, jax.device_get(state))
    for step in range(recipe.updates, recipe.updates + recipe.reestimate):
        state = reestimate(state, lesson.images[chosen(step)], batch_key)
    variables = jax.device_get(state.variables)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables)):  # by the last update, which no loss saw
        raise DvinvError(f'The weights of the {series} are not finite after the last update: lower its learning_rate.')
    return variables


def _checked_mean(losses: list, step: int, series: str) -> float:
    """Mean of the last updates' losses; stops at the first that is not a number."""
    values = np.asarray(jax.device_get(losses), np.float64)
    if not np.isfinite(values).all():
        wrong = step - len(values) + int(np.argmin(np.isfinite(values))) + 1
        raise DvinvError(f'The loss of the {series} is not a finite number at update {wrong}: lower its learning_rate.')
    return float(values.mean())
