"""Heat maps: a matrix of fractions as inline SVG text, with one cell per fraction, in the colours of `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CELL, TOP = (56, 32), 64  # view-box units, CSS pixels at natural width
LONGEST = {'row': 18, 'column': 7}  # characters of a name that fit


def heat_map(
    rows: Sequence[Sequence[float | None]],
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
) -> str:
    """Draws each fraction in [0, 1] as a cell, darker for higher values, with its value in per cent; None is left empty.

    Args:
      rows: the rows from the top; rows that are shorter than `column_names` end in empty cells.
      title: the title above the chart; about 60 characters fit unless there are very few columns.
      row_names, column_names: short names; longer names are truncated, and shown in full when pointed at.

    Returns:
      One `<svg>` element.
    """
    left = round(24 + 6.6 * max((len(_cut(name, 'row')) for name in row_names), default=0))
    needed = left + CELL[0] * len(column_names)
    width = max(520, needed)
    height = TOP + CELL[1] * len(rows) + 8
    muted = 'style="fill:var(--muted,#6b7280)"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" role="img"',
        # The figures would be illegible in a narrower chart, so the page scrolls it.
        f'style="min-width:{0.7 * needed:.0f}px;max-width:{1.2 * width:.0f}px"',
        f'aria-label="{escape(title)}" font-family="inherit" font-size="12" fill="currentColor">',
        f'<text class="chart-title" x="0" y="16" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for column, name in enumerate(column_names):
        x = left + CELL[0] * (column + 0.5)
        out.append(f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle" {muted}>{_named(name, "column")}</text>')
    for row, (name, shares) in enumerate(zip(row_names, rows, strict=True)):
        y = TOP + CELL[1] * row
        out.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end" {muted}>{_named(name, "row")}</text>')
        for column, share in enumerate(shares):
            if share is None:
                continue
            x = left + CELL[0] * column
            opacity = 0.06 + 0.64 * min(1.0, max(0.0, share))  # light enough for the figure on it to be legible
            told = f'{name}, {column_names[column]}: {100 * share:.1f}%'
            out.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL[0] - 2}" height="{CELL[1] - 2}" rx="4" '
                f'style="fill:var(--series-1,#2f6fde)" fill-opacity="{opacity:.3f}"><title>{escape(told)}</title></rect>'
            )
            out.append(f'<text x="{x + CELL[0] / 2:.1f}" y="{y + 20}" text-anchor="middle">{100 * share:.1f}</text>')
    return '\n'.join([*out, '</svg>'])


def _cut(name: str, of: str) -> str:
    return name if len(name) <= LONGEST[of] else name[: LONGEST[of] - 1] + '…'


def _named(name: str, of: str) -> str:
    cut = _cut(name, of)
    return escape(cut) if cut == name else f'{escape(cut)}<title>{escape(name)}</title>'
