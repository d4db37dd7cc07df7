"""Execution of frozen networks during an inversion: in a form that suits the backend, in bfloat16, or in little memory.

These transforms change how a network's function is computed, not the function itself; the user's network stays unmodified.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

from dvinv.config import InversionConfig
from dvinv.graph.rewriting import recomputed
from dvinv.inversion.teacher import Teacher
from dvinv.networks.classifier import Classifier, cast_floats
from dvinv.networks.suited import suited_to

Network = TypeVar('Network', bound=Classifier)


def executed(teacher: Teacher, student_fn: Callable | None, config: InversionConfig, platform: str):
    """Returns (teacher, student_fn) with forward passes run as set in `config` and in a form that suits the platform.

    Args:
      teacher: The network to invert.
      student_fn: (student_variables, x) -> logits, or None.
      config: The settings; `recompute` and `precision` are applied.
      platform: 'cpu', 'gpu' or 'tpu'.
    """

    def run(fn: Callable) -> Callable:
        fn = suited_to(platform, fn)
        if config.recompute:
            fn = recomputed(fn, config.recompute)
        return in_bfloat16(fn) if config.precision == 'bfloat16' else fn

    return dataclasses.replace(teacher, tap=teacher.tap.rewritten(run)), student_fn and run(student_fn)


def in_precision(network: Network, precision: str) -> Network:
    """Returns `network`, a Classifier or Teacher, with its logits and features computed in `precision`."""
    if precision == 'float32':
        return network
    fields: dict[str, Any] = {
        name: in_bfloat16(getattr(network, name)) for name in ('apply_fn', 'features') if hasattr(network, name)
    }
    return dataclasses.replace(network, **fields)


def in_bfloat16(fn: Callable) -> Callable:
    """Returns `fn(variables, x)` computed with images and trained weights in bfloat16.

    Running statistics stay float32, and so do the moments that are compared with them: the tap computes its sums in float32.
    """

    def run(variables, x):
        params = cast_floats(variables['params'], jnp.bfloat16)
        return fn({**variables, 'params': params}, x.astype(jnp.bfloat16))

    return run
