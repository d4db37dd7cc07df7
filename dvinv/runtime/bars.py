"""Charts of pairs of bars, for lengths before and after a reduction, as inline SVG text; colours as in charts.py."""

from collections.abc import Mapping
from html import escape

WIDTH, ROW, TOP = 520, 16, 34
CHARACTER = 6.2  # width of a character in the name of a row


def bars_left(rows: Mapping[str, tuple[float, float]], title: str, unit: str) -> str:
    """Draws one row per name: a bar of the length before, and over it a bar of the length after.

    Args:
      rows: name -> (length before, length after).
      title: the title above the chart.
      unit: the unit of the lengths, for the labels.

    Returns:
      One `<svg>` element.
    """
    left = 12 + CHARACTER * max((len(name) for name in rows), default=0)
    longest = max((before for before, _ in rows.values()), default=1) or 1
    scale = (WIDTH - left - 90) / longest
    height = TOP + ROW * len(rows) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart dense" viewBox="0 0 {WIDTH} {height}" role="img"',
        f'style="min-width:{0.9 * WIDTH:.0f}px"',  # names would be illegible in a narrower chart, so the page scrolls it
        f'aria-label="{escape(title)}" font-family="inherit" font-size="11" fill="currentColor">',
        f'<text class="chart-title" x="0" y="16" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for index, (name, (before, after)) in enumerate(rows.items()):
        y = TOP + ROW * index
        out.append(f'<g><title>{escape(name)}: {after:g} of {before:g} {escape(unit)}</title>')
        out.append(f'<text x="{left - 8:.1f}" y="{y + 10}" text-anchor="end">{escape(name)}</text>')
        for length, colour in ((before, 'var(--grid,#8884)'), (after, 'var(--series-1,#2f6fde)')):
            out.append(f'<rect x="{left:.1f}" y="{y + 2}" width="{length * scale:.1f}" height="10" style="fill:{colour}"/>')
        out.append(f'<text x="{left + before * scale + 6:.1f}" y="{y + 10}">{after:g} of {before:g}</text></g>')
    out.append('</svg>')
    return '\n'.join(out)
