"""Published CIFAR-10 ResNets teach students of other depths and families, without data. For a laptop; a GPU for `:answers`.

    python -m dvinv.main --config configs/cifar10_students.py --workdir runs/cifar10_students \\
      --config.teacher.weights=resnet32.th --config.verifier.weights=resnet20.th

is a ResNet-20 of a ResNet-32 (`:resnet20` says the same). The others learn from a ResNet-20, so give them its weights and
those of the ResNet-32 to the verifier: `:resnet8`, `:wrn16_1` (pre-activation), `:vgg` (`cifar_vgg`, no shortcut),
`:mobilenet` (`cifar_mobilenet`, depthwise), and `:answers`, a ResNet-20 that is given the teacher's answers alone. Weights
and data as in `cifar10_resnet20.py`.

20 batches of 256 images, 20 iterations each (the preset `cifar10_fast`), and then the student: it is compared with the
teacher at the end of each stage (`distillation.hints`), the last values of 32x32, 16x16 and 8x8 pixels, and for half of the
images at first a stage receives the teacher's output of the previous one (`distillation.graft`). Where the two are of one
family, the student starts from the teacher's weights (`student.inherit`). A ResNet-8 is too small to follow the teacher:
the weight of its hints falls over the training (`distillation.hint_decay`), and its images, of 40 iterations, are made in
competition with it. `:answers` is for a GPU: 51,200 images by Adaptive DeepInversion, 1 million augmented views of them,
and the curve of accuracy against the views (`distillation.curve_points`).

On 1,000 real test images, three seeds each: `:resnet20` .907 +- .007 (the ResNet-32 .928); of the ResNet-20 (.915)
`:wrn16_1` .869 +- .009, `:vgg` .827 +- .003, `:mobilenet` .810 +- .005; on one CPU core 7 minutes for the images and 9 to
20 for the student. `:resnet8` .769 +- .011 (on an H100; .807 from 4,000 real images, one seed), 34 minutes in all on one
core. `:answers` .890 +- .003 (.876 from 4,000 real images, one seed), 3.4 minutes on an H100 beside three other runs.
docs/experiments.md says how the settings were chosen. `:smoke` shrinks the run to seconds.
"""

from typing import NamedTuple

import ml_collections

from dvinv.config import default_config, shrink


class Student(NamedTuple):
    """What differs from student to student."""

    network: str
    updates: int
    hint: float = 100.0  # weight of the hints
    hint_decay: float = 0.0  # power by which it falls to 0; for networks that are too small to follow the teacher's stages
    inherit: bool = False  # starts from the teacher's weights
    batches: int = 20  # of 256 images
    iterations: int = 20  # of the synthesis of each
    batches_per_round: int = 0  # made in competition with the student as it is then; 0: all are made before the training
    updates_per_round: int = 0


STUDENTS = {
    'resnet20': Student('resnet20', 8_000, inherit=True),
    'resnet8': Student(
        'resnet8', 20_000, hint_decay=2.0, inherit=True, iterations=40, batches_per_round=1, updates_per_round=500
    ),
    'wrn16_1': Student('wrn16_1', 8_000),
    'vgg': Student('cifar_vgg', 8_000),
    'mobilenet': Student('cifar_mobilenet', 8_000),
    'answers': Student('resnet20', 4_000, hint=0.0, batches=200, iterations=40, batches_per_round=10, updates_per_round=150),
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '', 'smoke' or one of `STUDENTS`."""
    if arg not in ('', 'smoke', *STUDENTS):
        raise ValueError(f'This config knows the arguments {", ".join(STUDENTS)} and smoke, not {arg!r}')
    config = default_config('cifar10_fast')
    student = STUDENTS.get(arg, STUDENTS['resnet20'])
    teacher, verifier = ('resnet32', 'resnet20') if arg in ('', 'smoke', 'resnet20') else ('resnet20', 'resnet32')
    sgd = {'optimizer': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'shift': 4, 'flip': True}
    config.data.name = 'cifar10'
    config.teacher.update(network=teacher, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.verifier.network = verifier
    for group in (config.teacher.training, config.verifier.training):  # where no weights are given: 200 epochs
        group.update(updates=78_000, warmup=1000, **sgd)
    config.student.update(network=student.network, inherit=student.inherit)
    config.synthesis.update(images=256 * student.batches, batches_per_round=student.batches_per_round)
    if student.batches_per_round:
        config.synthesis.method = 'adaptive'
    config.synthesis.stages[0].iterations = student.iterations
    config.distillation.update(batch_size=16, warmup=100, clip_norm=30.0, color_jitter=0.2, cutmix=0.5, controls=(), **sgd)
    config.distillation.update(updates=student.updates, updates_per_round=student.updates_per_round)
    config.distillation.update(hint=student.hint, hint_decay=student.hint_decay)
    config.logging.update(every=100, checkpoint_every=500)
    if arg == 'answers':  # 1 million images seen
        config.distillation.update(batch_size=256, warmup=200, curve_points=10)
    if arg == 'smoke':
        shrink(config)
    return config
