"""Adaptive DeepInversion (arXiv 1912.08795, section 3.3): images are made against a student that learns from them meanwhile.

Round r begins with the student as it is after `r * distillation.updates_per_round` updates: a checkpoint. Its batches
compete with that student, and only then does it learn on, from the new images first. What is left of the student's updates
after the last round is the task `distillation`'s, where the student is that one's. Of several processes that share the task
`synthesis` the leader teaches; for the others it leaves the student of the round in the work directory.
"""

from pathlib import Path

from dvinv.configuration import rounds_of
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.held_out import learned_rows
from dvinv.inversion import Teacher
from dvinv.networks import apply_fn_of, load_network, save_network
from dvinv.pools import all_batches, missing_batches
from dvinv.runtime.processes import ALONE, Processes
from dvinv.runtime.waiting import wait_for
from dvinv.runtime.workdir import Workdir
from dvinv.sharing import await_batches
from dvinv.student import lesson_of, module_of_student, print_hints
from dvinv.synthesizer import Synthesizer
from dvinv.training import Learner, training_of


def fill_pool(
    config,
    workdir: Workdir,
    teacher: Teacher,
    pool: ImagePool,
    student: Learner,
    task: str,
    series: str,
    processes: Processes = ALONE,
) -> None:
    """Make the batches that the pool lacks, in rounds, and teach the student in between.

    Args:
      student: see `student.student_of`; its checkpoints stay.
      task, series: what the metrics of the batches go by.
      processes: that share the batches; the others call `fill_share`.

    Raises:
      DvinvError: a batch is missing from a round that the student has left behind.
    """
    missing, rounds, per_round = missing_batches(config, pool), rounds_of(config), config.synthesis.batches_per_round
    if not missing:
        await_batches(workdir, pool, all_batches(config), task, series)  # killed before their measurements were gathered
        return
    lesson = lesson_of(config, teacher, rounds)
    print_hints(config, teacher)
    with (
        training_of(config, workdir, student, lesson) as training,
        Synthesizer(
            config, workdir, teacher, pool, 'adaptive', task, series, student_fn=training.apply_fn, processes=processes
        ) as synthesizer,
    ):
        for number in range(rounds.count):
            mine = [*range(number * per_round, (number + 1) * per_round)]
            lacking = [batch for batch in mine if batch in missing]
            start = rounds.first_update(number)
            if lacking and training.step > start:
                raise DvinvError(
                    f'Batch {lacking[0]} is missing from {pool.folder}. It was made against the student at update '
                    f'{start}, which has learned on to update {training.step}; delete '
                    f'{workdir.path / "checkpoints" / student.name} and {workdir.network(student.name)}, and run the '
                    'command again: the student learns again up to there, and the batch is made anew.'
                )
            if training.step < start:
                training.advance(*(learned_rows(config, pool.rows(name)) for name in ('images', 'labels')), start)
            if lacking:
                if processes.count > 1:
                    save_network(_snapshot(workdir, number), training.variables, {})
                synthesizer.fill(processes.share(lacking), training.variables, round=number, student_updates=start)
            await_batches(workdir, pool, mine, task, series)
            _snapshot(workdir, number).unlink(missing_ok=True)


def fill_share(config, workdir: Workdir, teacher: Teacher, pool: ImagePool) -> None:
    """For all but the leader, in the task `synthesis`: make this process's batches, against the students it has left."""
    rounds, per_round, processes = rounds_of(config), config.synthesis.batches_per_round, workdir.processes
    missing = processes.share(missing_batches(config, pool))
    if not missing:
        return
    student_fn = apply_fn_of(module_of_student(config, teacher))
    with Synthesizer(
        config, workdir, teacher, pool, 'adaptive', 'synthesis', 'adaptive', student_fn=student_fn, processes=processes
    ) as synthesizer:
        for number in sorted({batch // per_round for batch in missing}):
            snapshot = _snapshot(workdir, number)
            wait_for(
                workdir, snapshot.exists, lambda number=number: f'the student of round {number}, which process 0 teaches'
            )
            lacking = [batch for batch in missing if batch // per_round == number]
            variables, _ = load_network(snapshot)
            synthesizer.fill(lacking, variables, round=number, student_updates=rounds.first_update(number))


def _snapshot(workdir: Workdir, number: int) -> Path:
    """The file of a round's student, while the round lasts."""
    return workdir.path / 'checkpoints' / 'rounds' / f'student-{number:06d}.safetensors'
