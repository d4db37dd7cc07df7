"""Stage 'peak' of gpu.py: versions, and what the GPU reaches at most: matrix products, and copies within its memory."""

import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
from contestants import Worker, cores, set_up_jax
from gpu_report import Item
from torch_contestant import on_device, synchronize

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'torch', 'triton', 'ml_collections')
LIBRARIES = ('nvidia-cudnn-cu13', 'nvidia-cublas')  # that both frameworks load
# float32: as in the other stages, JAX's default and PyTorch's 'high'; either may compute in TF32.
MATMULS = ('bfloat16', 'float32', 'float32_highest')
NO_TORCH = 'PyTorch is not installed here'
NO_GPU = 'no GPU: a rehearsal'
TF32_ERROR = 1e-5  # float32 stays below it, TF32 is near 3e-4
REPEATS, TIMES = 5, 20  # measurements, the median of them counts; operations in each


def items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns what the stage measures."""
    versions = {
        'gpu': None,
        'driver': None,
        'gpu_memory_mib': None,
        'cpu_cores': None,
        'python': None,
        'packages': dict.fromkeys((*PACKAGES, *LIBRARIES)),
    }
    peak = {
        'matrix_rows': None,
        'matmul_tflops': dict.fromkeys(MATMULS),
        'copy_gb_per_second': None,  # bytes read and written
        'float32_error': None,  # ||out - ref|| / ||ref|| of a product in 'float32'
        'float32_uses_tf32': None,  # by that error
    }
    return {'versions': Item(1, 1, versions), 'jax': Item(1, 10, peak), 'torch': Item(1, 10, peak)}


def measure(names: list[str], context) -> None:
    """Measures these items."""
    context.in_order(names, lambda name: _versions(context) if name == 'versions' else _peak(name, context))


def _versions(context) -> None:
    record, excuse = context.report.record, context.report.excuse
    record('versions', {'python': platform.python_version(), 'cpu_cores': cores()})
    for package in (*PACKAGES, *LIBRARIES):
        try:
            record('versions', {package: importlib.metadata.version(package)}, 'packages')
        except importlib.metadata.PackageNotFoundError:
            excuse('versions', 'not installed here', f'packages.{package}')
    if context.settings.rehearse:
        for field in ('gpu', 'driver', 'gpu_memory_mib'):
            excuse('versions', NO_GPU, field)
        return
    command = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader,nounits']
    name, driver, memory = subprocess.check_output(command, text=True).splitlines()[0].split(', ')
    record('versions', {'gpu': name, 'driver': driver, 'gpu_memory_mib': int(memory)})


def _peak(name: str, context) -> None:
    settings, report = context.settings, context.report
    if name == 'torch' and importlib.util.find_spec('torch') is None:
        report.excuse(name, NO_TORCH)
        return
    rows, megabytes = (256, 4) if settings.rehearse else (8192, 2048)
    worker = Worker(name, {'jax': JaxPeak, 'torch': TorchPeak}[name], settings.platform)
    report.record(name, {'matrix_rows': rows})
    for dtype in MATMULS:
        seconds = worker.ask('multiply', rows, dtype, within=context.remaining())
        report.record(name, {dtype: 2 * rows**3 / seconds / 1e12}, 'matmul_tflops')
    error = worker.ask('error', within=context.remaining())
    report.record(name, {'float32_error': error, 'float32_uses_tf32': error > TF32_ERROR})
    seconds = worker.ask('copy', megabytes, within=context.remaining())
    report.record(name, {'copy_gb_per_second': 2 * megabytes * 2**20 / seconds / 1e9})
    worker.kill()


class JaxPeak:
    """Matrix products and copies in JAX."""

    def __init__(self, platform: str):
        """Takes 'cpu' or 'gpu'."""
        set_up_jax(1, platform)

    def multiply(self, rows: int, kind: str) -> float:
        """Returns seconds of a product of two matrices of random normal numbers; `kind` is one of MATMULS."""
        product, a, b = self._product(rows, kind)

        def run():
            for _ in range(TIMES):
                result = product(a, b)
            result.block_until_ready()

        return _median_seconds(run)

    def error(self) -> float:
        """Returns the relative error of a small product in 'float32'."""
        product, a, b = self._product(512, 'float32')
        return _error(np.asarray(product(a, b)))

    def _product(self, rows: int, kind: str):
        import jax
        import jax.numpy as jnp

        dtype, _, precision = kind.partition('_')
        a, b = (jnp.asarray(matrix, dtype) for matrix in _random(rows))
        return jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision or None)), a, b

    def copy(self, megabytes: int) -> float:
        """Returns seconds in which an array of this size is read and another one written."""
        import jax
        import jax.numpy as jnp

        x = jnp.arange(megabytes * 2**18, dtype=jnp.float32)
        add = jax.jit(lambda x: x + 1)

        def run():
            for _ in range(TIMES):
                result = add(x)
            result.block_until_ready()

        return _median_seconds(run)


class TorchPeak:
    """Matrix products and copies in PyTorch."""

    def __init__(self, platform: str):
        """Takes 'cpu' or 'gpu'."""
        import torch

        self._device = torch.device(on_device(platform))

    def multiply(self, rows: int, kind: str) -> float:
        """Returns seconds of a product of two matrices of random normal numbers; `kind` is one of MATMULS."""
        import torch

        a, b = self._matrices(rows, kind)
        result = a @ b

        def run():
            for _ in range(TIMES):
                torch.matmul(a, b, out=result)
            synchronize(self._device)

        return _median_seconds(run)

    def error(self) -> float:
        """Returns the relative error of a small product in 'float32'."""
        a, b = self._matrices(512, 'float32')
        return _error((a @ b).cpu().numpy())

    def _matrices(self, rows: int, kind: str):
        import torch

        dtype, _, precision = kind.partition('_')
        torch.set_float32_matmul_precision(precision or 'high')
        return [torch.from_numpy(matrix).to(self._device, getattr(torch, dtype)) for matrix in _random(rows)]

    def copy(self, megabytes: int) -> float:
        """Returns seconds in which an array of this size is read and another one written."""
        import torch

        x = torch.arange(megabytes * 2**18, dtype=torch.float32, device=self._device)
        y = torch.empty_like(x)

        def run():
            for _ in range(TIMES):
                y.copy_(x)
            synchronize(self._device)

        return _median_seconds(run)


def _error(product: np.ndarray) -> float:
    """Returns ||out - ref|| / ||ref|| of a product of the two matrices of `_random`."""
    a, b = _random(len(product)).astype(np.float64)
    return float(np.linalg.norm(product - a @ b) / np.linalg.norm(a @ b))


def _random(rows: int) -> np.ndarray:
    """Returns two square matrices, float32 [2, rows, rows]."""
    return np.random.default_rng(0).standard_normal((2, rows, rows), dtype=np.float32)


def _median_seconds(run: Callable[[], None]) -> float:
    """Returns the median seconds of one of the TIMES operations of `run`, after a first call that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        run()
        seconds.append((time.perf_counter() - begin) / TIMES)
    return statistics.median(seconds[1:])
