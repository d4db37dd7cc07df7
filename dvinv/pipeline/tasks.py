"""The pipeline: the tasks of a run, one after the other, each once; and runs with several seeds.

teacher -> synthesis -> distillation -> pruning -> continual -> quantization -> report

Finished tasks are not run again, and an interrupted task resumes where it stopped: the same command resumes the run.
"""

import contextlib
import dataclasses
import fnmatch
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from dvinv.config import PRESETS, Settings, nested, parse, preset_for
from dvinv.continual import task as continual
from dvinv.distillation import task as distillation
from dvinv.inversion import Teacher, takes_resolutions
from dvinv.pipeline.run import Run
from dvinv.pruning import task as pruning
from dvinv.quantization import task as quantization
from dvinv.report import task as report
from dvinv.report.page import Section, Table, Tile, percent, render
from dvinv.runtime import preemption
from dvinv.runtime.devices import is_primary
from dvinv.runtime.errors import DvinvError, listed, say
from dvinv.runtime.files import write_atomic
from dvinv.runtime.progress import done_already, duration
from dvinv.runtime.workdir import Workdir, holds_work
from dvinv.synthesis import task as synthesis
from dvinv.teacher import task as teacher

# Every module has `validate(run)` and `run(run)`; all but the report have `complete(run)`.
MODULES = {
    'teacher': teacher,
    'synthesis': synthesis,
    'distillation': distillation,
    'pruning': pruning,
    'continual': continual,
    'quantization': quantization,
    'report': report,
}
HEADLINES = {  # patterns of the figures in results.json that are printed, in the order of the tasks
    'teacher': ('test_accuracy', 'verifier_test_accuracy'),
    'synthesis': ('images', 'verifier_accuracy', 'feature_loss_last', 'feature_loss_real'),
    'distillation': (
        'test_accuracy',
        '*_agreement',
        'real_test_accuracy',
        'prior_only_test_accuracy',
        'noise_test_accuracy',
    ),
    'pruning': ('test_accuracy', '*_agreement', 'unpruned_test_accuracy', 'flops_ratio', 'parameters_ratio'),
    'continual': ('test_accuracy', 'finetune_test_accuracy', 'replay_test_accuracy', 'joint_test_accuracy'),
    'quantization': ('float_test_accuracy', 'w*a*.test_accuracy', 'w*a*_agreement'),
}


def run(config: ml_collections.ConfigDict | Settings, workdir) -> dict:
    """Runs those tasks of a config that have no results in `workdir` or have lost files there.

    If there are several processes, all of them must call it, see `runtime.devices`.

    Args:
      config: the config.
      workdir: the path of the work directory.

    Returns:
      The results of all tasks, {task: figures}.

    Raises:
      DvinvError: a user's mistake or a full disk, explained in a sentence. Finished work is kept.
      SystemExit: SIGTERM was received (where `preemption.install` was called). Work in progress is saved.
    """
    run = validated(config, workdir)
    with contextlib.closing(run.open_workdir()):
        for task in run.settings.ordered_tasks:
            preemption.leave_if_asked(_saved(run.workdir))
            if not _is_finished(task, run):
                run_task(task, run)
        return run.workdir.results


def validated(config: ml_collections.ConfigDict | Settings, workdir='') -> Run:
    """Returns the run of a config, after all its tasks have been validated; writes nothing.

    Args:
      config: the config.
      workdir: the path of the work directory, where some tasks may be finished already; '' for a run without one.

    Raises:
      DvinvError: a user's mistake, explained in a sentence.
    """
    run = Run(parse(config), workdir)
    if run.settings.pool and not Path(run.settings.pool).is_dir():
        raise DvinvError(f'pool is {run.settings.pool!r}, but there is no such folder.')
    run.validate_training_data()
    teacher = run.planned_teacher  # raises an error if the teacher cannot be inverted
    if run.settings.synthesis.is_open:
        run.settings = _with_preset(run.settings, teacher)
    for task in run.settings.ordered_tasks:
        MODULES[task].validate(run)
    return run


