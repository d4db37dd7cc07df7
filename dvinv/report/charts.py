"""Charts as inline SVG: line charts, heat maps, and pairs of bars. The markup is in charts.svg.j2.

A plotting library would cost the page what its charts have: values that are shown when a point is pointed at, the colours
of a light or a dark page, and no script. A chart can be inserted into a page, and a notebook shows it.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

ENVIRONMENT = Environment(  # of the templates in this folder; texts are escaped unless they are `Markup`
    loader=PackageLoader('dvinv.report', '.'),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

# View-box units; one unit is one CSS pixel when the chart is shown at its natural width.
WIDTH = 520
PLOT_HEIGHT = 210
PANEL_HEIGHT = 96  # the height of each panel, if there are several
RIGHT = 16
CELL = 56, 32  # the width and height of a cell of a heat map
BAR = 16  # the height of a row of bars
CHARACTER = 6.2  # the width of a character in the name of a row of bars
LONGEST = {'row': 18, 'column': 7}  # characters of a name of a heat map that fit
# More points than this cannot be distinguished at this width.
MAX_BUCKETS = 240
# Hover targets per series: enough to read values, few enough to keep the page small.
MAX_TOOLTIPS = 40
# A series with at most this many points shows each as a dot: only the points were measured, not the line between them.
MAX_DOTS = 12
# Beyond this value the difference of two values may overflow a float; no training has such values.
LARGEST = 1e300

Curve: TypeAlias = tuple[Sequence[float | None], Sequence[float | None]]
"""x values and y values, two sequences of the same length. None, NaN and infinite values are gaps."""
Lines: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]
"""{name: (x, y)} as float64 [N]; y is NaN at gaps."""
Ticks: TypeAlias = list[tuple[float, str]]
"""Values, or their positions in view-box units, with their labels."""


@dataclass(frozen=True)
class Chart:
    """A chart that a page inserts unescaped, and that a notebook shows if it is the last value of a cell."""

    svg: str
    """One `<svg>` element."""

    def __html__(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return f'<div style="max-width:{1.3 * WIDTH:.0f}px">{self.svg}</div>'


def line_chart(
    series: Mapping[str, Curve], title: str, x_label: str, y_label: str, log_y: bool = False, log_x: bool = False
) -> Chart | None:
    """Draws each series as a line, and the points of a short series as dots.

    Args:
      series: {name: curve}.
      title: the title above the chart; about 60 characters fit.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      log_y, log_x: whether the axis is logarithmic. Points of zero or less cannot be drawn on such an axis: they become
        gaps, and a note gives their number. If no value is positive, the axis is linear.

    Returns:
      The chart; None if no series has a point.
    """
    lines = {name: _clean(name, *curve) for name, curve in series.items()}
    return _line_chart([lines], title, x_label, y_label, log_y, log_x)


def line_panels(series: Mapping[str, Curve], title: str, x_label: str, log_y: bool = False) -> Chart | None:
    """Draws each series in its own panel, one below the other, over a common x axis: for values of different magnitude.

    Args:
      series, title, x_label: see `line_chart`. Series without a point are left out.
      log_y: whether the y axes are logarithmic, see `line_chart`.

    Returns:
      The chart; None if no series has a point.
    """
    lines = {name: _clean(name, *curve) for name, curve in series.items()}
    return _line_chart([{name: xy} for name, xy in lines.items() if _has_points(xy[1])], title, x_label, '', log_y, False)


def loss_chart(series: Mapping[str, Curve], title: str, y_label: str) -> Chart | None:
    """Draws the losses of trainings by update over a logarithmic axis; series without points are left out."""
    return line_chart({name: curve for name, curve in series.items() if curve[0]}, title, 'update', y_label, log_y=True)


def heat_map(
    rows: Sequence[Sequence[float | None]], title: str, row_names: Sequence[str], column_names: Sequence[str]
) -> Chart:
    """Draws each fraction in [0, 1] as a cell, darker for higher values, with its value in per cent; None is left empty.

    Args:
      rows: the rows from the top; rows that are shorter than `column_names` end in empty cells.
      title: the title above the chart; about 60 characters fit unless there are very few columns.
      row_names, column_names: short names; longer names are truncated, and shown in full when pointed at.
    """
    left = round(24 + 6.6 * max((min(len(name), LONGEST['row']) for name in row_names), default=0))
    needed = left + CELL[0] * len(column_names)
    frame = {'left': left, 'top': 64, 'cell': CELL, 'needed': needed, 'width': max(WIDTH, needed)}
    names = {'row_names': row_names, 'column_names': column_names, 'most': LONGEST}
    return _drawn('heat_map', title=title, rows=rows, frame=frame, **names)


def bars(rows: Mapping[str, tuple[float, float]], title: str, unit: str) -> Chart:
    """Draws one row per name: a bar of the length before, and over it a bar of the length after.

    Args:
      rows: {name: (length before, length after)}.
      title: the title above the chart.
      unit: the unit of the lengths, for the labels.
    """
    left = 12 + CHARACTER * max((len(name) for name in rows), default=0)
    scale = (WIDTH - left - 90) / (max((before for before, _ in rows.values()), default=1) or 1)
    return _drawn(
        'bars',
        title=title,
        rows=rows,
        unit=unit,
        frame={'left': left, 'top': 34, 'row': BAR, 'width': WIDTH, 'scale': scale},
    )


def mean_curves(lines: Iterable[Mapping[str, float]], values: Iterable[str], x: str = 'step') -> dict[str, Curve]:
    """Returns {value: (list of x, list of means at x)} over the lines that have the value, ascending in x.

    Args:
      lines: records such as lines of metrics; consumed one at a time, so that they are not all kept in memory.
      values: the names of the wanted values.
      x: the name of the value of the x axis, which every line has.
    """
    totals: dict[str, dict[float, list[float]]] = {value: {} for value in values}  # {value: {x: [sum, count]}}
    for line in lines:
        for value in line.keys() & totals.keys():
            total = totals[value].setdefault(line[x], [0.0, 0])
            total[0] += line[value]
            total[1] += 1
    return {value: (sorted(at), [at[place][0] / at[place][1] for place in sorted(at)]) for value, at in totals.items()}


def _drawn(macro: str, **values: Any) -> Chart:
    """Returns the chart that a macro of the template draws."""
    return Chart(getattr(ENVIRONMENT.get_template('charts.svg.j2').module, macro)(**values).strip())


@dataclass(frozen=True)
class _Axis:
    """A range of values and their places: linear, or in exponents of ten if it is logarithmic."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: np.ndarray, padding: float, log: bool) -> '_Axis':
        """Returns the axis over some values, which is never empty: a constant or a single point is in its middle."""
        places = np.log10(values) if log else values
        low, high = float(places.min()), float(places.max())
        room = padding * (high - low)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-280):
            room = abs(low) * 0.1 or 1.0
        return cls(low - room, high + room, log)

    def __call__(self, values: Any) -> Any:
        """Returns where values lie, as fractions of the axis from its low end."""
        return ((np.log10(values) if self.log else values) - self.low) / (self.high - self.low)

    def ticks(self, linear: int, decades: int = 8) -> Ticks:
        """Returns about `linear` ticks, or at most `decades` on a logarithmic axis."""
        return _log_ticks(self.low, self.high, decades) if self.log else _linear_ticks(self.low, self.high, linear)


