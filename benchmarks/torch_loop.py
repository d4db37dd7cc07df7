"""The inversion step in plain PyTorch, written from the method's formulae alone: what dvinv's step is measured against.

Two versions. Eager: as the authors' loop is described, weights that want gradients they never use, images channels-first.
Frozen: the strongest plain one, frozen weights, images channels-last, both moments in one pass, a fused Adam.
"""

import math
import random

import numpy as np
import torch
from torch import nn
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

# The settings of a dvinv.InversionConfig and of its stage that this loop knows one value of.
ONLY = {'total_variation': 'l2', 'canvas': 'pixels', 'prior_on': 'view'}
ONLY_OF_STAGE = {'augmentation': 'roll', 'resolution': 0, 'noise': 0}


class TorchLoop:
    """One batch of images, optimised step by step."""

    def __init__(self, network: nn.Module, images: np.ndarray, labels: np.ndarray, mean, std, settings, frozen: bool):
        """Takes over `network`, and puts it in eval mode.

        Args:
          images: [B, H, W, C] float32, normalised; `labels`: int [B].
          mean, std: [C], for pixels in [0, 1].
          settings: a dvinv.InversionConfig of one stage, or whatever has its fields.
          frozen: see above.
        """
        (self._stage,) = settings.stages
        for group, known in ((settings, ONLY), (self._stage, ONLY_OF_STAGE)):
            if others := {name: getattr(group, name) for name, value in known.items() if getattr(group, name) != value}:
                raise ValueError(f'the loop in PyTorch does not know {others}')
        layout = torch.channels_last if frozen else torch.contiguous_format
        self._network = network.eval().requires_grad_(not frozen).to(memory_format=layout)
        self._settings, self._frozen = settings, frozen
        self.canvas = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout).requires_grad_()
        self._labels = torch.tensor(labels, dtype=torch.long)
        low, high = ((bound - np.asarray(mean)) / np.asarray(std) for bound in (0, 1))
        self._low, self._high = (torch.tensor(a, dtype=torch.float32).reshape(-1, 1, 1) for a in (low, high))
        betas = self._stage.beta1, self._stage.beta2
        self._optimiser = torch.optim.Adam([self.canvas], self._stage.learning_rate, betas, fused=frozen)
        self._iteration, self._features, self._random = 0, [], random.Random(0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._listen)

    def _listen(self, norm: nn.BatchNorm2d, inputs: tuple, _) -> None:
        """||mean(x) - E[mean]||_2 + ||var(x) - E[var]||_2 of the input x [B, C, H, W], biased, in the order of the calls."""
        (x,) = inputs
        if self._frozen:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        else:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        self._features.append(vector_norm(mean - norm.running_mean) + vector_norm(variance - norm.running_var))

    def step(self, offset: tuple[int, int] | None = None, mirrored: bool | None = None) -> dict[str, torch.Tensor]:
        """One update; the loss and its unweighted terms before it. The gradient stays in `canvas.grad`.

        The view is rolled by `offset` and `mirrored`, or as chance has it where these are None.
        """
        stage = self._stage
        if offset is None:
            offset = tuple(self._random.randint(-stage.jitter, stage.jitter) for _ in range(2))
        if mirrored is None:
            mirrored = stage.flip and self._random.random() < 0.5
        self._optimiser.zero_grad()
        self._network.zero_grad()
        terms = self._terms(offset, mirrored)
        terms['loss'].backward()
        self._optimiser.param_groups[0]['lr'] = rate(stage, self._iteration)
        self._optimiser.step()
        if stage.clip:
            with torch.no_grad():
                self.canvas.clamp_(self._low, self._high)
        self._iteration += 1
        return terms

    def _terms(self, offset: tuple[int, int], mirrored: bool) -> dict[str, torch.Tensor]:
        shown = torch.roll(self.canvas, offset, (2, 3))
        if mirrored:
            shown = shown.flip(3)
        self._features.clear()
        logits = self._network(shown)
        weights = self._settings.weights
        differences = (
            shown[:, :, :, 1:] - shown[:, :, :, :-1],
            shown[:, :, 1:] - shown[:, :, :-1],
            shown[:, :, 1:, 1:] - shown[:, :, :-1, :-1],
            shown[:, :, 1:, :-1] - shown[:, :, :-1, 1:],
        )
        terms = {
            'cross_entropy': cross_entropy(logits, self._labels),
            'feature': weights.first_bn_multiplier * self._features[0] + sum(self._features[1:]),
            'total_variation': sum(map(norm, differences)),
            'l2': norm(shown) if self._settings.l2 == 'batch' else norm(shown, (1, 2, 3)).mean(),
        }
        factors = {
            'cross_entropy': weights.main,
            **{name: getattr(weights, name) for name in terms if name != 'cross_entropy'},
        }
        return terms | {'loss': sum(factor * terms[name] for name, factor in factors.items() if factor)}


def norm(x: torch.Tensor, dim: tuple[int, ...] | None = None) -> torch.Tensor:
    """||x||_2, as fast as `vector_norm`, whose sum of ten million squares comes out 3e-4 too small."""
    return (x * x).sum(dim).sqrt()


def rate(stage, iteration: int) -> float:
    """The learning rate of an update: a linear warm-up, then constant or a cosine to 0."""
    if iteration < stage.warmup:
        return stage.learning_rate * iteration / stage.warmup
    if stage.schedule == 'constant':
        return stage.learning_rate
    part = min(1.0, (iteration - stage.warmup) / (stage.iterations - stage.warmup))
    return stage.learning_rate * (1 + math.cos(math.pi * part)) / 2
