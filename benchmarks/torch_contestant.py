"""The contestant of dvinv in PyTorch, and what PyTorch needs in a process of its own; see contestants.py."""

import json
import time
from types import SimpleNamespace
from typing import NamedTuple

from contestants import MEAN, STD, Task, best_of, cores, host_memory_mb, matrices

# No PyTorch here: a process imports it when it starts.


class Variant(NamedTuple):
    """How PyTorch runs a loop. The default is the eager loop in float32."""

    frozen: bool = False  # weights without gradients, images channels-last, fused optimizer
    autocast: bool = False  # the networks in bfloat16
    compiled: bool = False  # by torch.compile, with CUDA graphs where they can be captured


def on_device(platform: str) -> str:
    """Returns PyTorch's name of the device of a platform ('cpu' or 'gpu')."""
    return 'cuda' if platform == 'gpu' else 'cpu'


class Torch:
    """A loop in PyTorch, of the same network, images and settings."""

    def __init__(self, task: Task, about: dict, start: dict, variant: Variant):
        """Builds the loop; `about` and `start` are what dvinv's methods of these names return."""
        import torch
        import torch_networks
        from torch_loop import TorchLoop

        set_up_torch(task.platform)
        network = torch_networks.create(task.network, about['classes'], task.width)
        torch_networks.load(network, about['variables'])
        # With fields in place of keys, and without dvinv's classes: they would bring JAX into this process.
        settings = json.loads(json.dumps(about['settings']), object_hook=lambda fields: SimpleNamespace(**fields))
        self._device = torch.device(on_device(task.platform))
        network.to(self._device)
        self._loop = TorchLoop(network, start['images'], start['labels'], MEAN, STD, settings, variant)
        self._view = start['offset'], start['mirrored']

    def first(self) -> dict:
        """Takes the first step of dvinv; see there, `seconds` includes torch.compile's."""
        begin = time.perf_counter()
        terms = {name: value.item() for name, value in self._loop.step(*self._view).items()}
        return {
            'terms': terms,
            'gradient': self._loop.pixels.grad.cpu().numpy().transpose(0, 2, 3, 1).copy(),
            'seconds': time.perf_counter() - begin,
        }

    def run(self, steps: int) -> float:
        """Returns seconds a step."""
        synchronize(self._device)
        begin = time.perf_counter()
        for _ in range(steps):
            self._loop.step()
        synchronize(self._device)
        return (time.perf_counter() - begin) / steps

    def about(self) -> dict:
        """Returns PyTorch's version and how the network was compiled ('' where it was not)."""
        import torch

        return {'version': torch.__version__, 'compile_mode': self._loop.compile_mode}

    def peak_gflops(self) -> float:
        """Returns GFLOP/s of a product of matrices."""
        import torch

        a, b = (torch.from_numpy(matrix).to(self._device) for matrix in matrices())

        def multiply():
            a @ b
            synchronize(self._device)

        return best_of(multiply)

    def memory_mb(self) -> float:
        """Returns the peak memory of this process: the GPU's where one is used, else the host's."""
        return peak_memory_of_torch(self._device)


def set_up_torch(platform: str) -> None:
    """Lets PyTorch use all cores, TF32 in float32 products and convolutions, and the fastest convolution algorithms."""
    import torch

    torch.set_num_threads(cores())
    if platform == 'gpu':
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def synchronize(device) -> None:
    """Waits until a device (a torch.device) has done what was asked of it."""
    import torch

    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def peak_memory_of_torch(device) -> float:
    """Returns MiB: the most that PyTorch used of the GPU's memory, or this process of the host's."""
    import torch

    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == 'cuda' else host_memory_mb()
