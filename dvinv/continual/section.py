"""The section of the report about the task `continual`."""

from collections.abc import Sequence

from dvinv.continual.chains import MAIN
from dvinv.continual.stream import class_names_of, steps_of
from dvinv.data.pool import ImagePool
from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, heat_map
from dvinv.report.page import Picture, Section, Table, Tile, class_picture, percent
from dvinv.runtime.workdir import Workdir

PER_CLASS = 12  # images in a row of a grid
LOSSES = {
    'deepinversion': 'Synthesized images, the loss of DeepInversion',
    'always_be_dreaming': 'Synthesized images, the loss of Always Be Dreaming',
}
CONTROLS = {
    'finetune': 'New images alone (fine-tuning)',
    'lwf_mc': 'New images alone, LwF.MC',
    'replay': 'Real images of old classes (oracle)',
    'joint': 'All real images at once (joint training)',
    **LOSSES,
}


def continual_section(run: Run, found: dict) -> Section:
    """Returns the section: a table, accuracy matrices, and the first images of each task's pool."""
    settings, names = run.settings.continual, class_names_of(run, steps_of(run, run.teacher))
    labels = {MAIN: LOSSES[settings.loss], **CONTROLS}
    chains = [MAIN, *settings.controls]
    figures = ('test_accuracy', 'old_test_accuracy', 'new_test_accuracy', 'average_accuracy', 'forgetting')
    rows = []
    for chain in chains:
        prefix = '' if chain == MAIN else f'{chain}_'
        rows.append([labels[chain], *(percent(found.get(prefix + figure)) for figure in figures)])
    table = Table(
        ('Learned from', 'all classes', 'old classes', 'classes of the last task', 'mean over tasks', 'forgetting'),
        rows,
        highlight=0,
        caption=f'Accuracy of the same network on {found["test_images"]:,} real test images after {found["tasks"]} tasks, '
        f'{found["updates"]:,} updates each but for the first. Forgetting: the best earlier accuracy on a task less the '
        'last one, mean over tasks.',
    )
    accuracy, old = found['test_accuracy'], found['old_test_accuracy']
    return Section(
        'Continual learning',
        text=f'After {found["tasks"]} tasks the network reads {percent(accuracy)} of the real test images '
        f'right, of the classes before the last task {percent(old)}.\n\n'
        'Rows of a matrix: after which task. Columns: on which task, in per cent, among all classes known by then.',
        tables=[table],
        charts=[accuracy_matrix(found['accuracy_matrix'][chain], labels[chain]) for chain in chains],
        pictures=[*(recalled_images(run.workdir, task, names) for task in range(1, found['tasks'])), *_real(run, names)],
        tiles=[
            Tile('All classes', percent(accuracy), 'real test accuracy, old images unseen', accuracy),
            Tile('Old classes', percent(old), f'before the last task {percent(found["old_test_accuracy_before"])}', old),
        ],
        summary=f'In {found["tasks"]} tasks a network learned ever more classes, and saw no real image of an old one '
        f'again: images of old classes were synthesized from the network itself. It reads {percent(accuracy)} of the real '
        f'test images of all classes right; after fine-tuning alone it would be {percent(found["finetune_test_accuracy"])}, '
        f'with real images of the old classes {percent(found["replay_test_accuracy"])}.',
    )


def accuracy_matrix(rows: Sequence[Sequence[float | None] | None], title: str) -> Chart:
    """Draws the accuracy on each task after each task.

    Args:
      rows: the accuracies on the tasks so far, one row after each task; None for a task after which none was measured.
      title: the title above the chart.
    """
    known = {f'after task {task}': row for task, row in enumerate(rows) if row}
    return heat_map([*known.values()], title, [*known], [f'task {task}' for task in range(len(rows))])


def recalled_images(workdir: Workdir, task: int, names: Sequence[str]) -> Picture:
    """Returns the first images of each old class that were synthesized before a task.

    Args:
      workdir: the work directory.
      task: the number of the task, from 1.
      names: the names of classes in the order of labels; () to show numbers.
    """
    pool = ImagePool(workdir.path / 'pools' / f'{task}')
    caption = f'Synthesized before task {task}: the old classes as the network recalled them; rows are classes.'
    return class_picture(pool.rows('images'), pool.rows('labels')[:], caption, names, PER_CLASS)


def _real(run: Run, names: Sequence[str]) -> list[Picture]:
    data = run.data
    caption = 'Real test images of the first classes, for comparison.'
    return [class_picture(data.test.images, data.test.labels, caption, names, PER_CLASS)] if data else []
