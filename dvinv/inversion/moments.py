"""Recorded moments: what BatchNorm keeps for free, recorded once from some images, for networks of any layers.

The owner of a network runs about 100 of its training images through it, and keeps the mean and variance a channel, over
images and positions, of what chosen layers take or return. No image can be read off them. Put among the network's variables
(the collection `MOMENTS`), they are what synthesized images are drawn to, as to running statistics (Table 8 of arXiv
1912.08795: 90.52 with the moments of 100 images, 90.68 with BatchNorm's own).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import dvinv
from dvinv.errors import DvinvError
from dvinv.networks.classifier import MOMENTS
from dvinv.networks.files import load_network, network_bytes
from dvinv.runtime.files import write_atomic

KIND = 'recorded moments'  # stands in the file where others name their network


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of layers of one network.

    Attributes:
      layers: {place: (mean, variance)}, float32 [..., C] each. A place is the path of a layer, the input of which is meant,
        or with ':output' after it what it returns.
      digest: of the network, see `Classifier.digest`.
      images: how many images they are of.
      views: how often each was shown, augmented anew; 0: once, as it is.
      version: of dvinv.
    """

    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    digest: str
    images: int
    views: int = 0
    version: str = dvinv.__version__

    def save(self, path) -> None:
        """Writes a safetensors file: the moments, the digest of the network, and what was recorded. It holds no image."""
        about = {'network': KIND, 'layers': [*self.layers], 'teacher': self.digest, 'images': self.images}
        about |= {'views': self.views, 'version': self.version}
        write_atomic(Path(path), network_bytes(self.variables(), about))

    @staticmethod
    def load(path) -> 'Moments':
        """Reads what `save` wrote.

        Raises:
          DvinvError: the file is missing, damaged, or another one.
        """
        what = f'{path} holds no recorded moments'
        if not Path(path).is_file():
            raise DvinvError(f'{what}: there is no such file. python -m dvinv.moments writes one.')
        try:
            variables, about = load_network(Path(path))
        except DvinvError as error:
            raise DvinvError(f'{what} that can be read: {error}') from error
        if about.get('network') != KIND:
            raise DvinvError(f'{what}, but the weights of a network; python -m dvinv.moments writes such a file.')
        found = variables[MOMENTS]
        layers = {place: (found[place]['mean'], found[place]['var']) for place in about['layers']}
        return Moments(layers, about['teacher'], about['images'], about['views'], about['version'])

    def variables(self) -> dict:
        """{MOMENTS: {place: {'mean': ..., 'var': ...}}}, the collection that goes among the variables of the network."""
        return {MOMENTS: {place: {'mean': mean, 'var': variance} for place, (mean, variance) in self.layers.items()}}

    def validate(self, digest: str, source: str) -> None:
        """Validates that a network has the digest; `source` is what the sentence calls the moments.

        Raises:
          DvinvError: says how to record those of this network.
        """
        if self.digest != digest:
            raise DvinvError(
                f'{source} were recorded from another network: other weights, or other pixels (mean, std, image_shape). '
                'Record those of this one: dvinv.record_moments, or python -m dvinv.moments.'
            )


def moments_of(given) -> tuple[Moments, str]:
    """Returns the `Moments` that a user gave, itself or the path of its file, and what sentences call it.

    Raises:
      DvinvError: it is something else, or see `Moments.load`.
    """
    if isinstance(given, str | Path):
        return Moments.load(given), f'The moments in {given}'
    if not isinstance(given, Moments):
        raise DvinvError(
            f'moments is a {type(given).__name__}; give what dvinv.record_moments returns, or the path of its file.'
        )
    return given, 'These moments'
