import ml_collections

from dvinv.configuration import base_config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    config = base_config('cifar10_crop')
    config.data.name = 'cifar10'
    config.teacher.update(network='resnet20', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.teacher.training.update(shift=4, flip=True)
    config.verifier.network = 'resnet32'
    config.student.network = 'resnet20'
    config.distillation.update(optimiser='sgd', learning_rate=0.1, shift=4, flip=True, weight_decay=5e-4)
    return config
