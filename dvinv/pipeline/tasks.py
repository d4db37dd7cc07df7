"""The pipeline: the tasks of a run, one after the other, each once.

    teacher -> synthesis -> distillation -> pruning -> continual -> quantization -> report

Finished tasks are not run again, and an interrupted task resumes where it stopped: the same command resumes the run.
"""

import contextlib
import dataclasses
from pathlib import Path

import ml_collections

from dvinv.config import PRESETS, Settings, parse, preset_for
from dvinv.continual import task as continual
from dvinv.distillation import task as distillation
from dvinv.errors import DvinvError, say
from dvinv.inversion import Teacher, takes_resolutions
from dvinv.pipeline.run import Run
from dvinv.pruning import task as pruning
from dvinv.quantization import task as quantization
from dvinv.report import task as report
from dvinv.runtime import preemption
from dvinv.runtime.workdir import Workdir
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


def run(config: ml_collections.ConfigDict | Settings, workdir) -> dict:
    """Runs those tasks of a config that have no results in `workdir` or have lost files there.

    If there are several processes, all of them must call it, see `runtime.processes`.

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
