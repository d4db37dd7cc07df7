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
    field = 'teacher.factory'
    return built(field, name, num_classes() if 'num_classes' in _parameters(field, name) else None)


def of_student(name: str, num_classes: int):
    """Returns the network from the function `name` of `student.factory`, as returned by `trainable`.

    Raises:
      DvinvError: see `of_teacher`.
    """
    network = built('student.factory', name, num_classes)
    if isinstance(network, Teacher):
        raise DvinvError(
            f'student.factory {name!r} returned a dvinv.Teacher; return the Flax module itself, which is trained here.'
        )
    return network


def built(field: str, name: str, num_classes: int | None = None):
    """Calls the function `name`, 'module:function', and returns its Teacher unchanged, or its network as `trainable`.

    Args:
      field: the config field that names the function.
      num_classes: the value of the function's argument of this name, if it has one; None: it is not known.
    """
    _parameters(field, name)
    return network_of(_imported(field, name), num_classes, f'{field} {name!r}')


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
        function, takes = source, _arguments(source)
        if 'num_classes' in takes and num_classes is None:
            raise DvinvError(
                f"{name} takes num_classes, which the data tell, but data.name is ''; name a data set, or return a network "
                'of so many classes without the argument.'
            )
        given = {'num_classes': num_classes} if 'num_classes' in takes else {}
        if 'rngs' in takes:
            from flax import nnx  # imported only when needed, as in modules.py

            make = functools.partial(function, **given)
            source = make(rngs=nnx.Rngs(0))
        else:
            source = function(**given)
    if isinstance(source, Teacher):
        return source
    network = trainable(source, make=make and (lambda rngs: make(rngs=rngs)))
    if network is None:
        raise DvinvError(
            f'{name} returned a {type(source).__name__}; it must return a dvinv.Teacher, as dvinv.from_linen and '
            'dvinv.from_nnx make, or a Flax module, Linen or NNX, that is to be trained here.'
        )
    return network


def _makes(source) -> bool:
    """Returns whether `source` must be called to build a network."""
    return inspect.isfunction(source) or inspect.isclass(source) or isinstance(source, functools.partial)


def _arguments(source) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function, or of the `__init__` of a class; NNX hides the signature of the class itself."""
    parameters = dict(inspect.signature(source.__init__ if inspect.isclass(source) else source).parameters)
    if inspect.isclass(source):
        del parameters[next(iter(parameters))]  # self
    return parameters


def _parameters(field: str, name: str) -> tuple[str, ...]:
    """Returns the names of a function's parameters.

    Raises:
      DvinvError: it has required parameters other than `num_classes` and `rngs`.
    """
    source = _imported(field, name)
    parameters = _arguments(source) if _makes(source) else {}
    for parameter in parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and parameter.name not in ('num_classes', 'rngs'):
            raise DvinvError(
                f'{field} {name!r} takes the argument {parameter.name!r}; it is given num_classes, and rngs for an NNX '
                'model, where it takes them, and nothing else.'
            )
    return tuple(parameters)


def _imported(field: str, name: str) -> Callable:
    module, _, function = name.partition(':')
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DvinvError(
            f"{field} is {name!r}, which cannot be imported ({error}); it must be 'module:function' on the Python path."
        ) from error
