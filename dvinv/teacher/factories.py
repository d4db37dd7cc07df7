"""Networks built by a user's own function, which a config names as 'module:function'."""

import functools
import importlib
import inspect
from collections.abc import Callable

from dvinv.errors import DvinvError
from dvinv.inversion import Teacher
from dvinv.inversion.modules import trainable


def of_teacher(name: str, num_classes: Callable[[], int | None]):
    """Returns the result of the function `name` of `teacher.factory`: a Teacher, or an untrained network.

    Args:
      name: 'module:function'.
      num_classes: returns the number of classes of the real data, or None without real data; called only if the function
        takes `num_classes`.

    Raises:
      DvinvError: the function cannot be imported, takes other arguments, or returns something else.
    """
    source = _imported('teacher.factory', name)
    count = num_classes() if 'num_classes' in _arguments(source) else None
    return network_of(source, count, f'teacher.factory {name!r}')


def of_student(name: str, num_classes: int):
    """Returns the network from the function `name` of `student.factory`, as returned by `trainable`.

    Raises:
      DvinvError: see `of_teacher`.
    """
    network = network_of(_imported('student.factory', name), num_classes, f'student.factory {name!r}')
    if isinstance(network, Teacher):
        raise DvinvError(
            f'student.factory {name!r} returned a dvinv.Teacher; return the Flax module itself, which is trained here.'
        )
    return network


def network_of(source, num_classes: int | None, name: str):
    """Returns a Teacher unchanged, or the `trainable` network of a Flax module; calls a function or class that builds one.

    Args:
      source: a Teacher, a Flax module, or a function or class that returns one of them. It may take `num_classes`, and for
        an NNX model `rngs` (nnx.Rngs).
      num_classes: the value of that argument; None: it is not known.
      name: the name of `source` in error messages.

    Raises:
      DvinvError: `source` is, or returns, something else, or takes `num_classes` when it is not known.
    """
    make = None
    if _makes(source):
        parameters = _arguments(source)
        if 'num_classes' in parameters and num_classes is None:
            raise DvinvError(
                f"{name} takes num_classes, which is that of the data, but data.name is ''; name a data set, or return a "
                'network with a fixed number of classes.'
            )
        build = functools.partial(source, num_classes=num_classes) if 'num_classes' in parameters else source
        if 'rngs' in parameters:
            from flax import nnx  # imported only when needed, as in modules.py

            make, source = build, build(rngs=nnx.Rngs(0))
        else:
            source = build()
    if isinstance(source, Teacher):
        return source
    network = trainable(source, make=make and (lambda rngs: make(rngs=rngs)))
    if network is None:
        raise DvinvError(
            f'{name} returned a {type(source).__name__}; it must return a dvinv.Teacher, made by dvinv.from_linen or '
            'dvinv.from_nnx, or a Flax module, Linen or NNX, that is trained here.'
        )
    return network


def _makes(source) -> bool:
    """Returns whether `source` must be called to build a network."""
    return inspect.isfunction(source) or inspect.isclass(source) or isinstance(source, functools.partial)


def _arguments(source) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function, or of the `__init__` of a class; {} for a network that is built already."""
    if not _makes(source):
        return {}
    # NNX hides the signature of the class itself.
    parameters = dict(inspect.signature(source.__init__ if inspect.isclass(source) else source).parameters)
    if inspect.isclass(source):
        del parameters[next(iter(parameters))]  # self
    return parameters


def _imported(field: str, name: str):
    """Returns what `name`, 'module:function', denotes.

    Raises:
      DvinvError: it cannot be imported, or has required parameters other than `num_classes` and `rngs`.
    """
    module, _, function = name.partition(':')
    try:
        source = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DvinvError(
            f"{field} is {name!r}, which cannot be imported ({error}); it must be 'module:function' on the Python path."
        ) from error
    for parameter in _arguments(source).values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        required = parameter.default is parameter.empty and not variadic
        if required and parameter.name not in ('num_classes', 'rngs'):
            raise DvinvError(
                f'{field} {name!r} takes the argument {parameter.name!r}; the only arguments that it is given are '
                'num_classes, and rngs for an NNX model.'
            )
    return source
