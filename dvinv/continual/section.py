"""The section of the report about the task `continual`."""

from collections.abc import Sequence

from dvinv.continual.chains import MAIN
from dvinv.continual.stream import class_names_of, steps_of
from dvinv.data.pool import ImagePool
from dvinv.pipeline.run import Run
from dvinv.report.heat_map import heat_map
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


def continual_tiles(found: dict) -> list[Tile]:
    """Returns the tiles with the key figures."""
    return [
        Tile(
            'All classes', percent(found['test_accuracy']), 'real test accuracy, old images unseen', found['test_accuracy']
        ),
        Tile(
            'Old classes',
            percent(found['old_test_accuracy']),
            f'before the last task {percent(found["old_test_accuracy_before"])}',
            found['old_test_accuracy'],
        ),
    ]


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
    tasks = [f'task {task}' for task in range(found['tasks'])]
    charts = []
    for chain in chains:
        matrix = found['accuracy_matrix'][chain]
        known = [(f'after task {task}', row) for task, row in enumerate(matrix) if row]
        charts.append(heat_map([row for _, row in known], labels[chain], [name for name, _ in known], tasks))
    return Section(
        'Continual learning',
        text=f'After {found["tasks"]} tasks the network reads {percent(found["test_accuracy"])} of the real test images '
        f'right, of the classes before the last task {percent(found["old_test_accuracy"])}.\n\n'
        'Rows of a matrix: after which task. Columns: on which task, in per cent, among all classes known by then.',
        tables=[table],
        charts=charts,
        pictures=[*(_grid(run.workdir, task, names) for task in range(1, found['tasks'])), *_real(run, names)],
    )


def _real(run: Run, names: Sequence[str]) -> list[Picture]:
    data = run.data
    caption = 'Real test images of the first classes, for comparison.'
    return [class_picture(data.test.images, data.test.labels, caption, names, PER_CLASS)] if data else []


def _grid(workdir: Workdir, task: int, names: Sequence[str]) -> Picture:
    pool = ImagePool(workdir.path / 'pools' / f'{task}')
    caption = f'Synthesized before task {task}: the old classes as the network recalled them; rows are classes.'
    return class_picture(pool.rows('images'), pool.rows('labels')[:], caption, names, PER_CLASS)
