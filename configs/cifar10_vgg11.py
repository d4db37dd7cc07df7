"""The paper's VGG-11 on CIFAR-10: taught to a VGG-11 from scratch by Adaptive DeepInversion. For a GPU.

    python -m dvinv.main --config configs/cifar10_vgg11.py --workdir runs/cifar10_vgg11

All but the networks is as in `cifar10_resnet34.py`: data, budget, flags for weights and arrays of your own. The paper:
teacher 92.34, student 90.78 (256,000 images; 84.16 without the student's competition). Not measured on a GPU yet. `:smoke`
shrinks the run to seconds.
"""

import runpy
from pathlib import Path

import ml_collections

resnet34 = runpy.run_path(str(Path(__file__).with_name('cifar10_resnet34.py')))['get_config']


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    """The config; `arg` is '' or 'smoke'."""
    config = resnet34(arg)
    config.teacher.network = config.student.network = 'vgg11_bn'
    config.verifier.network = 'cifar_resnet18'
    return config
