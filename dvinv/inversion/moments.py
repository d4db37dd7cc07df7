"""Recorded moments: statistics such as BatchNorm keeps, recorded once from some images, for networks with any layers.

The owner of a network runs about 100 of its training images through it, and keeps the mean and variance per channel, over
images and positions, of the inputs or outputs of chosen layers. No image can be read off them. Once they are among the
network's variables (the collection `MOMENTS`), synthesized images are optimized to match them, as they would match running
statistics (Table 8 of arXiv 1912.08795: 90.52 with the moments of 100 images, 90.68 with BatchNorm's own).
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

KIND = 'recorded moments'  # stored in the field of the file in which other files name their network


@dataclasses.dataclass(frozen=True)
class Moments:
    """The recorded moments of layers of one network.

    Attributes:
      layers: {place: (mean, variance)}, float32 [..., C] each. A place is the path of a layer, which denotes the layer's
        input, or the path followed by ':output', which denotes its output.
      digest: The digest of the network, see `Classifier.digest`.
      images: The number of images from which they were recorded.
      views: The number of times that each image was augmented anew; 0 if each was used once, without augmentation.
      version: The version of dvinv.
    """

    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    digest: str
    images: int
    views: int = 0
    version: str = dvinv.__version__

    def save(self, path) -> None:
        """Writes a safetensors file with the moments, the digest of the network and the other attributes, but no image."""
        about = {'network': KIND, 'layers': [*self.layers], 'teacher': self.digest, 'images': self.images}
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
                'Record those of this one: dvinv.record_moments, or python -m dvinv.moments.'
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
