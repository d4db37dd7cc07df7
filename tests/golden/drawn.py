"""Weights and pixels that need not be stored: drawn from a seed, alike by the makers of golden files and by the tests."""

import re

import numpy as np


def draw_state(shapes: dict[str, list[int]], seed: int, gain: float = 2.0) -> dict[str, np.ndarray]:
    """A PyTorch state dict, float32: kernels of variance `gain` / inputs (2: He's), BatchNorm such as training leaves it."""
    rng = np.random.default_rng(seed)

    def draw(key: str, shape: list[int]) -> np.ndarray:
        if re.search('pos_emb|token|gamma|layer_scale', key):  # no kernels
            return 0.5 * rng.normal(size=shape)
        if len(shape) > 1:
            return rng.normal(size=shape) * np.sqrt(gain / np.prod(shape[1:]))
        if key.endswith(('running_var', 'weight')):
            return rng.uniform(0.5, 1.5, shape)
        return 0.3 * rng.normal(size=shape)

    return {key: draw(key, shapes[key]).astype(np.float32) for key in sorted(shapes)}


def draw_images(seed: int, size: int = 32) -> np.ndarray:
    """Normalised pictures [2, size, size, 3], float32."""
    return np.random.default_rng(seed).normal(size=(2, size, size, 3)).astype(np.float32)
