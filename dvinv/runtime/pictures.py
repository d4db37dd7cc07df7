"""Arrays of images as one picture: a grid with a row a class, and its text form for a page without other files."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def shown_classes(labels: np.ndarray, max_classes: int = 20) -> list[int]:
    """The classes that `class_grid` gives a row, from the top.

    Args:
      labels: int [N].
      max_classes: where there are more, this many are taken evenly spaced over the sorted classes: neighbouring
        classes of a large data set tend to be alike (the first twenty of ImageNet are fish and birds).
    """
    if max_classes < 1:
        raise ValueError(f'max_classes is {max_classes}; a grid needs at least one row.')
    present = np.unique(np.asarray(labels))
    if len(present) > max_classes:
        present = present[np.linspace(0, len(present) - 1, max_classes).round().astype(int)]
    return [int(label) for label in present]


def name_of(label: int, class_names: Sequence[str]) -> str:
    """Returns what a class is called: its number where no name is known."""
    return class_names[label] if label < len(class_names) else str(label)


def visible(pixels: np.ndarray) -> np.ndarray:
    """Returns what a picture can show of an image.

    Args:
      pixels: uint8 [H, W, C].

    Returns:
      uint8 [H, W, 3], the first three channels; [H, W] for a single one, and [H, 2 W] for two, side by side.
    """
    if pixels.shape[-1] > 2:
        return pixels[..., :3]
    return np.concatenate(np.moveaxis(pixels, -1, 0), axis=1)


def class_grid(
    images: np.ndarray,
    labels: np.ndarray,
    per_class: int,
    *,
    max_classes: int = 20,
    gap: int = 4,
    width: int = 900,
    classes: Sequence[int] = (),
) -> Image.Image:
    """Lays images out with one row a class (ascending) and the first `per_class` images of the class as columns.

    Args:
      images: uint8 [N, H, W, C], see `visible`; an array, or what is read by rows: only images of the grid are asked for.
      labels: int [N].
      per_class: columns.
      max_classes: rows at most; see `shown_classes`.
      gap: pixels between neighbours.
      width: pixels the grid is about to have. Small images grow by a whole factor with nearest neighbour, so that a
        pixel stays a square; images too large for it shrink by a whole factor with a mean.
      classes: labels of the rows, from the top; (): see `shown_classes`. Rows of absent ones are transparent.

    Returns:
      A picture of mode LA or RGBA. Gaps, and cells of a class with fewer images, are transparent, so the grid suits
      a light and a dark page.
    """
    labels = np.asarray(labels)
    if images.ndim != 4 or not images.shape[-1] or images.dtype != np.uint8:
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
    """The picture as `data:image/png;base64,...`, lossless and the same for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format='PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')
