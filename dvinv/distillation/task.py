"""The task `distillation`: trains a student on the teacher's logits on synthesized images, and controls for comparison."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dvinv.config import DATA_FREE_CONTROLS, DistillationSettings
from dvinv.data.dataset import RowArray
from dvinv.distillation.student import hints_of, job_of, prefix_of, print_hints, student_of, validate_student
from dvinv.evaluation import HeldOut, flops, test_accuracy, training_set
from dvinv.networks import Classifier, load_classifier
from dvinv.pipeline.run import Run
from dvinv.report.charts import Chart, line_chart, loss_chart, mean_curves
from dvinv.report.page import Section, Table, Tile, agreement_table, number, percent, reads_right
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Metrics
from dvinv.synthesis.pools import controls_are_complete, finished_pool
from dvinv.synthesis.synthesizer import control_pool, validate_synthesis
from dvinv.training.step import Rounds, rounds_of
from dvinv.training.trainer import PlannedTraining, TrainTarget, snapshot_name, train_network

STUDENTS = MappingProxyType(
    {
        'student': 'Synthesized images',
        'real': 'Real training images (upper control)',
        'prior_only': 'Images without the feature term',
        'noise': 'Noise images',
    }
)


def validate(run: Run) -> None:
    """Validates the student, and that its controls have images, before anything is written.

    Raises:
      DvinvError: one is invalid; the message names the field, its value and the way out.
    """
    run.validate_real_control('distillation')
    run.once(validate_student)
    if run.settings.has_data_free_controls('distillation'):
        run.once(validate_synthesis)


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


def distillation_section(settings: DistillationSettings, results: dict, metrics: Metrics, names: Sequence[str]) -> Section:
    """Returns the section.

    Args:
      settings: the settings of the task.
      results: the figures of all tasks in results.json.
      metrics: the metrics of the run.
      names: the names of classes in the order of labels; () to show numbers.
    """
    found, teacher = results['distillation'], results.get('teacher', {})
    students = {name: STUDENTS[name] for name in STUDENTS if name == 'student' or name in settings.controls}
    layers, stages, held_out = (found.get(name) for name in ('hinted_layers', 'hinted_stages', 'held_out_images'))
    hints = f', with hints from {layers} BatchNorm layers of the teacher' if layers else ''
    hints = f', with hints from {len(stages)} stages of the teacher' if stages else hints
    caption = (
        f'The same student ({found["parameters"]:,} parameters, {found["parameters_ratio"]:.2f} of the '
        f"teacher's), {found['updates']:,} updates each{hints}; last update, never the best."
    )
    prefixes = {name: prefix_of(name) for name in students}
    if held_out:  # there are no real images to score on
        columns = ['agrees with the teacher', 'KL']
        rows = [
            [
                label,
                percent(found.get(f'{prefixes[name]}held_out_agreement')),
                number(found.get(f'{prefixes[name]}held_out_kl')),
            ]
            for name, label in students.items()
        ]
        caption += f' Compared on {held_out:,} synthesized images that no student learned from.'
    else:
        columns = ['real test accuracy']
        rows = [[label, percent(found[f'{prefixes[name]}test_accuracy'])] for name, label in students.items()]
        if teacher:
            rows.append(['The teacher itself', percent(teacher['test_accuracy'])])
    tables = [Table(('Student distilled from', *columns), rows, highlight=0, caption=caption)]
    if points := _measured_counts(settings.counts, found):
        caption = 'Students trained on the first images only, all available from the start, with equally many updates.'
        rows = [[number(count), percent(score)] for count, score in points.items()]
        tables.append(Table(('Images', 'real test accuracy'), rows, caption=caption))
    if stages:
        header = 'Resolution', 'teacher', 'student', 'projection'
        tables.append(Table(header, stages, caption='Stages after which student and teacher are compared.', text_columns=4))
    if shares := found.get('held_out_class_agreement'):
        tables.append(agreement_table(shares, names))
    accuracy, agreement = found['test_accuracy'], found.get('held_out_agreement')
    text = f"The student has {found['parameters_ratio']:.2f} of the teacher's parameters and learned from it alone"
    text += f'; it {_agrees(found)}' if held_out else reads_right(accuracy, teacher.get('test_accuracy'), 'the teacher')
    tile = Tile('Student', percent(accuracy), 'real test accuracy', accuracy)
    if agreement is not None:
        tile = Tile('Student', percent(agreement), 'agrees with the teacher, synthesized images', agreement)
    return Section(
        'Distillation',
        text,
        tables=tables,
        charts=[
            training_losses(metrics, students, bool(hints)),
            accuracy_by_image_count(settings.counts, found),
            accuracy_by_images_seen(settings, found),
        ],
        tiles=[tile],
        summary=_summary(found) if 'synthesis' in results else '',
    )


def training_losses(metrics: Metrics, students: Mapping[str, str] = STUDENTS, hinted: bool = False) -> Chart | None:
    """Draws the losses of the trainings of students.

    Args:
      metrics: the metrics of the run.
      students: {name of a student in the metrics: its name for readers}.
      hinted: whether the loss includes hints.
    """
    curves = {label: mean_curves(metrics.lines('distillation', name), ['loss'])['loss'] for name, label in students.items()}
    return loss_chart(
        curves, f'Distillation loss, T² KL{" and hints" if hinted else " to the teacher"} on its own images', 'loss'
    )


def accuracy_by_image_count(counts: Sequence[int], found: dict) -> Chart | None:
    """Draws the accuracy of the student against the number of its images; None if it was not measured.

    Args:
      counts: the numbers of images.
      found: the figures of the task in results.json.
    """
    points = _measured_counts(counts, found)
    curve = {'Student': ([*points], [*points.values()])}
    return line_chart(curve, 'Student accuracy against image count', 'images', 'real test accuracy', log_x=True)


def accuracy_by_images_seen(settings: DistillationSettings, found: dict) -> Chart | None:
    """Draws the accuracy of the student and of its controls against the images seen, updates times batch size.

    Without real test images, draws their agreement with the teacher on images that were held out.

    Args:
      settings: the settings of the task; `curve_points` says where students were scored.
      found: the figures of the task in results.json.

    Returns:
      The chart; None if nothing was measured before the last update.
    """
    curves = {}
    figure, drawn, label = 'test_accuracy', 'accuracy', 'real test accuracy'
    if found['test_accuracy'] is None:
        figure, drawn, label = 'held_out_agreement', 'agreement with the teacher', 'agreement, synthesized images'
    for name in ('student', *settings.controls):
        prefix = prefix_of(name)
        scores = {n: found.get(f'{prefix}{figure}_after_{n}_updates') for n in settings.curve_updates}
        scores[settings.updates] = found.get(f'{prefix}{figure}')
        points = {settings.batch_size * n: score for n, score in scores.items() if score is not None}
        if len(points) > 1:
            curves[STUDENTS[name]] = ([*points], [*points.values()])
    return line_chart(curves, f'Student {drawn} against images seen', 'images seen', label)


def _measured_counts(counts: Sequence[int], found: dict) -> dict[int, float]:
    """Returns {number of images: accuracy} for the numbers that were measured, ascending."""
    scores = {count: found.get(f'test_accuracy_of_{count}_images') for count in sorted(counts)}
    return {count: score for count, score in scores.items() if score is not None}


def _summary(found: dict) -> str:
    """Returns the sentence about the student, which follows that about its images."""
    if found['test_accuracy'] is None:
        return f'A student that learned from them {_agrees(found)}' if found.get('held_out_images') else ''
    return (
        'A student that never saw a real image learned from them, and reads '
        f'{percent(found["test_accuracy"])} of the real test images right.'
    )


def _agrees(found: dict) -> str:
    """Returns the end of a sentence about a student that is compared with the teacher without real images."""
    return (
        f'agrees with the teacher on {percent(found["held_out_agreement"])} of {found["held_out_images"]:,} synthesized '
        'images that it did not learn from. How many real images it reads right only real images can tell: often far fewer.'
    )
