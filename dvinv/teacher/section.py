"""The section of the report about the teacher: its source, its accuracy, and its losses if the run trained it."""

from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, loss_chart, mean_curves
from dvinv.report.page import Section, Tile, percent, reads_right
from dvinv.runtime.metrics import Metrics


def teacher_section(run: Run, found: dict) -> Section:
    """Returns the section; `found` are the figures of the task in results.json."""
    group = run.settings.teacher
    name = group.factory or group.network
    source = f'was read from {group.weights}' if group.weights else f'came from the function {group.factory}'
    if trained := run.is_trained_here('teacher'):
        source = f'was trained here in {group.training.updates:,} updates'
    accuracy = found['test_accuracy']
    return Section(
        'Teacher',
        f'{name}, of {found["parameters"]:,} parameters, {source}'
        + reads_right(accuracy, found['verifier_test_accuracy'], 'the verifier'),
        charts=[training_losses(run.workdir.metrics)] if trained else (),
        tiles=[Tile('Teacher', percent(accuracy), 'real test accuracy', accuracy)],
    )


def training_losses(metrics: Metrics) -> Chart | None:
    """Draws the losses of the teacher and the verifier by update; None if the run trained neither."""
    curves = {
        role.capitalize(): mean_curves(metrics.lines('teacher', role), ['loss'])['loss'] for role in ('teacher', 'verifier')
    }
    return loss_chart(curves, 'Loss of the trainings on real images', 'cross-entropy')
