"""The inversion step in plain PyTorch, written from the method's formulae alone: what dvinv's step is measured against.

Eager: as the authors' loop is described, weights that want gradients they never use, images channels-first. Frozen: weights
without gradients, images channels-last, both moments in one pass, a fused Adam. Either may run the network under autocast
(bfloat16) and, the strongest, by torch.compile.
"""

import contextlib
import math
import random

import numpy as np
import torch
from torch import nn
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

# The settings of a dvinv.InversionConfig and of its stage for which this loop knows a single value.
ONLY = {'total_variation': 'l2', 'parameterization': 'pixels', 'prior_on': 'view'}
ONLY_OF_STAGE = {'augmentation': 'roll', 'resolution': 0, 'noise': 0}


class TorchLoop:
    """One batch of images, optimised step by step.

    Attributes:
      pixels: [B, C, H, W] float32, the images; `pixels.grad` is the gradient of the last step.
      compile_mode: of torch.compile; '' where the network is not compiled.
    """

    def __init__(self, network: nn.Module, images: np.ndarray, labels: np.ndarray, mean, std, settings, variant):
        """Takes over `network`, which lies on the device to use, and puts it in eval mode.

        Args:
          images: [B, H, W, C] float32, normalised; `labels`: int [B].
          mean, std: [C], for pixels in [0, 1].
          settings: a dvinv.InversionConfig of one stage, or an object with its fields.
          variant: a torch_contestant.Variant.
        """
        (self._stage,) = settings.stages
        for group, known in ((settings, ONLY), (self._stage, ONLY_OF_STAGE)):
            if others := {name: getattr(group, name) for name, value in known.items() if getattr(group, name) != value}:
                raise ValueError(f'the loop in PyTorch does not know {others}')
        device = next(network.parameters()).device
        layout = torch.channels_last if variant.frozen else torch.contiguous_format
        self._network = network.eval().requires_grad_(not variant.frozen).to(memory_format=layout)
        self._settings, self._variant = settings, variant
        images = torch.tensor(images.transpose(0, 3, 1, 2), device=device)
        self.pixels = images.contiguous(memory_format=layout).requires_grad_()
        self._labels = torch.tensor(labels, dtype=torch.long, device=device)
        low, high = ((bound - np.asarray(mean)) / np.asarray(std) for bound in (0, 1))
        self._low, self._high = (torch.tensor(a, dtype=torch.float32, device=device).reshape(-1, 1, 1) for a in (low, high))
        betas = self._stage.beta1, self._stage.beta2
        self._optimizer = torch.optim.Adam([self.pixels], self._stage.learning_rate, betas, fused=variant.frozen)
        self._iteration, self._features, self._random = 0, [], random.Random(0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._listen)
        self.compile_mode, self._terms = '', self._eager_terms
        if variant.compiled:
            self._compile('reduce-overhead' if device.type == 'cuda' else 'default')

    def _compile(self, mode: str) -> None:
        self.compile_mode, self._terms = mode, torch.compile(self._eager_terms, mode=mode)

    def _listen(self, norm: nn.BatchNorm2d, inputs: tuple, _) -> None:
        """||mean(x) - E[mean]||_2 + ||var(x) - E[var]||_2 of the input x [B, C, H, W], biased, in the order of the calls."""
        (x,) = inputs
        if self._variant.compiled:
            x = x.float()  # fused into the sums; in eager mode it would be a copy
        if self._variant.frozen:
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        else:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        self._features.append(vector_norm(mean - norm.running_mean) + vector_norm(variance - norm.running_var))

    def step(self, offset: tuple[int, int] | None = None, mirrored: bool | None = None) -> dict[str, torch.Tensor]:
        """Takes one step; returns the loss and its unweighted terms before it.

        Args:
          offset: roll of the augmentation; None: drawn.
          mirrored: flip of the augmentation; None: drawn.
        """
        stage = self._stage
        if offset is None:
            offset = tuple(self._random.randint(-stage.jitter, stage.jitter) for _ in range(2))
        if mirrored is None:
            mirrored = stage.flip and self._random.random() < 0.5
        try:
            terms = self._gradient(offset, mirrored)
        except RuntimeError:
            if self.compile_mode in ('', 'default'):
                raise
            torch.compiler.reset()
            self._compile('default')  # without CUDA graphs
            terms = self._gradient(offset, mirrored)
        self._optimizer.param_groups[0]['lr'] = rate(stage, self._iteration)
        self._optimizer.step()
        if stage.clip:
            with torch.no_grad():
                self.pixels.clamp_(self._low, self._high)
        self._iteration += 1
        return terms

    def _gradient(self, offset: tuple[int, int], mirrored: bool) -> dict[str, torch.Tensor]:
        """Leaves the gradient in `pixels.grad`; returns the terms of the loss."""
        self._optimizer.zero_grad()
        self._network.zero_grad()
        if self.compile_mode == 'reduce-overhead':
            torch.compiler.cudagraph_mark_step_begin()
        view = torch.roll(self.pixels, offset, (2, 3))
        view = view.flip(3) if mirrored else view
        if self._variant.compiled:
            view = view.contiguous(memory_format=torch.channels_last)  # one layout, or it would be compiled again
        terms = self._terms(view)
        terms['loss'].backward()
        return terms

    def _eager_terms(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss and its unweighted terms for the augmented images [B, C, H, W]."""
        with autocast(view.device, self._variant.autocast):
            logits = self._network(view)
        weights = self._settings.weights
        differences = (
            view[:, :, :, 1:] - view[:, :, :, :-1],
            view[:, :, 1:] - view[:, :, :-1],
            view[:, :, 1:, 1:] - view[:, :, :-1, :-1],
            view[:, :, 1:, :-1] - view[:, :, :-1, 1:],
        )
        terms = {
            'cross_entropy': cross_entropy(logits.float(), self._labels),
            'feature': weights.first_bn_multiplier * self._features[0] + sum(self._features[1:]),
            'total_variation': sum(map(norm, differences)),
            'l2': norm(view) if self._settings.l2 == 'batch' else norm(view, (1, 2, 3)).mean(),
        }
        self._features.clear()  # torch.compile sees the list as empty at every call, and compiles once
        factors = {
            'cross_entropy': weights.main,
            **{name: getattr(weights, name) for name in terms if name != 'cross_entropy'},
        }
        return terms | {'loss': sum(factor * terms[name] for name, factor in factors.items() if factor)}


def autocast(device: torch.device, enabled: bool):
    """Returns a context that runs networks in bfloat16 where `enabled`."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


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
