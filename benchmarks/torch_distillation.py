"""The distillation step in plain PyTorch: what dvinv's train step of a student is measured against.

Teacher in eval mode, student in train mode, T^2 KL(teacher || student) at temperature T, SGD with Nesterov momentum, images
uint8 on the device, padded random crops and coins for mirroring. Eager, or the strongest: images channels-last, autocast,
fused optimizer, both networks and the loss by torch.compile.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, pad, softmax
from torch_loop import autocast


class TorchDistillation:
    """A student and its teacher.

    Attributes:
      compile_mode: of torch.compile; '' where the networks are not compiled.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, images: np.ndarray, mean, std, recipe, variant):
        """Takes over both networks, which lie on the device to use.

        Args:
          images: uint8 [N, H, W, C] to train on.
          mean, std: [C], for pixels in [0, 1].
          recipe: has batch_size, learning_rate, weight_decay, shift, flip and temperature.
          variant: a torch_contestant.Variant.
        """
        device = next(teacher.parameters()).device
        layout = torch.channels_last if variant.frozen else torch.contiguous_format
        self._teacher = teacher.eval().requires_grad_(False).to(memory_format=layout)
        self._student = student.train().to(memory_format=layout)
        self._recipe, self._variant, self._layout, self._device = recipe, variant, layout, device
        self._images = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device)
        self._mean, self._std = (torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in (mean, std))
        self._optimizer = torch.optim.SGD(
            student.parameters(),
            recipe.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            fused=variant.frozen,
        )
        self.compile_mode, self._loss = '', self._eager_loss
        if variant.compiled:
            self._compile('reduce-overhead' if device.type == 'cuda' else 'default')

    def _compile(self, mode: str) -> None:
        self.compile_mode, self._loss = mode, torch.compile(self._eager_loss, mode=mode)

    def step(self, x: np.ndarray | None = None) -> torch.Tensor:
        """Takes one step; returns the loss before it.

        Args:
          x: the augmented, normalised batch [B, H, W, C]; None: drawn.
        """
        batch = self._batch() if x is None else torch.from_numpy(x.transpose(0, 3, 1, 2)).to(self._device)
        batch = batch.contiguous(memory_format=self._layout)
        try:
            loss = self._gradient(batch)
        except RuntimeError:
            if self.compile_mode in ('', 'default'):
                raise
            torch.compiler.reset()
            self._compile('default')  # without CUDA graphs
            loss = self._gradient(batch)
        self._optimizer.step()
        return loss

    def _gradient(self, batch: torch.Tensor) -> torch.Tensor:
        self._optimizer.zero_grad()
        if self.compile_mode == 'reduce-overhead':
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._loss(batch)
        loss.backward()
        return loss.detach()

    def _eager_loss(self, batch: torch.Tensor) -> torch.Tensor:
        temperature = self._recipe.temperature
        with autocast(batch.device, self._variant.autocast):
            with torch.no_grad():
                targets = self._teacher(batch)
            logits = self._student(batch)
        targets, logits = targets.float() / temperature, logits.float() / temperature
        return temperature**2 * kl_div(log_softmax(logits, 1), softmax(targets, 1), reduction='batchmean')

    def _batch(self) -> torch.Tensor:
        """Returns drawn images [B, C, H, W], augmented and normalised."""
        size, shift = self._recipe.batch_size, self._recipe.shift
        images = self._images[torch.randint(len(self._images), (size,), device=self._device)]
        if shift:
            height, width = images.shape[2:]
            offsets = torch.randint(2 * shift + 1, (2, size, 1), device=self._device)
            rows, columns = (
                torch.arange(n, device=self._device) + at for n, at in zip((height, width), offsets, strict=True)
            )
            number = torch.arange(size, device=self._device)[:, None, None]
            padded = pad(images, (shift, shift, shift, shift))
            # Indexing arrays around a slice move the axis of the channels to the end.
            images = padded[number, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        x = (images.float() / 255 - self._mean) / self._std
        if self._recipe.flip:
            coins = torch.rand(size, 1, 1, 1, device=self._device) < 0.5
            x = torch.where(coins, x.flip(3), x)
        return x