def run_task(task: str, run: Run) -> None:
    """Runs one task and writes its figures, wall time and seed to results.json."""
    run.workdir.start_clock(task)
    figures = MODULES[task].run(run)
    if figures is not None:
        seconds = round(run.workdir.wall_seconds(task), 2)
        run.workdir.add_results(task, {**figures, 'seed': run.settings.seed, 'wall_seconds': seconds})


def _saved(workdir: Workdir) -> str:
    """Returns a main clause that says which tasks of a run are saved, for a stop between two tasks."""
    finished = ', '.join(workdir.results)
    return f'the results of {finished} are saved' if finished else 'no task was under way, so nothing had to be saved'


def _with_preset(settings: Settings, teacher: Teacher) -> Settings:
    """Returns the settings with the synthesis fields that are None filled from a preset.

    The preset is chosen by the size of the teacher's images. A network that flattens its images takes them at one size only,
    so all stages of the preset are then set to the full resolution.
    """
    filled = settings.with_preset(PRESETS[preset_for(teacher.image_shape)])
    config = filled.inversion_config()
    if settings.synthesis.stages is not None or takes_resolutions(teacher, config):
        return filled
    stages = tuple(dataclasses.replace(stage, resolution=0) for stage in config.stages)
    return dataclasses.replace(filled, synthesis=dataclasses.replace(filled.synthesis, stages=stages))


def _is_finished(task: str, run: Run) -> bool:
    if task == 'report' or task not in run.workdir.results:
        return False
    if not (complete := MODULES[task].complete(run)):
        say(f'{task} has results, but not all of its files are there: it runs again.')
    return complete


def run_seeds(config: ml_collections.ConfigDict | Settings, workdir, count: int) -> dict:
    """Runs `config` with `count` consecutive seeds from config.seed on, each in the folder `workdir`/seed-S; resumable.

    Args:
      config: the config.
      workdir: the path of the folder that holds the folders of all seeds.
      count: the number of seeds.

    Returns:
      {'seeds': list of seeds, 'runs': list of the results of each seed, 'mean': {task: {figure: float}}, 'std': likewise}.
      The same is written to `workdir`/results.json and, if `report` is a task, to a page. The deviation is that of a sample
      (n - 1); it is None for one seed.

    Raises:
      DvinvError: `workdir` holds a single run or other seeds, or as for `run`.
    """
    settings, workdir = parse(config), Path(workdir)
    if (workdir / 'config.json').exists():
        if holds_work(workdir):
            raise DvinvError(f'{workdir} holds a single run; choose another --workdir for several seeds.')
        if is_primary():
            (workdir / 'config.json').unlink(missing_ok=True)  # left by a run that ended without results
    seeds, runs = [settings.seed + i for i in range(count)], []
    folders = {seed: workdir / f'seed-{seed}' for seed in seeds}
    others = sorted(
        {folder.name for folder in workdir.glob('seed-*') if holds_work(folder)} - {f.name for f in folders.values()}
    )
    if others:
        raise DvinvError(
            f'{workdir} holds {", ".join(others)}, which these --seeds do not include; choose another --workdir.'
        )
    for i, (seed, folder) in enumerate(folders.items()):
        if is_primary():
            done = ', '.join(done_already(folder, settings.ordered_tasks))
            skipped = f'; done, not run again: {done}' if done else ''
            say(f'seed {i + 1} of {count} (config.seed is {seed}), in {folder}{skipped}')
        runs.append(run(dataclasses.replace(settings, seed=seed), folder))
    summary = {
        'seeds': seeds,
        'runs': runs,
        'mean': _over(runs, statistics.fmean),
        'std': _over(runs, lambda values: statistics.stdev(values) if len(values) > 1 else None),
    }
    write_atomic(workdir / 'results.json', (json.dumps(summary, indent=2, sort_keys=True) + '\n').encode())
    if 'report' in settings.tasks:
        write_atomic(workdir / 'report.html', _report(settings, summary).encode())
    return summary


