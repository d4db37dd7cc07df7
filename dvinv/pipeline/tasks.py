"""The pipeline: the tasks of a run, one after the other, each once.

    teacher -> synthesis -> distillation -> pruning -> continual -> quantization -> report

What is finished is not run again, and what was interrupted goes on where it was: the same command resumes.
"""

import contextlib
import dataclasses
from pathlib import Path

import ml_collections

from dvinv.config import PRESETS, TASKS, Settings, parse, preset_for
from dvinv.continual import task as continual
from dvinv.distillation import task as distillation
from dvinv.errors import DvinvError, say
from dvinv.inversion import takes_resolutions
from dvinv.pipeline.run import Run
from dvinv.pruning import task as pruning
from dvinv.quantization import task as quantization
from dvinv.report import task as report
from dvinv.runtime import preemption
from dvinv.runtime.workdir import Workdir
from dvinv.synthesis import task as synthesis
from dvinv.teacher import task as teacher

# Of every task: `validate(run)`, `run(run)` and, but for the report, `complete(run)`.
MODULES = {
    'teacher': teacher,
    'synthesis': synthesis,
    'distillation': distillation,
    'pruning': pruning,
    'continual': continual,
    'quantization': quantization,
    'report': report,
}


def run(config: ml_collections.ConfigDict | Settings, workdir) -> dict:
    """Runs the tasks of a config that `workdir` has no results of yet, or lost files of; returns all results, by task.

    Of several processes all call it, see `runtime.processes`.

    Args:
      workdir: path of the work directory.

    Raises:
      DvinvError: a user's mistake or a full disk, in a sentence. What was finished stays.
      SystemExit: SIGTERM came (where `preemption.install` was called). What was under way is saved.
    """
    run = validated(config, workdir)
    with contextlib.closing(run.open_workdir()):
        for task in TASKS:
            preemption.leave_if_asked(_saved(run.workdir))
            if task in run.settings.tasks and not _is_finished(task, run):
                run_task(task, run)
        return run.workdir.results


def validated(config: ml_collections.ConfigDict | Settings, workdir='') -> Run:
    """Returns the run of a config, when all that can be known to fail has been refused; nothing is written yet.

    Args:
      workdir: path of the work directory, where some of it may be done already; '': there will be none.

    Raises:
      DvinvError: a user's mistake, in a sentence.
    """
    run = Run(parse(config), workdir)
    if run.settings.synthesis.is_open:
        run.settings = _with_preset(run)
    if run.settings.pool and not Path(run.settings.pool).is_dir():
        raise DvinvError(f'pool is {run.settings.pool!r}, but there is no such folder.')
    run.validate_training_data()
    _ = run.planned_teacher  # refuses one that cannot be inverted
    for task in TASKS:
        if task in run.settings.tasks:
            MODULES[task].validate(run)
    return run


def run_task(task: str, run: Run) -> None:
    """Runs one task: its figures, its time and its seed go into results.json."""
    run.workdir.start_clock(task)
    figures = MODULES[task].run(run)
    if figures is not None:
        seconds = round(run.workdir.wall_seconds(task), 2)
        run.workdir.add_results(task, {**figures, 'seed': run.settings.seed, 'wall_seconds': seconds})


def _saved(workdir: Workdir) -> str:
    """Returns what is saved of a run between two tasks."""
    finished = ', '.join(workdir.results)
    return f'what {finished} made is saved' if finished else 'no task was under way, so nothing had to be saved'


def _with_preset(run: Run) -> Settings:
    """Returns the settings with the fields of the synthesis that are None as in the preset for images of the teacher's size.

    A network that flattens its images takes them at one size: its stages are all at the full resolution.
    """
    chosen, settings = run.settings.synthesis.stages is None, run.settings.with_preset(PRESETS[preset_for(run.image_shape)])
    if not chosen or takes_resolutions(run.planned_teacher, settings.inversion_config()):
        return settings
    stages = tuple(dataclasses.replace(stage, resolution=0) for stage in settings.synthesis.stages)
    return dataclasses.replace(settings, synthesis=dataclasses.replace(settings.synthesis, stages=stages))


def _is_finished(task: str, run: Run) -> bool:
    if task == 'report' or task not in run.workdir.results:
        return False
    if not (complete := MODULES[task].complete(run)):
        say(f'{task} has results, but not all of its files are there: it runs again.')
    return complete