def _line_chart(panels: list[Lines], title: str, x_label: str, y_label: str, log_y: bool, log_x: bool) -> Chart | None:
    """Returns a chart of panels over a common x axis; None if nothing is drawn.

    With `y_label` there is a single panel, with a legend. Without it, each panel has the names of its series above it.
    """
    log_x = log_x and any(np.any(x >= 1 / LARGEST) for lines in panels for x, _ in lines.values())
    placed, hidden = _on_axes(panels, log_y, log_x)
    if not placed:
        return None
    height = PLOT_HEIGHT if y_label else PANEL_HEIGHT
    x_axis = _Axis.over(np.concatenate([x[~np.isnan(y)] for _, lines in placed for x, y in lines.values()]), 0.0, log_x)
    y_axes = [_Axis.over(np.concatenate([y[~np.isnan(y)] for _, y in lines.values()]), 0.05, log) for log, lines in placed]
    ticks = [axis.ticks(height // 42, height // 24) for axis in y_axes]
    numbers = itertools.count()
    named = [[(next(numbers), name) for name in lines] for _, lines in placed]
    legend = _rows_of_names(named[0]) if y_label else []
    left = (38 if y_label else 20) + 7.5 * max(len(label) for labels in ticks for _, label in labels)
    top, step = 34 + 19 * len(legend), height + (0 if y_label else 34)
    right, bottom = WIDTH - RIGHT, top + step * len(placed)

    def across(x):
        return left + x_axis(x) * (right - left)

    drawn = []
    for row, ((_, lines), axis, names) in enumerate(zip(placed, y_axes, named, strict=True)):
        below = top + step * (row + 1)

        def down(y, axis=axis, below=below):
            return below - axis(y) * height

        found = [_line(number, name, *_thin(*lines[name]), across, down) for number, name in names]
        labels = [(down(value), label) for value, label in ticks[row]]
        drawn.append({'bottom': below, 'names': names, 'ticks': labels, 'lines': [line for line in found if line]})
    return _drawn(
        'line_chart',
        title=title,
        x_label=x_label + (', log scale' if log_x else ''),
        y_label=y_label and y_label + (', log scale' if placed[0][0] else ''),
        frame={'width': WIDTH, 'height': height, 'left': left, 'right': right, 'top': top, 'bottom': bottom},
        legend=legend,
        panels=drawn,
        x_ticks=[(across(value), label) for value, label in x_axis.ticks(6)],
        hidden=hidden,
    )


def _on_axes(panels: list[Lines], log_y: bool, log_x: bool) -> tuple[list[tuple[bool, Lines]], int]:
    """Replaces points that cannot be drawn on logarithmic axes by gaps, and leaves out panels without points.

    Returns:
      A list of (whether the y axis of the panel is logarithmic, its lines), and the number of points replaced.
    """
    placed, hidden = [], 0
    for lines in panels:
        log = log_y and any(np.any(y >= 1 / LARGEST) for _, y in lines.values())
        kept = {}
        for name, (x, y) in lines.items():
            undrawable = ~np.isnan(y) & ((log & (y < 1 / LARGEST)) | (log_x & (x < 1 / LARGEST)))
            hidden += int(np.sum(undrawable))
            kept[name] = x, np.where(undrawable, np.nan, y)
        if any(_has_points(y) for _, y in kept.values()):
            placed.append((log, kept))
    return placed, hidden


def _has_points(y: np.ndarray) -> bool:
    return bool(np.any(~np.isnan(y)))


def _clean(name: str, x: Sequence[float | None], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y as float64 [N]; y is NaN if the point cannot be drawn."""
    xs, ys = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (x, y))
    if len(xs) != len(ys):
        raise ValueError(f'Series {name!r} has {len(xs)} x values but {len(ys)} y values; give one y for each x.')
    with np.errstate(invalid='ignore'):
        drawn = (np.abs(xs) < LARGEST) & (np.abs(ys) < LARGEST)
    return xs, np.where(drawn, ys, np.nan)


def _linear_ticks(low: float, high: float, about: int) -> Ticks:
    """Returns round values within [low, high], in steps of 1, 2 or 5 times a power of ten, with their labels."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    values = [index * step for index in range(first, last + 1)]
    largest = max(abs(low), abs(high))
    exponent = math.floor(math.log10(step) + 1e-9)
    if largest >= 1e7 or largest < 1e-3:
        digits = max(0, math.floor(math.log10(largest)) - exponent)
        return [(value, f'{value:.{digits}e}' if value else '0') for value in values]
    return [(value, f'{value:,.{max(0, -exponent)}f}') for value in values]


def _log_ticks(low: float, high: float, most: int) -> Ticks:
    """Returns ticks of an axis over the exponents [low, high] of ten: decades, 1-2-5, or round values, as space allows."""
    low, high = max(low, -307.0), min(high, 307.0)  # the range of a float, with room for a factor of 5
    stride = max(1, math.ceil((high - low) / min(6, most)))
    decades = range(math.ceil(low), math.floor(high) + 1)
    if len(decades) >= min(3, most // 2):
        return [(10.0**exponent, _plain(10.0**exponent)) for exponent in decades if exponent % stride == 0]
    steps = [m * 10.0**e for e in range(math.floor(low), math.floor(high) + 1) for m in (1, 2, 5)]
    inside = [value for value in steps if low <= math.log10(value) <= high]
    if len(inside) >= 3:
        return [(value, _plain(value)) for value in inside]
    return [(value, label) for value, label in _linear_ticks(10.0**low, 10.0**high, 4) if value > 0]


def _plain(value: float) -> str:
    return f'{value:,.6g}' if 1e-3 <= value < 1e6 else f'{value:.0e}'


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the lowest and the highest point of each bucket, so that spikes remain; a bucket of gaps stays a gap."""
    if len(y) <= 2 * MAX_BUCKETS:
        return x, y
    kept = {0, len(y) - 1}
    for bucket in np.array_split(np.arange(len(y)), MAX_BUCKETS):
        inside = bucket[~np.isnan(y[bucket])]
        if len(inside):
            kept.update((int(inside[y[inside].argmin()]), int(inside[y[inside].argmax()])))
        else:
            kept.add(int(bucket[0]))
    order = sorted(kept)
    return x[order], y[order]


def _rows_of_names(names: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Returns the rows of a legend: as many names in each as fit."""
    rows: list[list[tuple[int, str]]] = []
    used = WIDTH
    for index, name in names:
        width = 36 + 8 * len(name)
        if used + width > WIDTH:
            rows.append([])
            used = 0
        rows[-1].append((index, name))
        used += width
    return rows


def _line(index: int, name: str, x: np.ndarray, y: np.ndarray, across, down) -> dict[str, Any] | None:
    """Returns one series: a path, dots for few, isolated and last points, and hover targets; None if it has no point."""
    drawn = np.flatnonzero(~np.isnan(y))
    if not len(drawn):
        return None
    points = [*zip(across(x[drawn]).tolist(), down(y[drawn]).tolist(), strict=True)]
    follows = np.diff(drawn, prepend=-2) == 1  # the point before it
    alone = ~follows & ~np.append(follows[1:], False)
    alone[-1] = True
    shown = np.unique(np.linspace(0, len(drawn) - 1, min(len(drawn), MAX_TOOLTIPS)).round().astype(int))
    return {
        'index': index,
        'name': name,
        'path': ''.join(f'{"ML"[after]}{x:.1f} {y:.1f}' for after, (x, y) in zip(follows.astype(int), points, strict=True)),
        'dots': [point for i, point in enumerate(points) if len(points) <= MAX_DOTS or alone[i]],
        'targets': [(*points[i], f'{y[drawn[i]]:.4g} at {x[drawn[i]]:,.6g}') for i in shown],
    }
