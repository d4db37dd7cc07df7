"""How much a network would miss each group of its channels.

First-order Taylor (arXiv 1912.08795, section 4.3; Molchanov et al., arXiv 1906.10771): imagine a gate, 1 when open, behind
every BatchNorm. Closing those of group u changes the loss L by about -sum dL/dg, and over batches

    importance(u) = E[(sum over the gates g of u of dL/dg)^2]

A gate multiplies scale and bias, so dL/dg = scale dL/dscale + bias dL/dbias, and no gate is needed. Units without a
BatchNorm have theirs behind the layers that make them, in kernel and bias likewise. Magnitude and chance are controls.
"""

from collections.abc import Iterable

import flax.linen as nn
import jax
import numpy as np
import optax

from dvinv.evaluation.divergence import divergence
from dvinv.inversion import Teacher
from dvinv.inversion.tap import running_statistics
from dvinv.networks.channels.groups import FIXED, ChannelGroups
from dvinv.networks.classifier import flatten

METHODS = ('taylor', 'magnitude', 'random')


class Importance:
    """Of the groups of one network, by any method; variables are those of the whole, with zeros where groups are gone.

    Their shapes never change, so one program serves a whole pruning.
    """

    def __init__(self, module: nn.Module, teacher: Teacher, channels: ChannelGroups):
        """Compiles nothing yet.

        Args:
          module: the whole network; takes x and `train`.
          teacher: what it shall go on answering like.
        """
        self._module, self._teacher = module, teacher
        self._gates, self._count = _gates(channels), channels.count
        self._products = jax.jit(self._gate_products, static_argnames='equal')

    def taylor(self, variables: dict, batches: Iterable[np.ndarray], equal: bool) -> np.ndarray:
        """float64 [groups].

        Args:
          batches: images uint8 [B, H, W, C].
          equal: the network still is the teacher. KL(teacher || network) and its gradient are zero then and say nothing:
            the loss is the cross-entropy to the class that the teacher gives, which of sure images is their own.
        """
        total, count = np.zeros(self._count), 0
        for images in batches:
            total += np.square(self._summed(self._products(variables, self._teacher.variables, images, equal=equal)))
            count += 1
        return total / count

    def magnitude(self, variables: dict) -> np.ndarray:
        """Root of the mean square of what the gates multiply, float64 [groups]."""
        flat = flatten(variables)
        squares = self._summed({path: np.square(_rows(flat[path])).sum(0) for path in self._gates})
        numbers = self._summed({path: np.full(flat[path].shape[-1], len(_rows(flat[path]))) for path in self._gates})
        return np.sqrt(squares / numbers)

    def random(self, seed: int | tuple[int, ...]) -> np.ndarray:
        """float64 [groups]."""
        return np.random.default_rng(seed).random(self._count)

    def _gate_products(self, variables, teacher_variables, images, equal: bool) -> dict:
        """{path: dL/dg of the gates along a variable's last axis, as far as it goes through this variable}."""
        x = self._teacher.normalise(images)
        answers = self._teacher.apply_fn(teacher_variables, x)

        def loss(params):
            logits = self._module.apply({**variables, 'params': params}, x, train=False)
            if equal:
                return optax.softmax_cross_entropy_with_integer_labels(logits, answers.argmax(-1)).mean()
            return divergence(answers, logits)

        gradient = flatten({'params': jax.grad(loss)(variables['params'])})
        return {
            path: _rows(gradient[path] * leaf).sum(0) for path, leaf in flatten(variables).items() if path in self._gates
        }

    def _summed(self, values: dict) -> np.ndarray:
        """Sums over the gates of each group, from what belongs to the gates along variables' last axes."""
        sums = np.zeros(self._count + 1)
        for path, groups in self._gates.items():
            np.add.at(sums, groups, np.asarray(values[path], np.float64))
        return sums[:-1]  # the last gathers what is no group's


def _rows(leaf):
    return leaf.reshape(-1, leaf.shape[-1])


def _gates(channels: ChannelGroups) -> dict[str, np.ndarray]:
    """{the path of a variable that gates multiply: the group of each gate along its last axis, or FIXED}."""
    normed = running_statistics(channels.shapes)
    makes = {path: axes[-1] for path, axes in channels.axes.items() if path.startswith('params/') and axes[-1] is not None}
    behind_norms = {path for path in makes if path.removeprefix('params/').rpartition('/')[0] in normed}
    covered = np.zeros(channels.count + 1, bool)
    for path in behind_norms:
        covered[makes[path]] = True
    covered[FIXED] = True
    return {
        path: groups if path in behind_norms else np.where(covered[groups], FIXED, groups) for path, groups in makes.items()
    }
