"""Inception-v3 in plain PyTorch, with torchvision's names; see torch_networks.py."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import relu


class Convolution(nn.Module):
    """Without bias, then BatchNorm with epsilon .001 and ReLU; margins of half the kernel where the stride is 1."""

    def __init__(self, inputs: int, outputs: int, size=1, stride: int = 1, margins=None):
        super().__init__()
        size = (size, size) if isinstance(size, int) else size
        if margins is None:
            margins = tuple(length // 2 for length in size) if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, size, stride, margins, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side.

    Args:
      inputs: channels.
      branches: {name: [(outputs, size, stride), ...]}, or [(outputs, size, stride), ..., [ends side by side]]. Layers of one
        are numbered from 1, where it has several; the ends are lettered.
      pool: what goes through the branch 'branch_pool', or by itself where there is none.
    """

    def __init__(self, inputs: int, branches: dict[str, list], pool: nn.Module):
        super().__init__()
        self.paths, self.pool, self.outputs = [], pool, 0 if 'branch_pool' in branches else inputs
        for name, steps in branches.items():
            path, before = [], inputs
            for number, step in enumerate(steps, 1):
                label = f'{name}_{number}' if len(steps) > 1 else name
                ends = step if isinstance(step, list) else [step]
                labels = [label + letter for letter in 'ab'] if isinstance(step, list) else [label]
                for own, (outputs, *rest) in zip(labels, ends, strict=True):
                    self.add_module(own, Convolution(before, outputs, *rest))
                path.append(labels)
                before = sum(outputs for outputs, *_ in ends)
            self.paths.append((name, path))
            self.outputs += before

    def forward(self, x):
        joined = []
        for name, path in self.paths:
            y = self.pool(x) if name == 'branch_pool' else x
            for labels in path:
                y = torch.cat([getattr(self, label)(y) for label in labels], 1)
            joined.append(y)
        if 'branch_pool' not in dict(self.paths):
            joined.append(self.pool(x))
        return torch.cat(joined, 1)


class InceptionV3(nn.Module):
    """torchvision's without its auxiliary head. `channels`: how many there are where it has 16."""

    def __init__(self, classes: int, channels: Sequence[int]):
        super().__init__()
        (unit,) = channels

        def c(count: int) -> int:
            return count * unit // 16

        mean, largest, row, column = nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 2), (1, 7), (7, 1)
        stem = {
            'Conv2d_1a_3x3': Convolution(3, c(32), 3, 2),
            'Conv2d_2a_3x3': Convolution(c(32), c(32), 3, margins=0),
            'Conv2d_2b_3x3': Convolution(c(32), c(64), 3),
            'maxpool1': largest,
            'Conv2d_3b_1x1': Convolution(c(64), c(80)),
            'Conv2d_4a_3x3': Convolution(c(80), c(192), 3, margins=0),
            'maxpool2': largest,
        }
        blocks = {}
        for name, pooled in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
            blocks[name] = {
                'branch1x1': [(64,)],
                'branch5x5': [(48,), (64, 5)],
                'branch3x3dbl': [(64,), (96, 3), (96, 3)],
                'branch_pool': [(pooled,)],
            }
        blocks['Mixed_6a'] = {'branch3x3': [(384, 3, 2)], 'branch3x3dbl': [(64,), (96, 3), (96, 3, 2)]}
        for name, inner in (('Mixed_6b', 128), ('Mixed_6c', 160), ('Mixed_6d', 160), ('Mixed_6e', 192)):
            blocks[name] = {
                'branch1x1': [(192,)],
                'branch7x7': [(inner,), (inner, row), (192, column)],
                'branch7x7dbl': [(inner,), (inner, column), (inner, row), (inner, column), (192, row)],
                'branch_pool': [(192,)],
            }
        blocks['Mixed_7a'] = {
            'branch3x3': [(192,), (320, 3, 2)],
            'branch7x7x3': [(192,), (192, row), (192, column), (192, 3, 2)],
        }
        ends = [(384, (1, 3)), (384, (3, 1))]
        for name in ('Mixed_7b', 'Mixed_7c'):
            blocks[name] = {
                'branch1x1': [(320,)],
                'branch3x3': [(384,), ends],
                'branch3x3dbl': [(448,), (384, 3), ends],
                'branch_pool': [(192,)],
            }
        before = c(192)
        self.order = [*stem, *blocks]
        for name, module in stem.items():
            self.add_module(name, module)
        for name, branches in blocks.items():
            scaled = {branch: [narrowed(step, c) for step in steps] for branch, steps in branches.items()}
            block = Mixed(before, scaled, mean if 'branch_pool' in branches else largest)
            before = block.outputs
            self.add_module(name, block)
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def narrowed(step, c: Callable[[int], int]):
    """A layer of a `Mixed`, or several, with channels as `c` says."""
    return [narrowed(end, c) for end in step] if isinstance(step, list) else (c(step[0]), *step[1:])
