"""Adaptive DeepInversion (arXiv 1912.08795, section 3.3): images are made against a student that learns from them meanwhile.

Round r begins with the student as it is after `r * distillation.updates_per_round` updates: a checkpoint. Its batches
compete with that student, and only then does it learn on, from the new images first. What is left of the student's updates
after the last round is the task `distillation`'s, where the student is that one's.
"""

from dvinv.data.pool import ImagePool
from dvinv.distillation.student import job_of, print_hints
from dvinv.errors import DvinvError
from dvinv.evaluation.held_out import training_rows
from dvinv.inversion import Teacher
from dvinv.pipeline.run import Run
from dvinv.runtime.processes import decide
from dvinv.synthesis.pools import missing_batches
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.sampling import rounds_of
from dvinv.training.trainer import TrainTarget, training_of


def fill_pool(run: Run, teacher: Teacher, pool: ImagePool, student: TrainTarget, task: str, series: str) -> None:
    """Makes the batches that are missing from the pool, in rounds, and trains the student in between.

    Args:
      student: see `student.student_of`; its checkpoints stay.
      task, series: what the metrics of the batches go by.

    Raises:
      DvinvError: a batch is missing from a round that the student has left behind, a sidecar is damaged, or the pool is of
        another teacher.
    """
    settings = run.settings.synthesis
    missing, rounds, per_round = missing_batches(settings, pool), rounds_of(run.settings), settings.batches_per_round
    if not missing:
        return
    decide(lambda: [pool.notes(number) for number in pool.numbers()] and None, 'a look at the pool')
    job = job_of(run, teacher, rounds)
    print_hints(run, teacher)
    with (
        training_of(run, student, job) as training,
        Synthesizer(run, teacher, pool, 'adaptive', task, series, student_fn=training.apply_fn) as synthesizer,
    ):
        for number in range(rounds.count):
            lacking = [batch for batch in range(number * per_round, (number + 1) * per_round) if batch in missing]
            start = rounds.first_update(number)
            if lacking and training.step > start:
                raise DvinvError(
                    f'Batch {lacking[0]} is missing from {pool.folder}. It was made against the student at update '
                    f'{start}, which has learned on to update {training.step}; delete '
                    f'{run.workdir.path / "checkpoints" / student.name} and {run.workdir.network(student.name)}, and run '
                    'the command again: the student learns again up to there, and the batch is made anew.'
                )
            if training.step < start:
                training.advance(*(training_rows(run.settings, pool.rows(name)) for name in ('images', 'labels')), start)
            if lacking:
                synthesizer.fill(lacking, training.variables, round=number, student_updates=start)
