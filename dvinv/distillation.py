"""The task `distillation`: a student learns from the teacher's answers on synthesized images; controls learn beside it."""

from dvinv.configuration import DATA_FREE_CONTROLS, rounds_of
from dvinv.data.real import load_real
from dvinv.errors import DvinvError
from dvinv.evaluation import flops
from dvinv.held_out import HeldOut, learned_rows
from dvinv.inversion import Teacher
from dvinv.networks import Classifier
from dvinv.pools import controls_are_whole, finished_pool
from dvinv.rounds import Rounds
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.student import hints_of, lesson_of, print_hints, student_of
from dvinv.synthesizer import control_pool
from dvinv.teacher import load, test_accuracy
from dvinv.training import Array, PlannedTraining, learn


def run(config, workdir) -> dict:
    """Distil the student and its controls, then score them on the real test images; returns the figures.

    Real data come in when every data-free student is finished: first for the upper control, then for the scores.
    """
    workdir = open_workdir(workdir, config)
    teacher, rounds = load(config, workdir), rounds_of(config)
    pool = finished_pool(config, workdir, teacher)
    images, labels = (learned_rows(config, pool.rows(name)) for name in ('images', 'labels'))
    if config.pool:
        rounds = Rounds(len(labels))  # it is there from the start
    for count in config.distillation.counts:
        if count > len(labels):
            raise DvinvError(f'distillation.counts names {count}, but the pool has {len(labels)} images to learn from.')
    hints = hints_of(config, teacher)
    if config.synthesis.method != 'adaptive' and not workdir.has_network('student'):
        print_hints(config, teacher)
    students = {'student': distil(config, workdir, teacher, images, labels, rounds, 'student')}
    for count in config.distillation.counts:
        name = f'student_of_{count}'
        students[name] = distil(config, workdir, teacher, images, labels, Rounds(count), name)
    for control in DATA_FREE_CONTROLS:
        if control in config.distillation.controls:
            lesser = control_pool(config, workdir, teacher, control, 'distillation')
            rows = [learned_rows(config, lesser.rows(name)) for name in ('images', 'labels')]
            come = Rounds(len(rows[1])) if config.pool else rounds
            students[control] = distil(config, workdir, teacher, *rows, come, control)

    data = load_real(config.data)
    if 'real' in config.distillation.controls:
        train = data.train
        students['real'] = distil(config, workdir, teacher, train.images, train.labels, Rounds(len(train.labels)), 'real')
    held_out = HeldOut(config, teacher, pool)
    scores = {name: test_accuracy(student, data) for name, student in students.items()}
    student = students['student']
    return {
        'test_accuracy': scores['student'],
        **{f'{control}_test_accuracy': scores.get(control) for control in (*DATA_FREE_CONTROLS, 'real')},
        **{f'test_accuracy_of_{count}_images': scores[f'student_of_{count}'] for count in config.distillation.counts},
        **held_out.beside(students, 'student'),
        'parameters': student.parameters,
        'parameters_ratio': student.parameters / teacher.parameters,
        'flops': flops(student),
        'images': len(labels),
        'updates': config.distillation.updates,
        'hints': hints.kind,
        'hinted_layers': len(hints.layers),
        'hinted_stages': hints.rows(),
    }


def planned_trainings(config, teacher: Teacher) -> list[PlannedTraining]:
    """Returns the trainings of the task, for `--plan`: the student's, and as many again as there are others to compare."""
    module, lesson = student_of(config, teacher).module, lesson_of(config, teacher, rounds_of(config))
    others = len(config.distillation.counts) + len(config.distillation.controls) if 'distillation' in config.tasks else 0
    return [PlannedTraining('student', module, lesson, teacher, 1 + others, teacher)]


def complete(config, workdir: Workdir) -> bool:
    """Whether student and controls' images are still there: what is damaged is deleted by its owner."""
    whole = controls_are_whole(config, workdir, config.distillation.controls)
    return whole and workdir.has_network('student')


def distil(
    config, workdir: Workdir, teacher: Teacher, images: Array, labels: Array, rounds: Rounds, name: str
) -> Classifier:
    """A student taught by `teacher` on `images` uint8 [N, H, W, C] that come in `rounds`; all compared ones start alike."""
    return learn(config, workdir, student_of(config, teacher, name), lesson_of(config, teacher, rounds), images, labels)
