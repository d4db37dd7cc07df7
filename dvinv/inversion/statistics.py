"""The running statistics of a network's normalization layers: where they are among its variables, under whatever names.

Any layer that owns running statistics (`batch_stats/mean` and `batch_stats/var`, or variables with similar names, such as
`running_mean` and `running_var`, in any collection) counts as a BatchNorm, whatever its class. If moments were recorded (the
collection `MOMENTS` of the variables, see moments.py), they replace all running statistics.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from dvinv.networks.classifier import MOMENTS, join_names

PRIVATE = 'dvinv_tap'  # the collection into which the tap sows values
STATISTICS = 'batch_stats'  # Flax's collection of running statistics
VariablePath = tuple[str, ...]  # of a variable: (collection, names of modules, name of the variable)

# Words by which the names of a running mean and a running variance differ, and a pattern that matches either name.
NAMES = ('mean', 'var'), ('mean', 'variance'), ('Mean', 'Var'), ('Mean', 'Variance')
STATISTIC = re.compile(r'(?:^|[\W\d_])(?:mean|var|variance)(?:$|[\W\d_])|Mean|Var(?:iance)?$')


def find_statistics(variables: Mapping) -> dict[str, tuple[VariablePath, VariablePath]]:
    """Finds the running mean and variance of every layer that has them.

    A mean and a variance belong together if they are variables of one module, have the same shape, and their names differ
    only by the words in `NAMES`. If a module has several pairs, the pair with Flax's own collection and names is taken, or
    else the first one. Outside of Flax's collection, a module that contains other modules does not count as a normalization
    layer: it may be the network itself, with the mean and variance of pixels. If there are recorded moments, only these are
    returned.

    Returns:
      {layer: (path of its running mean, path of its running variance)}. Layers are module paths such as 'stage1/bn0'; the
      path of a variable is (collection, names of modules, name of the variable).
    """
    flat = non_intermediates(variables)
    found: dict[str, tuple[VariablePath, VariablePath]] = {}
    if recorded := [path[1] for path in flat if path[0] == MOMENTS and path[-1] == 'mean']:
        return {place: ((MOMENTS, place, 'mean'), (MOMENTS, place, 'var')) for place in recorded}
    outer = {path[1:end] for path in flat for end in range(1, len(path) - 1)}
    for path, leaf in sorted(flat.items(), key=lambda item: (item[0][0] != STATISTICS, item[0][-1] != 'mean')):
        for mean, variance in NAMES:
            partner = (*path[:-1], path[-1].replace(mean, variance))
            innermost = path[0] == STATISTICS or path[1:-1] not in outer
            if innermost and partner != path and partner in flat and np.shape(flat[partner]) == np.shape(leaf) != ():
                found.setdefault(join_names(path[1:-1]), (path, partner))
                break
    return found


def running_means(variables: Mapping) -> tuple[tuple[str, VariablePath], ...]:
    """Returns (layer, path of its running mean) of each layer, for `CaptureSpec`."""
    return tuple((layer, mean) for layer, (mean, _) in find_statistics(variables).items())


def unpaired_statistics(variables: Mapping) -> list[str]:
    """Returns the paths of variables that are named like running statistics but are in no pair of `find_statistics`.

    Constants of the network itself, outside of all its modules, are left out: they are the mean and variance of pixels.
    """
    paired = {path for pair in find_statistics(variables).values() for path in pair}
    return [
        join_names(path)
        for path in non_intermediates(variables)
        if path not in paired
        and path[0] not in ('params', MOMENTS)
        and STATISTIC.search(path[-1])
        and (path[0] == STATISTICS or len(path) > 2)
    ]


def non_intermediates(variables: Mapping) -> dict[VariablePath, Any]:
    """Returns {path: leaf} of all variables except intermediates, with those in `batch_stats` first."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(dict(variables)))
    kept = [item for item in flat.items() if item[0][0] not in ('intermediates', PRIVATE)]
    return dict(sorted(kept, key=lambda item: item[0][0] != STATISTICS))


def running_statistics(variables: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns {layer: (running mean, running variance)}, each [..., C], arrays or shapes; see `find_statistics`."""
    flat = non_intermediates(variables)
    return {layer: (flat[mean], flat[variance]) for layer, (mean, variance) in find_statistics(variables).items()}