def _report(settings: Settings, summary: dict) -> str:
    """Returns the page over all seeds: one table of headline figures per task, and links to the pages of the seeds."""
    seeds, sections, tiles = summary['seeds'], [], []
    for task, patterns in HEADLINES.items():
        mean, std = summary['mean'].get(task, {}), summary['std'].get(task, {})
        if not (names := _headlines(mean, patterns)):
            continue
        rows: list[list[Any]] = [['mean', *_cells(names, mean)], ['standard deviation', *_cells(names, std)]]
        for seed, results in zip(seeds, summary['runs'], strict=True):
            rows.append([(f'seed {seed}', f'seed-{seed}/report.html'), *_cells(names, _flat(results[task]))])
        columns = ['', *(name.replace('_', ' ') for name in names)]
        sections.append(Section(task.capitalize(), tables=[Table(columns, rows, highlight=0)]))
        if names[0].endswith('accuracy'):
            accuracy, spread = mean[names[0]], std[names[0]]
            note = '' if spread is None else f'± {percent(spread)}, '
            tiles.append(Tile(task.capitalize(), percent(accuracy), f'{note}{names[0]}'.replace('_', ' '), accuracy))
    count = len(seeds)
    return render(
        f'{settings.data.name or settings.teacher.factory}: {count} seed{"s" if count > 1 else ""}',
        f'The same config was run with the seeds {listed([*map(str, seeds)])}, so all random numbers differ. Deviations are '
        'those of a sample (n - 1). Each seed has its own report; all figures are in results.json.',
        tiles,
        sections,
        configuration=json.dumps(nested(settings), indent=1, sort_keys=True),
    )


def _cells(names: list[str], figures: dict) -> list[str | float | None]:
    """Returns the figures with these names, formatted as table cells."""
    return [percent(figures[name]) if name.endswith('accuracy') else figures[name] for name in names]


def _over(runs: list[dict], summarise: Callable[[list[float]], float | None]) -> dict:
    """Returns {task: {figure: summary}} of the figures that are numbers in every run."""
    runs = [{task: _flat(figures) for task, figures in results.items()} for results in runs]

    def is_number(results: dict, task: str, figure: str) -> bool:
        return isinstance(results.get(task, {}).get(figure), int | float)

    return {
        task: {
            figure: summarise([results[task][figure] for results in runs])
            for figure in figures
            if figure != 'seed' and all(is_number(results, task, figure) for results in runs)
        }
        for task, figures in runs[0].items()
    }


def _flat(figures: dict) -> dict:
    """Returns the figures of a task as a flat dict; a nested figure is named for instance 'w4a4.test_accuracy'."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        flat |= {f'{name}.{key}': item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def table(summary: dict, workdir) -> str:
    """Returns lines of text with the headline figures by task, the total time, and the paths of report and results.

    Args:
      summary: {'runs': list of the results of each seed}, and optionally 'std', the standard deviations to print.
      workdir: the path of the work directory.
    """
    runs = summary['runs']
    mean, std = _over(runs, statistics.fmean), summary.get('std', {})
    lines = []
    for task, patterns in HEADLINES.items():
        for figure in _headlines(mean.get(task, {}), patterns):
            spread = std.get(task, {}).get(figure)
            deviation = '' if spread is None else f' +- {_short(spread)}'
            lines.append(f'{task:14}{figure:28}{_short(mean[task][figure]):>12}{deviation}')
    seconds = sum(figures['wall_seconds'] for results in runs for figures in results.values())
    lines.append(f'{"time":14}{duration(seconds)}')
    for name, title in (('report.html', 'report'), ('results.json', 'all figures')):
        if (path := Path(workdir) / name).exists():
            lines.append(f'{title:14}{path}')
    return '\n'.join(lines)


def _headlines(figures: dict, patterns: tuple[str, ...]) -> list[str]:
    """Returns the names of the figures that match, in the order of the patterns."""
    return [name for pattern in patterns for name in figures if fnmatch.fnmatchcase(name, pattern)]


def _short(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 or (value == int(value) and value > 1) else f'{value:.4f}'
