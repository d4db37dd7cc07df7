"""The task `distillation`: a student learns from the teacher's answers on synthesized images; controls learn beside it."""

import jax
import jax.numpy as jnp
import numpy as np

from dvinv.configuration import recipe_of
from dvinv.data.pool import ImagePool
from dvinv.data.real import load_real
from dvinv.evaluation import flops
from dvinv.inversion import Teacher
from dvinv.networks import Classifier
from dvinv.runtime.workdir import Workdir, open_workdir
from dvinv.synthesis import fill_pool, open_pool
from dvinv.teacher import load, test_accuracy
from dvinv.training import Lesson, learn

ROLE = 3
DATA_FREE_CONTROLS = ('noise', 'prior_only')


def run(config, workdir) -> dict:
    """Distil the student and its controls, then score them on the real test images; returns the figures.

    Real data are read only when every data-free student is finished: first for the upper control, then for the scores.
    """
    workdir = open_workdir(workdir, config)
    teacher = load(config, workdir)
    pool = open_pool(config, workdir, teacher).read_all()
    students = {'student': distil(config, workdir, teacher, pool['images'], pool['labels'], 'student')}
    for control in DATA_FREE_CONTROLS:
        if control in config.distillation.controls:
            images = control_pool(config, workdir, teacher, control).read_all()
            students[control] = distil(config, workdir, teacher, images['images'], images['labels'], control)

    data = load_real(config.data.name, config.data.validation)
    if 'real' in config.distillation.controls:
        students['real'] = distil(config, workdir, teacher, data.train.images, data.train.labels, 'real')
    scores = {name: test_accuracy(student, data) for name, student in students.items()}
    student = students['student']
    return {
        'test_accuracy': scores['student'],
        **{f'{control}_test_accuracy': scores.get(control) for control in (*DATA_FREE_CONTROLS, 'real')},
        'parameters': student.parameters,
        'parameters_ratio': student.parameters / teacher.parameters,
        'flops': flops(student),
        'images': len(pool['labels']),
        'updates': config.distillation.updates,
    }


def complete(config, workdir: Workdir) -> bool:
    """Whether the student of the finished task is still there: a damaged network file is deleted by its owner."""
    return workdir.network('student').exists()


def distil(config, workdir: Workdir, teacher: Teacher, images: np.ndarray, labels: np.ndarray, name: str) -> Classifier:
    """A student taught by `teacher` on `images` uint8 [N, H, W, C]; all that are compared start and shuffle alike."""
    loss = distillation_loss(teacher, config.distillation.temperature)
    lesson = Lesson(recipe_of(config.distillation), loss, images, labels, teacher.variables)
    return learn(config, workdir, 'distillation', name, config.student, lesson, teacher, ROLE)


def control_pool(config, workdir: Workdir, teacher: Teacher, method: str) -> ImagePool:
    """Images by a lesser method, from the same noise and with the same budget as the pool's."""
    pool = ImagePool(workdir.path / 'controls' / method, teacher.digest())
    fill_pool(config, workdir, teacher, pool, method, 'distillation', f'{method}_images')
    return pool


def distillation_loss(teacher: Teacher, temperature: float):
    """T^2 KL(teacher || student) at temperature T, both on the augmented view, as a loss for `training.fit`.

    T^2 keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531, section 2).
    """

    def loss(logits, x, labels, teacher_variables):
        teacher_logits = teacher.apply_fn(teacher_variables, x)
        targets, answers = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (teacher_logits, logits))
        divergence = jnp.sum(jnp.exp(targets) * (targets - answers), -1)
        return temperature**2 * divergence.mean()

    return loss
