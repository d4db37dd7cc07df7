"""The end of gpu.py's output: what became of every item, and the figures that are compared with a bar."""

import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gpu_report import Report


class Bar(NamedTuple):
    """A figure and what it should be."""

    name: str
    stage: str
    item: str
    path: str  # of the figure within the item
    compare: Callable[[float, float], bool]
    bound: float


OVER = 'ratios.dvinv_bfloat16_over_torch'
BARS = (
    Bar(
        'ResNet-50 224 px, bfloat16: share of peak',
        'inversion',
        'resnet50_224',
        'dvinv_bfloat16.share_of_peak',
        operator.ge,
        0.4,
    ),
    Bar(
        'ResNet-50 224 px: over eager float32', 'inversion', 'resnet50_224', f'{OVER}_eager_float32.median', operator.le, 0.5
    ),
    Bar(
        'ResNet-50 224 px: over eager autocast',
        'inversion',
        'resnet50_224',
        f'{OVER}_eager_autocast.median',
        operator.le,
        0.5,
    ),
    Bar('ResNet-50 224 px: over the strongest', 'inversion', 'resnet50_224', f'{OVER}_strongest.median', operator.le, 0.8),
    Bar('GPU-hours of 215,000 images, ResNet-50', 'imagenet', 'resnet50_by_steps', 'gpu_hours_of_215000', operator.le, 8.0),
    Bar('VGG-11: points below teacher', 'vgg11', 'summary', 'vgg11_bn.adaptive_points_below_teacher', operator.le, 1.6),
    Bar('VGG-11: adaptive ahead of plain', 'vgg11', 'summary', 'vgg11_bn.adaptive_ahead', operator.eq, True),
    Bar(
        'ResNet-34: points below teacher',
        'resnet34',
        'summary',
        'cifar_resnet18.adaptive_points_below_teacher',
        operator.le,
        1.5,
    ),
    Bar('ResNet-34: adaptive ahead of plain', 'resnet34', 'summary', 'cifar_resnet18.adaptive_ahead', operator.eq, True),
)
SIGNS = {operator.ge: '>=', operator.le: '<=', operator.eq: 'is'}


def summary(reports: Mapping[str, Report], settings) -> str:
    """Returns the text; the figures of a rehearsal meet and miss nothing.

    Args:
      reports: of all stages, by name.
      settings: a gpu_stage.Settings.
    """
    level = 1 if settings.core else None
    lines = ['', 'Items:']
    for stage, report in reports.items():
        for name in report.names(level):
            state, reason = report.state(name), report.reason(name)
            lines.append(f'  {stage:10}{name:40}{state:8}{report.seconds(name):6.0f} s' + (f'  {reason}' if reason else ''))
    lines += ['Bars:']
    for bar in BARS:
        value = find(reports[bar.stage].figures(bar.item), bar.path)
        verdict = 'met' if value is not None and bar.compare(value, bar.bound) else 'missed'
        if value is None or settings.rehearse:
            verdict = 'not measured' if value is None else 'a rehearsal'
        lines.append(f'  {bar.name:44}{value!s:>12}  {SIGNS[bar.compare]} {bar.bound}: {verdict}')
    unfinished = [name for name, report in reports.items() if not report.complete(level)]
    lines.append(f'Not finished: {", ".join(unfinished)}.' if unfinished else 'All is done.')
    return '\n'.join(lines)


def find(figures: Mapping, path: str):
    """Returns the figure at 'a.b.c'."""
    for key in path.split('.'):
        figures = figures[key]
    return figures
