"""Line charts as inline SVG text, drawn with only the standard library and numpy.

A chart is a string that is inserted into an HTML page unchanged. Colours are CSS variables with fallbacks (`--series-1` to
`--series-6`, `--grid`, `--muted`) and `currentColor`, so that the page chooses between light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

# View-box units; one unit is one CSS pixel when the chart is shown at its natural width.
WIDTH = 520
PLOT_HEIGHT = 210
PANEL_HEIGHT = 96  # the height of each panel, if there are several
RIGHT = 16
# More points than this cannot be distinguished at this width.
MAX_BUCKETS = 240
# Hover targets per series: enough to read values, few enough to keep the page small.
MAX_TOOLTIPS = 40
# A series with at most this many points shows each as a dot: only the points were measured, not the line between them.
MAX_DOTS = 12
# Beyond this value the difference of two values may overflow a float; no training has such values.
LARGEST = 1e300

_FALLBACK_COLOURS = ('#2f6fde', '#d9772b', '#1f9a70', '#8a5bd0', '#cf4a6c', '#7b8594')


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    log_x: bool = False,
) -> str:
    """Draws each series as a line, and the points of a short series as dots.

    Args:
      series: name -> (x values, y values), two sequences of the same length. None, NaN and infinite values are gaps.
      title: the title above the chart; about 60 characters fit.
      x_label: name and unit of the x axis.
      y_label: name and unit of the y axis.
      log_y, log_x: whether the axis is logarithmic. Points of zero or less cannot be drawn on such an axis: they become
        gaps, and a note gives their number. If no value is positive, the axis is linear.

    Returns:
      One `<svg>` element; '' if no series has a point.
    """
    lines = {name: _clean(name, *xy) for name, xy in series.items()}
    return _chart([lines], title, x_label, y_label, log_y, log_x, PLOT_HEIGHT)


def line_panels(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x_label: str, log_y: bool = False
) -> str:
    """Draws each series in its own panel, one below the other, over a common x axis: for values of different magnitude.

    Args:
      series, title, x_label: see `line_chart`. Series without a point are left out.
      log_y: whether the y axes are logarithmic, see `line_chart`.

    Returns:
      One `<svg>` element; '' if no series has a point.
    """
    lines = {name: _clean(name, *xy) for name, xy in series.items()}
    panels = [{name: xy} for name, xy in lines.items() if np.any(~np.isnan(xy[1]))]
    return _chart(panels, title, x_label, '', log_y, False, PANEL_HEIGHT)


def _chart(panels: list[dict], title: str, x_label: str, y_label: str, log_y: bool, log_x: bool, height: int) -> str:
    """Returns one `<svg>` of panels over a common x axis; '' if nothing is drawn.

    A single panel has a legend and `y_label`. If there are several panels, each has the names of its series above it.

    Args:
      panels: {name: (x, y)} for each panel, with NaN for gaps.
      title, x_label, y_label, log_y, log_x: see `line_chart`.
      height: the height of a panel.
    """
    log_x = log_x and any(np.any(x >= 1 / LARGEST) for lines in panels for x, _ in lines.values())
    panels, hidden = _on_axes(panels, log_y, log_x)
    xs = [x[~np.isnan(y)] for _, lines in panels for x, y in lines.values()]
    xs = np.concatenate([*xs, np.zeros(0)])
    if not len(xs):
        return ''
    x_low, x_high = _limits(np.log10(xs) if log_x else xs, padding=0.0)
    x_ticks = _log_ticks(x_low, x_high) if log_x else _linear_ticks(x_low, x_high, 6)
    axes = []
    for log, lines in panels:
        ys = np.concatenate([y[~np.isnan(y)] for _, y in lines.values()])
        low, high = _limits(np.log10(ys) if log else ys, padding=0.05)
        axes.append((low, high, _log_ticks(low, high, height // 24) if log else _linear_ticks(low, high, height // 42)))

    alone = len(panels) == 1 and y_label
    legend = _legend([*panels[0][1]]) if alone else []
    top = 34 + 19 * len(legend)
    step = height + (0 if alone else 34)
    bottom = top + step * len(panels)
    left = (38 if alone else 20) + 7.5 * max(len(label) for *_, ticks in axes for _, label in ticks)

    def across(x):
        return left + ((np.log10(x) if log_x else x) - x_low) / (x_high - x_low) * (WIDTH - RIGHT - left)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {bottom + 48}" role="img"',
        f'aria-label="{escape(title)}" font-family="inherit" font-size="12" fill="currentColor">',
        f'<text class="chart-title" x="0" y="16" font-size="14" font-weight="600">{escape(title)}</text>',
        *(f'<text x="0" y="{38 + 19 * row}">{spans}</text>' for row, spans in enumerate(legend)),
    ]
    muted = 'style="fill:var(--muted,#6b7280)"'
    index = 0
    for number, ((log, lines), (low, high, ticks)) in enumerate(zip(panels, axes, strict=True)):
        below = top + step * (number + 1)

        def down(y, log=log, low=low, high=high, below=below):
            return below - ((np.log10(y) if log else y) - low) / (high - low) * height

        if not alone:
            names = _legend([*lines], index)[0]
            out.append(f'<text x="0" y="{below - height - 10}">{names}</text>')
        for value, label in ticks:
            y = down(value)
            out.append(f'<path d="M{left:.1f} {y:.1f}H{WIDTH - RIGHT}" style="stroke:var(--grid,#8884)"/>')
            out.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" {muted}>{label}</text>')
        out.append(f'<path d="M{left:.1f} {below}H{WIDTH - RIGHT}" style="stroke:var(--muted,#6b7280)"/>')
        for name, (x, y) in lines.items():
            out.append(_line(index, name, *_thin(x, y), across, down))
            index += 1
    for value, label in x_ticks:
        x = across(value)
        out.append(f'<path d="M{x:.1f} {bottom}v4" style="stroke:var(--muted,#6b7280)"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle" {muted}>{label}</text>')
    middle_x, middle_y = (left + WIDTH - RIGHT) / 2, top + height / 2
    x_label = escape(x_label) + (', log scale' if log_x else '')
    out.append(f'<text x="{middle_x:.1f}" y="{bottom + 40}" text-anchor="middle" {muted}>{x_label}</text>')
    if alone:
        y_label = escape(y_label) + (', log scale' if panels[0][0] else '')
        out.append(
            f'<text transform="translate(12 {middle_y:.1f}) rotate(-90)" text-anchor="middle" {muted}>{y_label}</text>'
        )
    if hidden:
        out.append(
            f'<text x="{WIDTH - RIGHT}" y="{bottom + 40}" text-anchor="end" font-size="11" {muted}>'
            f'{hidden:,} value{"s" if hidden > 1 else ""} ≤ 0 not shown</text>'
        )
    out.append('</svg>')
    return '\n'.join(out)


def _on_axes(panels: list[dict], log_y: bool, log_x: bool) -> tuple[list[tuple[bool, dict]], int]:
    """Replaces points that cannot be drawn on logarithmic axes by gaps.

    Returns:
      A list of (whether the y axis of the panel is logarithmic, its lines), and the number of points replaced.
    """
    placed, hidden = [], 0
    for lines in panels:
        log = log_y and any(np.any(y >= 1 / LARGEST) for _, y in lines.values())
        kept = {}
        for name, (x, y) in lines.items():
            homeless = ~np.isnan(y) & ((log & (y < 1 / LARGEST)) | (log_x & (x < 1 / LARGEST)))
            hidden += int(np.sum(homeless))
            kept[name] = x, np.where(homeless, np.nan, y)
        if any(np.any(~np.isnan(y)) for _, y in kept.values()):
            placed.append((log, kept))
    return placed, hidden


def _clean(name, x, y) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y as float64 [N]; y is NaN if the point cannot be drawn."""
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    y = np.asarray(y, dtype=np.float64).reshape(-1)
    if len(x) != len(y):
        raise ValueError(f'Series {name!r} has {len(x)} x values but {len(y)} y values; give one y for each x.')
    with np.errstate(invalid='ignore'):
        drawn = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)
    return x, np.where(drawn, y, np.nan)


