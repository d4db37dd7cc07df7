"""Adaptive DeepInversion (arXiv 1912.08795, section 3.3): images compete with a student that is trained on earlier images.

Round r begins with the student after `r * distillation.updates_per_round` updates, which is a checkpoint. The batches of the
round compete with that student. After that the student is trained further, first on the new images. The task `distillation`
makes the remaining updates after the last round, if the student is its own.
"""

from dvinv.data.pool import ImagePool
from dvinv.distillation.student import hints_of, job_of, print_hints
from dvinv.errors import DvinvError
from dvinv.evaluation.held_out import training_set
from dvinv.inversion import Teacher
from dvinv.pipeline.run import Run
from dvinv.runtime.processes import decide
from dvinv.synthesis.pools import missing_batches
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.sampling import rounds_of
from dvinv.training.targets import TrainTarget, training_of


def fill_in_competition(run: Run, teacher: Teacher, pool: ImagePool, student: TrainTarget, task: str, series: str) -> None:
    """Makes the batches that are missing from the pool, in rounds, and trains the student between rounds.

    Args:
      run: the run.
      teacher: the network that is inverted.
      pool: the pool to fill.
      student: the competitor, see `student.student_of`; its checkpoints are kept.
      task, series: the names of the task and of the series in the metrics of the batches.

    Raises:
      DvinvError: a batch is missing from a round that the student has already trained past, a sidecar is damaged, or the
        pool was made from another teacher.
      SystemExit: SIGTERM was received; see `Synthesizer.fill` and `Training.advance`.
    """
    settings = run.settings.synthesis
    missing, rounds, per_round = missing_batches(settings, pool), rounds_of(run.settings), settings.batches_per_round
    if not missing:
        return
    decide(lambda: [pool.sidecar(number) for number in pool.numbers()] and None, 'a look at the pool')
    hints = hints_of(run, teacher)
    print_hints(hints)
    with (
        training_of(run, student, job_of(run, teacher, rounds, hints)) as training,
        Synthesizer(run, teacher, pool, 'adaptive', task, series, student_fn=training.apply_fn) as synthesizer,
    ):
        for number in range(rounds.count):
            unfinished = [batch for batch in range(number * per_round, (number + 1) * per_round) if batch in missing]
            start = rounds.first_update(number)
            if unfinished and training.step > start:
                raise DvinvError(
                    f'Batch {unfinished[0]} is missing from {pool.folder}. It was made against the student at update '
                    f'{start}, which has since been trained to update {training.step}; delete '
                    f'{run.workdir.path / "checkpoints" / student.name} and {run.workdir.network(student.name)}, and run '
                    'the command again, which trains the student again up to there and makes the batch again.'
                )
            if training.step < start:
                training.advance(*training_set(run.settings, pool), start)
            if unfinished:
                synthesizer.fill(unfinished, training.variables, round=number, student_updates=start)
