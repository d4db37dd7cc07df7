"""The importance of each channel group of a network.

First-order Taylor (arXiv 1912.08795, section 4.3; Molchanov et al., arXiv 1906.10771): imagine a gate, 1 when open, after
each channel of every BatchNorm. Closing the gates of group u changes the loss L by about -sum dL/dg, and over batches

    importance(u) = E[(sum over the gates g of u of dL/dg)^2]

A gate multiplies scale and bias, so dL/dg = scale dL/dscale + bias dL/dbias, and no actual gate is needed. Groups without a
BatchNorm have their gates after the layers that produce them, where they multiply kernel and bias instead. Magnitude and
random importance are controls.
"""

from collections.abc import Iterable

import flax.linen as nn
import jax
import numpy as np
import optax

from dvinv.evaluation.divergence import divergence
from dvinv.inversion import Teacher
from dvinv.inversion.statistics import running_statistics
from dvinv.networks.arrays import Pixels
from dvinv.networks.channels.cost import PerGroup
from dvinv.networks.channels.groups import FIXED, ChannelGroups
from dvinv.networks.classifier import flatten


class Importance:
    """Importance of the groups of one network, by any method.

    All methods take the variables of the unpruned network, with zeros in place of removed groups. Their shapes never change,
    so one compiled program serves all steps of pruning.
    """

    def __init__(self, module: nn.Module, teacher: Teacher, channels: ChannelGroups):
        """Prepares the functions without compiling them.

        Args:
          module: the unpruned network; takes x and `train`.
          teacher: the network that the pruned one is compared with in the loss.
          channels: the channel groups of the network.
        """
        self._module, self._teacher = module, teacher
        self._gates, self._count = _gates(channels), channels.count
        self._products = jax.jit(self._gate_products, static_argnames='equal')

    def taylor(self, variables: dict, batches: Iterable[np.ndarray], equal: bool) -> PerGroup:
        """Computes the first-order Taylor importance, float64 [groups].

        Args:
          variables: the variables of the network, with zeros in place of removed groups.
          batches: images uint8 [B, H, W, C].
          equal: whether the network still equals the teacher. KL(teacher || network) and its gradient are zero then and
            carry no information, so the loss is the cross-entropy to the class that the teacher predicts. For images that it
            classifies with confidence, this is their own class.
        """
        total, count = np.zeros(self._count), 0
        for images in batches:
            products = self._products(variables, self._teacher.variables, images, equal=equal)
            total += np.square(self._summed(products))
            count += 1
        return total / count

    def magnitude(self, variables: dict) -> PerGroup:
        """Computes the root mean square of the weights that the gates multiply, float64 [groups]."""
        weights = {path: _by_channel(leaf) for path, leaf in flatten(variables).items() if path in self._gates}
        squares = self._summed({path: np.square(leaf).sum(0) for path, leaf in weights.items()})
        numbers = self._summed({path: np.full(leaf.shape[-1], len(leaf)) for path, leaf in weights.items()})
        return np.sqrt(squares / numbers)

    def random(self, seed: int | tuple[int, ...]) -> PerGroup:
        """Draws uniform random importance, float64 [groups]."""
        return np.random.default_rng(seed).random(self._count)

    def _gate_products(self, variables, teacher_variables, images: Pixels, equal: bool) -> dict:
        """Computes {path of a variable: its part of dL/dg for the gates along its last axis}."""
        x = self._teacher.normalise(images)
        teacher_logits = self._teacher.apply_fn(teacher_variables, x)

        def loss(params):
            logits = self._module.apply({**variables, 'params': params}, x, train=False)
            if equal:
                return optax.softmax_cross_entropy_with_integer_labels(logits, teacher_logits.argmax(-1)).mean()
            return divergence(teacher_logits, logits)

        gradient = flatten({'params': jax.grad(loss)(variables['params'])})
        return {
            path: _by_channel(gradient[path] * leaf).sum(0)
            for path, leaf in flatten(variables).items()
            if path in self._gates
        }

    def _summed(self, values: dict) -> PerGroup:
        """Sums values over the gates of each group, float64 [groups].

        Args:
          values: {path of a variable: one value per gate along its last axis}.
        """
        sums = np.zeros(self._count + 1)
        for path, groups in self._gates.items():
            np.add.at(sums, groups, np.asarray(values[path], np.float64))
        return sums[:-1]  # the last entry collects values of FIXED gates, which belong to no group


def _by_channel(leaf):
    """Returns an array with all axes but the last merged, [n, C]."""
    return leaf.reshape(-1, leaf.shape[-1])


def _gates(channels: ChannelGroups) -> dict[str, np.ndarray]:
    """Returns {path of a variable that gates multiply: the group of each gate along its last axis, or FIXED}."""
    normed = running_statistics(channels.shapes)
    outputs = {path: axes[-1] for path, axes in channels.axes.items() if path.startswith('params/') and axes[-1] is not None}
    behind_norms = {path for path in outputs if path.removeprefix('params/').rpartition('/')[0] in normed}
    covered = np.zeros(channels.count + 1, bool)
    for path in behind_norms:
        covered[outputs[path]] = True
    covered[FIXED] = True
    return {
        path: groups if path in behind_norms else np.where(covered[groups], FIXED, groups)
        for path, groups in outputs.items()
    }
