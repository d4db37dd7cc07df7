"""Conversion of image files to arrays: decodes pictures, crops them to squares on request, and stacks them."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dvinv.errors import DvinvError, shape_text

FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP')


def decode(files: Mapping[str, bytes | Path], image_size: int = 0, mode: str = '') -> UInt8[np.ndarray, 'N H W C']:
    """Returns image files decoded as uint8 [N, H, W, C].

    Args:
      files: {a name for messages: the bytes or the path of a file}, at least one.
      image_size: the size as in `square`; 0 to keep the size of the files, which must all be the same.
      mode: 'RGB' or 'L'; '' for L (C = 1) if every picture is grey, otherwise RGB.

    Raises:
      DvinvError: a file is damaged, has another format or more than 8 bits per channel, or the sizes differ.
    """
    mode = mode or ('L' if all(_mode(*item) == 'L' for item in files.items()) else 'RGB')
    for i, (name, file) in enumerate(files.items()):
        picture = _decode(name, file, mode)
        pixels = np.asarray(square(picture, image_size) if image_size else picture)
        if i == 0:
            images, first_name = np.empty((len(files), *pixels.shape), np.uint8), name
        if pixels.shape != images.shape[1:]:
            size, first_size = (shape_text(shape[:2]) for shape in (pixels.shape, images.shape[1:]))
            raise DvinvError(
                f'All images must have one size, but {first_name} has {first_size} pixels (height x width) and {name} has '
                f'{size}; set data.image_size to resize them.'
            )
        images[i] = pixels
    return images.reshape(*images.shape[:3], -1)


def resize(images: UInt8[np.ndarray, 'N _ _ C'], image_size: int) -> UInt8[np.ndarray, 'N _ _ C']:
    """Returns images, uint8 [N, H, W, C], made square as in `square`; unchanged if `image_size` is 0."""
    if not image_size or images.shape[1:3] == (image_size, image_size):
        return images
    resized = np.empty((len(images), image_size, image_size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        for channel in range(images.shape[3]):  # channel by channel, since Pillow supports few numbers of channels
            resized[i, ..., channel] = np.asarray(square(Image.fromarray(image[..., channel]), image_size))
    return resized


def square(picture: Image.Image, size: int) -> Image.Image:
    """Returns the centre square of a picture, after its shorter side is resized to `size` with antialiasing."""
    width, height = (round(side * size / min(picture.size)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _mode(name: str, file: bytes | Path) -> str:
    with _opened(name, file) as picture:
        return picture.mode


def _decode(name: str, file: bytes | Path, mode: str) -> Image.Image:
    with _opened(name, file) as picture:
        if picture.mode[0] in 'IF':  # Pillow would clip these modes instead of scaling them
            raise DvinvError(f'{name} has more than 8 bits a channel; convert it to 8 bits.')
        return picture.convert(mode)


@contextlib.contextmanager
def _opened(name: str, file: bytes | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as picture:
            yield picture
    except DvinvError:
        raise
    except Exception as error:  # Pillow raises many types of errors for a damaged file
        raise DvinvError(
            f'{name} cannot be decoded ({type(error).__name__}): it is damaged, or no {", ".join(FORMATS)} file; replace or '
            'remove it.'
        ) from error
