"""A student that starts from weights of its teacher."""

import jax
import numpy as np
import pytest
from tiny import IMAGE_SHAPE, TinyNet, trained_variables

from dvinv import DvinvError
from dvinv.config import default_config, parse
from dvinv.distillation.student import student_of
from dvinv.inversion import from_linen
from dvinv.networks import create, shapes_of
from dvinv.networks.classifier import flatten
from dvinv.networks.naming import inherited
from dvinv.pipeline.run import Run
from dvinv.training.step import initial_variables


def _inherited(teacher, student, width=1.0):
    shape = (32, 32, 3)
    variables = trained_variables(create(teacher, 10), shape)
    return variables, inherited(variables, shapes_of(create(student, 10, width), shape))


def test_blocks_are_spread_over_a_deeper_teacher():
    teacher, found = _inherited('resnet32', 'resnet20')
    assert flatten(found).keys() == flatten(shapes_of(create('resnet20', 10), (32, 32, 3))).keys()
    for stage in (1, 2, 3):
        for block, of_teacher in enumerate((0, 2, 4)):
            own, other = (
                group[f'layer{stage}_{number}']['conv2']['kernel']
                for group, number in ((found['params'], block), (teacher['params'], of_teacher))
            )
            np.testing.assert_array_equal(own, other)
    for layer in ('conv1', 'linear'):
        np.testing.assert_array_equal(found['params'][layer]['kernel'], teacher['params'][layer]['kernel'])
    np.testing.assert_array_equal(found['batch_stats']['bn1']['var'], teacher['batch_stats']['bn1']['var'])


@pytest.mark.parametrize(('depth', 'blocks'), [(44, (0, 3, 6)), (56, (0, 4, 8))])
def test_a_resnet20_starts_whole_from_much_deeper_teachers(depth, blocks):
    shape = (32, 32, 3)
    teacher, student = (shapes_of(create(name, 10), shape) for name in (f'resnet{depth}', 'resnet20'))
    numbers = iter(range(10_000))
    teacher = jax.tree.map(lambda leaf: np.full(leaf.shape, next(numbers)), teacher)
    found = inherited(teacher, student)
    assert flatten(found).keys() == flatten(student).keys()
    for stage in (1, 2, 3):
        for own, other in enumerate(blocks):
            pair = found['batch_stats'][f'layer{stage}_{own}'], teacher['batch_stats'][f'layer{stage}_{other}']
            jax.tree.map(np.testing.assert_array_equal, *pair)


def test_layers_of_another_shape_are_left_out_whole():
    _, found = _inherited('resnet20', 'wrn16_1')
    shapes = flatten(shapes_of(create('wrn16_1', 10), (32, 32, 3)))
    assert found['params']['conv1']['kernel'].shape == (3, 3, 3, 16)
    assert all(leaf.shape == shapes[path].shape for path, leaf in flatten(found).items())
    _, narrower = _inherited('resnet20', 'resnet20', width=0.5)
    assert narrower == {}


def test_what_is_not_inherited_is_drawn():
    teacher = trained_variables(TinyNet(channels=(4, 7)))
    start = inherited(teacher, shapes_of(TinyNet(), IMAGE_SHAPE))
    assert {*start['params']} == {'Conv_0', 'BatchNorm_0'}
    key = jax.random.key(0)
    first = initial_variables(TinyNet(), key, IMAGE_SHAPE, start)
    drawn = initial_variables(TinyNet(), key, IMAGE_SHAPE, None)
    for path, leaf in flatten(first).items():
        expected = flatten(start).get(path)
        np.testing.assert_array_equal(leaf, flatten(drawn)[path] if expected is None else expected)


def test_a_student_that_nothing_fits_is_refused():
    config = default_config('digits')
    config.student.update(network='small_convnet', width=0.25, inherit=True)
    module = create('small_resnet', 10)
    variables = trained_variables(module, (8, 8, 1))
    teacher = from_linen(module, variables, image_shape=(8, 8, 1), mean=(0.5,), std=(0.5,))
    with pytest.raises(DvinvError, match=r'student\.inherit is True, but no layer of the student'):
        student_of(Run(parse(config)), teacher)
