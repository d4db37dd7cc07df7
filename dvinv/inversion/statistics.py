"""The statistics of a network's layers: the running statistics among its variables, or recorded moments in their place.

Any layer that owns running statistics (`batch_stats/mean` and `batch_stats/var`, or variables with similar names, such as
`running_mean` and `running_var`, in any collection) counts as a BatchNorm, whatever its class. If moments were recorded (the
collection `MOMENTS` of the variables), they replace all running statistics.

For recorded moments, the owner of a network runs about 100 of its training images through it, and keeps the mean and
variance per channel, over images and positions, of the inputs or outputs of chosen layers. No image can be read off them.
Once they are among its variables, synthesized images are optimized to match them, as they would match running statistics
(Table 8 of arXiv 1912.08795: 90.52 with the moments of 100 images, 90.68 with BatchNorm's own).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

import dvinv
from dvinv.networks.classifier import MOMENTS, join_names
from dvinv.networks.files import load_network, network_bytes
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import write_atomic

PRIVATE = 'dvinv_tap'  # the collection into which the tap sows values
STATISTICS = 'batch_stats'  # Flax's collection of running statistics
VariablePath = tuple[str, ...]  # of a variable: (collection, names of modules, name of the variable)

# Words by which the names of a running mean and a running variance differ, and a pattern that matches either name.
STATISTIC_WORDS = ('mean', 'var'), ('mean', 'variance'), ('Mean', 'Var'), ('Mean', 'Variance')
STATISTIC = re.compile(r'(?:^|[\W\d_])(?:mean|var|variance)(?:$|[\W\d_])|Mean|Var(?:iance)?$')
MOMENTS_KIND = 'recorded moments'  # stored in the field of the file in which other files name their network


def find_statistics(variables: Mapping) -> dict[str, tuple[VariablePath, VariablePath]]:
    """Finds the running mean and variance of every layer that has them.

    A mean and a variance belong together if they are variables of one module, have the same shape, and their names differ
    only by the words in `STATISTIC_WORDS`. If a module has several pairs, the pair with Flax's own collection and names is
    taken, or else the first one. Outside of Flax's collection, a module that contains other modules does not count as a
    normalization layer: it may be the network itself, with the mean and variance of pixels. If there are recorded moments,
    only these are returned.

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
        for mean, variance in STATISTIC_WORDS:
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


@dataclasses.dataclass(frozen=True)
class Moments:
    """The recorded moments of layers of one network.

    Attributes:
      layers: {place: (mean, variance)}, float32 [..., C] each, arrays or, for planning, shapes. A place is the path of a
        layer, which denotes the layer's input, or the path followed by ':output', which denotes its output.
      digest: The digest of the network, see `Classifier.digest`.
      images: The number of images from which they were recorded.
      views: The number of augmented views of each image; 0 if each was used once, without augmentation.
      version: The version of dvinv.
    """

    layers: Mapping[str, tuple[Any, Any]]
    digest: str
    images: int
    views: int = 0
    version: str = dvinv.__version__

    def save(self, path) -> None:
        """Writes a safetensors file with the moments, the digest of the network and the other attributes, but no image."""
        about = {'network': MOMENTS_KIND, 'layers': [*self.layers], 'teacher': self.digest, 'images': self.images}
        about |= {'views': self.views, 'version': self.version}
        write_atomic(Path(path), network_bytes(self.variables(), about))

    @staticmethod
    def load(path) -> 'Moments':
        """Reads a file that `save` wrote.

        Raises:
          DvinvError: The file is missing, damaged, or of another kind.
        """
        what = f'{path} holds no recorded moments'
        if not Path(path).is_file():
            raise DvinvError(f'{what}: there is no such file; the flag --record_moments writes one.')
        try:
            variables, about = load_network(Path(path))
        except DvinvError as error:
            raise DvinvError(f'{what} that can be read: {error}') from error
        if about.get('network') != MOMENTS_KIND:
            raise DvinvError(f'{what}, but the weights of a network; the flag --record_moments writes such a file.')
        found = variables[MOMENTS]
        layers = {place: (found[place]['mean'], found[place]['var']) for place in about['layers']}
        return Moments(layers, about['teacher'], about['images'], about['views'], about['version'])

    def variables(self) -> dict:
        """Returns {MOMENTS: {place: {'mean': ..., 'var': ...}}}, the collection to add to the variables of the network."""
        return {MOMENTS: {place: {'mean': mean, 'var': variance} for place, (mean, variance) in self.layers.items()}}

    def validate(self, digest: str, source: str) -> None:
        """Validates that the moments were recorded from the network with this digest.

        Args:
          digest: See `Classifier.digest`.
          source: The subject of the message, for instance 'These moments'.

        Raises:
          DvinvError: They were not. The message says how to record those of this network.
        """
        if self.digest != digest:
            raise DvinvError(
                f'{source} were recorded from another network: other weights, or other pixels (mean, std, image_shape). '
                'Record those of this one: dvinv.record_moments, or the flag --record_moments.'
            )


def moments_of(given) -> tuple[Moments, str]:
    """Returns the `Moments` that a user gave, as an object or as the path of its file, and its name in messages.

    Raises:
      DvinvError: It is neither, or `Moments.load` cannot read the file.
    """
    if isinstance(given, str | Path):
        return Moments.load(given), f'The moments in {given}'
    if not isinstance(given, Moments):
        raise DvinvError(
            f'moments is a {type(given).__name__}; give what dvinv.record_moments returns, or the path of its file.'
        )
    return given, 'These moments'
