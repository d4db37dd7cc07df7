"""Stages 'vgg11' and 'resnet34' of gpu.py: columns of the paper's table of students on CIFAR-10.

Every item is a run of `python -m dvinv.main` on the column's config. The teacher is trained once, on the 50,000 JPEG
training images; the others start from its weights and differ in seed, student network and `synthesis.method` alone. Scores
are of the last update, on the 10,000 JPEG test images.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

from gpu_report import DONE, Item
from gpu_runs import ENDED, Run, run_side_by_side

TEST, TRAIN = 'cifar10_test_jpeg.npz', 'cifar10_train_jpeg.npz'
CONFIGS = {'vgg11': 'configs/cifar10_vgg11.py', 'resnet34': 'configs/cifar10_resnet34.py'}
STUDENTS = {'vgg11': ('vgg11_bn', 'cifar_resnet18'), 'resnet34': ('cifar_resnet18',)}  # the main one first
# A rehearsal has the config's argument `smoke`, and networks that compile in seconds.
REHEARSED = (
    '--config.devices=1',
    '--config.data.image_size=0',
    '--config.teacher.network=small_resnet',
    '--config.teacher.width=0.25',
    '--config.student.network=small_resnet',
    '--config.student.width=0.125',
)


class Student(NamedTuple):
    """One student; see `items`."""

    method: str
    network: str
    seed: int
    level: int


def students_of(stage: str) -> dict[str, Student]:
    """Returns the students of a column, in the order of their worth."""
    main, *others = STUDENTS[stage]
    students = [Student(method, main, 0, 1) for method in ('adaptive', 'deepinversion')]
    students += [Student(method, network, 0, 2) for network in others for method in ('adaptive', 'deepinversion')]
    students += [Student(method, main, 0, 2) for method in ('prior_only', 'noise')]
    students += [Student(method, main, seed, 2) for seed in (1, 2) for method in ('adaptive', 'deepinversion')]
    return {f'{student.network}_{student.method}_seed{student.seed}': student for student in students}


def items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns what the stage measures: the teacher, its students, and what follows from them."""
    teacher = ('network', 'test_accuracy', 'test_images', 'parameters', 'minutes', 'minutes_with_start')
    student = (
        'method',
        'student_network',
        'seed',
        'teacher_test_accuracy',
        'test_accuracy',
        'points_below_teacher',
        'images',
        'iterations',
        'updates',
        'teacher_accuracy_of_images',
        'feature_loss_first',
        'feature_loss_last',
        'feature_loss_real',
        'synthesis_minutes',
        'distillation_minutes',
        'minutes_with_start',  # compilation, reading and scoring included
        'runs_side_by_side',  # that shared the GPU at most
    )
    summary = {
        network: dict.fromkeys(('seeds', 'adaptive_points_below_teacher', 'plain_points_below_teacher', 'adaptive_ahead'))
        for network in STUDENTS[stage]
    }
    students = {
        name: Item(each.level, 5 if rehearse else 45, dict.fromkeys(student)) for name, each in students_of(stage).items()
    }
    return {'teacher': Item(1, 5 if rehearse else 60, dict.fromkeys(teacher)), **students, 'summary': Item(1, 0, summary)}


def measure(names: list[str], context) -> None:
    """Measures these items: the teacher alone, then several students side by side.

    A teacher that was trained on a machine that is gone is trained again.
    """
    names = [name for name in names if name != 'summary']
    column = Column(context)
    if names and not column.weights.exists() and 'teacher' not in names:
        names.insert(0, 'teacher')
    try:
        if 'teacher' in names:
            column.measure(['teacher'], 1)
        if column.weights.exists():
            column.measure([name for name in names if name != 'teacher'], context.settings.side_by_side)
        else:
            for name in names:
                if name != 'teacher':
                    context.report.excuse(name, 'skipped: there is no teacher')
    finally:
        summarise(context)