def _limits(values: np.ndarray, padding: float) -> tuple[float, float]:
    """Returns the range of an axis, which is never empty: a constant or a single point is in its middle."""
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-280):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = padding * (high - low)
    return low - room, high + room


def _linear_ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
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


def _log_ticks(low: float, high: float, most: int = 8) -> list[tuple[float, str]]:
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


def _colour(index: int) -> str:
    slot = index % len(_FALLBACK_COLOURS)
    return f'var(--series-{slot + 1},{_FALLBACK_COLOURS[slot]})'


def _dashed(index: int) -> bool:
    """Returns whether a line is dashed, which is so when the colours are used a second time."""
    return index // len(_FALLBACK_COLOURS) % 2 == 1


def _legend(names: list[str], first: int = 0) -> list[str]:
    """Returns rows of `<tspan>` elements. They flow within a row, so that a page may enlarge the font without overlaps.

    Args:
      names: the names of the series.
      first: the index of the colour of the first name.
    """
    rows, used = [], WIDTH
    for index, name in enumerate(names, first):
        width = 36 + 8 * len(name)
        if used + width > WIDTH:
            rows.append('')
            used = 0
        mark = '╍╍' if _dashed(index) else '━━'
        gap = f' dx="{18 if used else 0}"'
        rows[-1] += f'<tspan{gap} style="fill:{_colour(index)}">{mark}</tspan><tspan dx="6">{escape(name)}</tspan>'
        used += width
    return rows


def _line(index: int, name: str, x: np.ndarray, y: np.ndarray, across, down) -> str:
    """Draws one series: a path, dots for few, isolated and last points, and hover targets with the values."""
    drawn = np.flatnonzero(~np.isnan(y))
    if not len(drawn):
        return ''
    points = {int(i): f'{across(x[i]):.1f} {down(y[i]):.1f}' for i in drawn}
    path = ''.join(('L' if i - 1 in points else 'M') + point for i, point in points.items())
    few = len(points) <= MAX_DOTS
    dots = [i for i in points if few or i == drawn[-1] or (i - 1 not in points and i + 1 not in points)]
    dash = ' stroke-dasharray="6 4"' if _dashed(index) else ''
    out = [
        f'<g style="stroke:{_colour(index)};fill:{_colour(index)}">',
        f'<path d="{path}" fill="none" style="fill:none" stroke-width="1.8" stroke-linejoin="round"{dash}>',
        f'<title>{escape(name)}</title></path>',
    ]
    for i in dots:
        out.append(f'<circle cx="{across(x[i]):.1f}" cy="{down(y[i]):.1f}" r="2.6" stroke="none"/>')
    shown = np.unique(np.linspace(0, len(drawn) - 1, min(len(drawn), MAX_TOOLTIPS)).round().astype(int))
    for i in drawn[shown]:
        out.append(
            f'<circle class="hit" cx="{across(x[i]):.1f}" cy="{down(y[i]):.1f}" r="6" opacity="0">'
            f'<title>{escape(name)}: {y[i]:.4g} at {x[i]:,.6g}</title></circle>'
        )
    return '\n'.join([*out, '</g>'])
