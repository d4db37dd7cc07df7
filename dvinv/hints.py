"""Hints: a student's BatchNorm inputs are drawn to the teacher's, layer by layer (Romero et al., FitNets, arXiv 1412.6550).

Not in the DeepInversion paper, whose students see the teacher's answers alone. It fits, though: synthesized images give
the teacher's BatchNorm inputs the moments that real ones give them, and to learn a layer from what goes in and what comes
out takes few images, however odd they look. Only for layers that the two networks have in common.
"""

import jax
import jax.numpy as jnp

from dvinv.errors import DvinvError, listed
from dvinv.inversion import Teacher
from dvinv.inversion.tap import features_in_training
from dvinv.networks import shapes_of


def shared_layers(module, teacher: Teacher) -> tuple[str, ...]:
    """BatchNorm layers that student and teacher have under one path, called as often, with inputs of one shape.

    Raises:
      DvinvError: there is none.
    """
    images = jax.ShapeDtypeStruct((2, *teacher.image_shape), jnp.float32)
    _, theirs = jax.eval_shape(teacher.features, teacher.variables, images)

    def listen(variables, x):
        return features_in_training(module, variables, x, {'dropout': jax.random.key(0)})

    _, ours, _ = jax.eval_shape(listen, shapes_of(module, teacher.image_shape), images)
    shapes = {layer: [x.shape for x in calls] for layer, calls in ours.items()}
    shared = tuple(layer for layer, calls in theirs.items() if [x.shape for x in calls] == shapes.get(layer))
    if not shared:
        raise DvinvError(
            'distillation.hint is above 0, but no BatchNorm layer of the student has the path and the input shape of one of '
            f"the teacher's ({listed([*theirs], 3)}); name a student of the same family and width, or set "
            'distillation.hint=0.'
        )
    return shared


def hint_loss(features: dict, teacher_features: dict) -> jax.Array:
    """Mean over layers and calls of the relative squared error E[(x_student - x_teacher)^2] / E[x_teacher^2], float32.

    Relative to what the teacher's layer is given for these very images; one that is given zeros counts nothing.

    Args:
      features, teacher_features: {layer: BatchNorm inputs, one a call}; those of the student may be of more layers.
    """
    terms = []
    for layer, calls in teacher_features.items():
        for ours, theirs in zip(features[layer], calls, strict=True):
            ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
            power = jnp.square(theirs).mean()
            terms.append(jnp.square(ours - theirs).mean() / jnp.where(power > 0, power, jnp.inf))
    return jnp.stack(terms).mean()
