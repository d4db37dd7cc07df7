"""One iteration of the inversion as a pure function from state to state, and many iterations in one dispatch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dvinv.config import InversionConfig, Stage
from dvinv.inversion.objective import make_objective
from dvinv.inversion.parameterization import make_decode, pixel_scale_of
from dvinv.inversion.teacher import Teacher
from dvinv.networks.arrays import Labels, Scalar


class InversionState(struct.PyTreeNode):
    """The state that changes while one batch is inverted.

    Attributes:
      parameters: The parameters from which the images are decoded, [B, H, W, C] float32, always at full resolution; see
        parameterization.py.
      opt_state: The state of the current stage's optimizer (Adam).
      iteration: int32 scalar, counted over all stages of the batch.
      key: The batch's random key. Iteration t draws from fold_in(key, t).
    """

    # Arrays, or what JAX puts in their places in trees of the same structure.
    parameters: Any
    opt_state: Any
    iteration: Any
    key: Any


def make_step(teacher: Teacher, config: InversionConfig, stage: Stage, student_fn=None, axis: str | None = None):
    """Returns the pure step `(state, labels, variables, student_variables) -> (state, metrics)`.

    The gradient is taken with respect to the parameters only. The metrics are the loss and its unweighted terms for the
    images *before* the update.
    """
    objective = make_objective(teacher, config, stage, student_fn, axis)
    optimizer = stage.make_optimizer()
    scale = pixel_scale_of(config.pixel_scale, teacher)
    low, high = (bound[None, None, None] for bound in scale.valid_range)  # [1, 1, 1, C]: JAX may refuse to promote ranks
    decode = make_decode(config.parameterization, config.contrast, teacher, scale)

    def step(
        state: InversionState, labels: Labels, variables, student_variables
    ) -> tuple[InversionState, dict[str, Scalar]]:
        def loss_fn(parameters):
            key = jax.random.fold_in(state.key, state.iteration)
            return objective(decode(parameters), labels, variables, student_variables, key)

        (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.parameters)
        updates, opt_state = optimizer.update(gradient, state.opt_state)
        parameters = optax.apply_updates(state.parameters, updates)
        if stage.clip and config.parameterization == 'pixels':
            parameters = jnp.clip(parameters, low, high)
        state = state.replace(parameters=parameters, opt_state=opt_state, iteration=state.iteration + 1)
        return state, {'loss': loss, **terms}

    return step


def make_chunk(step, iterations: int):
    """Returns a function that runs `iterations` steps in one dispatch and returns metrics [iterations]."""

    def chunk(state, labels, variables, student_variables):
        def body(state, _):
            return step(state, labels, variables, student_variables)

        if iterations == 1:
            state, metrics = body(state, None)
            return state, jax.tree.map(lambda value: value[None], metrics)
        return jax.lax.scan(body, state, length=iterations)

    return chunk
