"""Pictures of arrays of images: a grid with one row per class, and its data URI for a self-contained page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dvinv.data.rows import RowArray


def shown_classes(labels: np.ndarray, max_classes: int = 20) -> list[int]:
    """Returns the classes that have a row in `class_grid`, from the top.

    Args:
      labels: int [N].
      max_classes: the maximum number of classes. If there are more, classes are chosen evenly spaced over the sorted ones:
        neighbouring classes of a large data set tend to be similar (the first twenty of ImageNet are fish and birds).
    """
    if max_classes < 1:
        raise ValueError(f'max_classes is {max_classes}; a grid needs at least one row.')
    present = np.unique(np.asarray(labels))
    if len(present) > max_classes:
        present = present[np.linspace(0, len(present) - 1, max_classes).round().astype(int)]
    return [int(label) for label in present]


def name_of(label: int, class_names: Sequence[str]) -> str:
    """Returns the name of a class, or its number if no name is known."""
    return class_names[label] if label < len(class_names) else str(label)


def visible(pixels: np.ndarray) -> np.ndarray:
    """Returns the channels of an image that a picture can show.

    Args:
      pixels: uint8 [H, W, C].

    Returns:
      uint8 [H, W, 3], the first three channels; [H, W] for a single channel; [H, 2 W] for two channels, side by side.
    """
    if pixels.shape[-1] > 2:
        return pixels[..., :3]
    return np.concatenate(np.moveaxis(pixels, -1, 0), axis=1)


def class_grid(
    images: RowArray,
    labels: np.ndarray,
    per_class: int,
    *,
    max_classes: int = 20,
    gap: int = 4,
    width: int = 900,
    classes: Sequence[int] = (),
) -> Image.Image:
    """Lays images out in a grid, with one row per class and the first `per_class` images of the class as columns.

    Args:
      images: uint8 [N, H, W, C], see `visible`; only the images of the grid are read.
      labels: int [N].
      per_class: the number of columns.
      max_classes: the maximum number of rows; see `shown_classes`.
      gap: pixels between neighbouring images.
      width: the approximate width of the grid in pixels. Small images are enlarged by an integer factor with nearest
        neighbour, so that a pixel stays a square; large images are reduced by an integer factor with a mean.
      classes: the labels of the rows, from the top; () for those of `shown_classes`, ascending. Rows of classes without
        images are transparent.

    Returns:
      A picture of mode LA or RGBA. Gaps, and empty cells of a class with fewer images, are transparent, so that the grid
      suits a light and a dark page.
    """
    labels = np.asarray(labels)
    if len(images.shape) != 4 or not images.shape[-1] or images.dtype != np.uint8:
        raise ValueError(f'Images are {images.dtype} {images.shape}; a grid needs uint8 [N, H, W, C].')
    if labels.shape != images.shape[:1]:
        raise ValueError(f'Labels have shape {labels.shape} for {len(images)} images; give one label for each image.')
    if not len(images) or per_class < 1:
        raise ValueError(f'A grid of {len(images)} images with {per_class} columns is empty; give one or more.')

    classes = classes or shown_classes(labels, max_classes)
    room = (width - gap * (per_class - 1)) / per_class
    height_in, width_in = visible(np.empty(images.shape[1:], np.uint8)).shape[:2]
    grow = max(1, int(room // width_in))
    shrink = max(1, math.ceil(width_in / max(1.0, room)))
    cell_height, cell_width = math.ceil(height_in / shrink) * grow, math.ceil(width_in / shrink) * grow
    mode = 'LA' if images.shape[-1] < 3 else 'RGBA'
    size = (per_class * (cell_width + gap) - gap, len(classes) * (cell_height + gap) - gap)
    grid = Image.new(mode, size)
    for row, label in enumerate(classes):
        for column, index in enumerate(np.flatnonzero(labels == label)[:per_class]):
            cell = Image.fromarray(np.ascontiguousarray(visible(images[index]))).reduce(shrink)
            cell = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST).convert(mode)
            grid.paste(cell, (column * (cell_width + gap), row * (cell_height + gap)))
    return grid


def png_data_uri(image: Image.Image) -> str:
    """Returns the picture as a base64 data URI of a PNG, which is lossless and depends only on the pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')
