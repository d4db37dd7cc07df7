"""The task `distillation`: training a student on the teacher's logits on synthesized images, and controls for comparison."""

import dataclasses

from dvinv.config import DATA_FREE_CONTROLS
from dvinv.data.rows import RowArray
from dvinv.distillation import student
from dvinv.distillation.student import hints_of, job_of, prefix_of, print_hints, student_of
from dvinv.errors import DvinvError
from dvinv.evaluation.held_out import HeldOut, training_set
from dvinv.evaluation.scoring import flops, test_accuracy
from dvinv.networks import Classifier, load_classifier
from dvinv.pipeline.run import Run
from dvinv.synthesis import synthesizer
from dvinv.synthesis.pools import controls_are_complete, finished_pool
from dvinv.synthesis.synthesizer import control_pool
from dvinv.training.sampling import Rounds, rounds_of
from dvinv.training.targets import PlannedTraining, TrainTarget, snapshot_name, train_network


def validate(run: Run) -> None:
    """Validates the student, and that its controls have images, before anything is written.

    Raises:
      DvinvError: one is invalid; the message names the field, its value and the way out.
    """
    run.validate_real_control('distillation')
    run.once(student.validate)
    if run.settings.has_data_free_controls('distillation'):
        run.once(synthesizer.validate)


def run(run: Run) -> dict:
    """Distils the student and its controls, then scores them on the real test images; returns the figures.

    Real data are read when every data-free student is finished: first for the upper control, then for the scores.
    """
    settings, teacher, rounds = run.settings.distillation, run.teacher, rounds_of(run.settings)
    pool = finished_pool(run)
    images, labels = training_set(run.settings, pool)
    if run.settings.pool:
        rounds = Rounds(len(labels))  # a given pool is complete from the start
    for count in settings.counts:
        if count > len(labels):
            raise DvinvError(f'distillation.counts names {count}, but the pool has {len(labels)} images to learn from.')
    hints = hints_of(run, teacher)
    if (run.settings.pool or run.settings.synthesis.method != 'adaptive') and not run.workdir.has_network('student'):
        print_hints(hints)

    def distil(name: str, images: RowArray, labels: RowArray, rounds: Rounds, snapshots: bool = True) -> Classifier:
        target = student_of(run, teacher, name)
        target = target if snapshots else dataclasses.replace(target, snapshots=())
        network = train_network(run, target, job_of(run, teacher, rounds, hints), images, labels)
        _validate_snapshots(run, target)
        return network

    students = {'student': distil('student', images, labels, rounds)}
    for count in settings.counts:
        name = f'student_of_{count}'
        students[name] = distil(name, images, labels, Rounds(count), snapshots=False)
    for control in DATA_FREE_CONTROLS:
        if control in settings.controls:
            control_images, control_labels = training_set(run.settings, control_pool(run, control, 'distillation'))
            control_rounds = Rounds(len(control_labels)) if run.settings.pool else rounds
            students[control] = distil(control, control_images, control_labels, control_rounds)

    if 'real' in settings.controls:
        real = run.training_split
        students['real'] = distil('real', real.images, real.labels, Rounds(len(real.labels)))
    held_out = HeldOut(run.settings, teacher, pool)
    scores = {name: test_accuracy(student, run.data) for name, student in students.items()}
    curve: dict[str, float | None] = {}
    for name in ('student', *settings.controls) if settings.curve_updates else ():
        curve |= _scores_of_snapshots(run, student_of(run, teacher, name), held_out)
    student = students['student']
    return {
        'test_accuracy': scores['student'],
        **{f'{control}_test_accuracy': scores.get(control) for control in (*DATA_FREE_CONTROLS, 'real')},
        **{f'test_accuracy_of_{count}_images': scores[f'student_of_{count}'] for count in settings.counts},
        **curve,
        **held_out.beside(students, 'student'),
        'parameters': student.parameters,
        'parameters_ratio': student.parameters / teacher.parameters,
        'flops': flops(student),
        'images': len(labels),
        'updates': settings.updates,
        'hints': hints.kind,
        'hinted_layers': len(hints.layers),
        'hinted_stages': hints.rows(),
    }


def _validate_snapshots(run: Run, student: TrainTarget) -> None:
    """Validates that the files of a trained student's snapshots exist.

    Raises:
      DvinvError: the file of one of them is missing.
    """
    for update in student.snapshots:
        file = snapshot_name(student.name, update)
        if not run.workdir.has_network(file):
            raise DvinvError(
                f'{run.workdir.network(file)} is missing, a point of the curve (distillation.curve_points); delete '
                f'{run.workdir.path / "checkpoints" / student.name} and {run.workdir.network(student.name)}, and run the '
                'command again, which trains this student again.'
            )


def _scores_of_snapshots(run: Run, student: TrainTarget, held_out: HeldOut) -> dict[str, float | None]:
    """Scores a student at the points of its curve before the last one.

    Returns:
      {'[<control>_]test_accuracy_after_N_updates': accuracy, None without real test images}, and where images are held out
      also '[<control>_]held_out_agreement_after_N_updates'.
    """
    scores: dict[str, float | None] = {}
    for update in student.snapshots:
        network = load_classifier(run.workdir.network(snapshot_name(student.name, update)), student.user_module)
        figures = {'test_accuracy': test_accuracy(network, run.data)}
        if held_out.count:
            figures['held_out_agreement'] = held_out.figures(network)['held_out_agreement']
        scores |= {f'{prefix_of(student.name)}{name}_after_{update}_updates': value for name, value in figures.items()}
    return scores


def planned_trainings(run: Run) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`: the student's, repeated for every other student to compare."""
    settings, teacher = run.settings.distillation, run.planned_teacher
    job = job_of(run, teacher, rounds_of(run.settings), hints_of(run, teacher))
    others = len(settings.counts) + len(settings.controls) if 'distillation' in run.settings.tasks else 0
    return [PlannedTraining('student', run.student_module(teacher), job, teacher, 1 + others, teacher)]


def complete(run: Run) -> bool:
    """Returns whether student and images of controls still exist; users delete damaged files to recompute them."""
    return controls_are_complete(run, run.settings.distillation.controls) and run.workdir.has_network('student')
