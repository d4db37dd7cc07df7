"""How frozen networks are run while images are made: in the backend's favourite form, in bfloat16, in little memory.

None of it changes what is computed, only how: the networks stay as their authors wrote them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from dvinv.config import InversionConfig
from dvinv.graph.rewriting import recomputed
from dvinv.inversion.teacher import Teacher
from dvinv.networks.classifier import Classifier, cast_floats
from dvinv.networks.suited import suited_to


def executed(teacher: Teacher, student_fn: Callable | None, config: InversionConfig, platform: str):
    """(teacher, student_fn) whose forward passes are run as `config` asks and `platform` ('cpu', 'gpu', 'tpu') likes."""

    def run(fn: Callable) -> Callable:
        fn = suited_to(platform, fn)
        if config.recompute:
            fn = recomputed(fn, config.recompute)
        return in_bfloat16(fn) if config.precision == 'bfloat16' else fn

    def tap(variables, x, axis: str | None = None, **capture):
        return run(functools.partial(teacher.tap, axis=axis, **capture))(variables, x)

    return dataclasses.replace(teacher, tap=tap), student_fn and run(student_fn)


def in_precision(network: Classifier, precision: str) -> Classifier:
    """Returns `network`, a Classifier or Teacher, with its answers and features computed in `precision`."""
    if precision == 'float32':
        return network
    fields = {'apply_fn', 'features'} & {field.name for field in dataclasses.fields(network)}
    return dataclasses.replace(network, **{name: in_bfloat16(getattr(network, name)) for name in fields})


def in_bfloat16(fn: Callable) -> Callable:
    """`fn(variables, x)` with images and trained weights in bfloat16.

    Running statistics stay float32, and so do the moments that are set against them: the tap takes its sums in float32.
    """

    def run(variables, x):
        params = cast_floats(variables['params'], jnp.bfloat16)
        return fn({**variables, 'params': params}, x.astype(jnp.bfloat16))

    return run