class Column:
    """The runs of a stage.

    Attributes:
      weights: the file of the trained teacher.
    """

    def __init__(self, context):
        """Starts nothing yet."""
        self._context, self._folder = context, Path(context.settings.workdir) / context.stage
        self.weights = self._folder / 'teacher' / 'networks' / 'teacher.safetensors'
        self._side_by_side = 1

    def measure(self, names: list[str], side_by_side: int) -> None:
        """Runs these items, so many at a time; at the deadline they are ended, saved where they can be."""
        self._side_by_side = min(side_by_side, max(1, len(names)))
        run_side_by_side(names, self._side_by_side, self._start, self._finish, self._context.remaining)

    def _start(self, name: str) -> Run | None:
        if not self._context.enough_time(name):
            return None
        self._context.report.begin(name)
        flags = flags_of(name, self._context, self.weights)
        return Run(self._folder / name, flags, 0.85 / self._side_by_side)

    def _finish(self, name: str, run: Run) -> None:
        """Records what a run left, whatever way it ended."""
        report = self._context.report
        report.add_seconds(name, run.seconds)
        if run.status == 0:
            report.record(name, self._figures(name, run))
            report.finish(name)
        elif run.status in ENDED:
            report.excuse(name, f'ended when its time was over; finished tasks: {", ".join(run.results) or "none"}')
        else:
            report.fail(name, run.explain())

    def _figures(self, name: str, run: Run) -> dict:
        """Returns the figures of an item from the results of its run."""
        results, report = run.results, self._context.report
        teacher = results['teacher']
        minutes = report.seconds(name) / 60
        if name == 'teacher':
            return {
                'network': run.config['teacher']['network'],
                **{field: teacher[field] for field in ('test_accuracy', 'test_images', 'parameters')},
                'minutes': teacher['wall_seconds'] / 60,
                'minutes_with_start': minutes,
            }
        student, made, trained = students_of(self._context.stage)[name], results['synthesis'], results['distillation']
        return {
            'method': student.method,
            'student_network': run.config['student']['network'],
            'seed': student.seed,
            'teacher_test_accuracy': teacher['test_accuracy'],
            'test_accuracy': trained['test_accuracy'],
            'points_below_teacher': 100 * (teacher['test_accuracy'] - trained['test_accuracy']),
            'images': made['images'],
            'iterations': made['iterations'],
            'updates': trained['updates'],
            'teacher_accuracy_of_images': made['teacher_accuracy'],
            **{f'feature_loss_{when}': made[f'feature_loss_{when}'] for when in ('first', 'last', 'real')},
            'synthesis_minutes': made['wall_seconds'] / 60,
            'distillation_minutes': trained['wall_seconds'] / 60,
            'minutes_with_start': minutes,
            'runs_side_by_side': self._side_by_side,
        }


def flags_of(name: str, context, weights: Path) -> list[str]:
    """Returns the flags of an item's run, without its work directory."""
    settings, data = context.settings, Path(context.settings.data)
    flags = [
        '--config',
        CONFIGS[context.stage] + (':smoke' if settings.rehearse else ''),
        '--config.verifier.network=',
        '--config.distillation.controls=()',
        *settings.run_flags,
    ]
    if settings.rehearse:
        flags += REHEARSED
    else:
        flags += ['--config.data.name=npz', f'--config.data.path={data / TEST}', f'--config.data.train_path={data / TRAIN}']
    if name == 'teacher':
        return [*flags, "--config.tasks=('teacher',)"]
    student = students_of(context.stage)[name]
    return [
        *flags,
        f'--config.teacher.weights={weights}',
        "--config.tasks=('teacher', 'synthesis', 'distillation')",
        f'--config.synthesis.method={student.method}',
        f'--config.seed={student.seed}',
        *([] if settings.rehearse else [f'--config.student.network={student.network}']),
    ]


def summarise(context) -> None:
    """Compares adaptive and plain DeepInversion over the seeds that have both; a student network each."""
    report, stage = context.report, context.stage
    students = students_of(stage)
    report.begin('summary')
    for network in STUDENTS[stage]:
        gaps = {
            (student.method, student.seed): report.figures(name)['points_below_teacher']
            for name, student in students.items()
            if student.network == network and report.state(name) == DONE
        }
        seeds = [seed for method, seed in gaps if method == 'adaptive' and ('deepinversion', seed) in gaps]
        if not seeds:
            report.excuse('summary', 'no seed has both students', network)
            continue
        adaptive, plain = (
            statistics.fmean(gaps[method, seed] for seed in seeds) for method in ('adaptive', 'deepinversion')
        )
        figures = {
            'seeds': seeds,
            'adaptive_points_below_teacher': adaptive,
            'plain_points_below_teacher': plain,
            'adaptive_ahead': adaptive < plain,
        }
        report.record('summary', figures, network)
    if all(report.state(name) == DONE for name, student in students.items() if student.level == 1):
        report.finish('summary')
