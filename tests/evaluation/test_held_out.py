"""Scores without data: what is held out of a pool, that nobody learns from it, and how networks are compared on it."""

import contextlib
import json

import numpy as np
import pytest
from smoke import smoke_config
from tiny import IMAGE_SHAPE, tiny_teacher

from dvinv import DvinvError
from dvinv.config import nested, parse
from dvinv.data.pool import ImagePool
from dvinv.evaluation import HeldOut, training_rows
from dvinv.runtime.workdir import Workdir
from dvinv.training.step import chosen_images, rounds_of


def free(**changes):
    """The smoke config without real data: two batches of 20 images."""
    return smoke_config(**{'data__name': '', 'held_out': 0.1, **changes})


@pytest.fixture
def pool(tmp_path):
    """Two batches of 20 images of three classes."""
    pool, rng = ImagePool(tmp_path / 'pool', ''), np.random.default_rng(0)
    for number in range(2):
        labels = (np.arange(20) + 20 * number) % 3
        pool.write(number, rng.integers(0, 256, (20, *IMAGE_SHAPE), np.uint8), labels, np.zeros((20, 3)), {})
    return pool


@pytest.mark.parametrize(
    ('changes', 'size', 'held'),
    [
        ({}, 40, [36, 37, 38, 39]),
        ({'synthesis__batches_per_round': 1, 'distillation__updates_per_round': 4}, 20, [18, 19, 38, 39]),
        ({'pool': '.'}, 40, [36, 37, 38, 39]),
        ({'data__name': 'digits'}, 40, []),
        ({'held_out': 0.0}, 40, []),
        ({'held_out': 0.02}, 40, []),  # less than an image
    ],
)
def test_nobody_learns_from_the_last_images_of_a_round(changes, size, held):
    config = free()
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    settings = parse(config)
    assert settings.pool or settings.round_images == size
    learned = training_rows(settings, np.arange(40)[:, None])
    assert sorted({*range(40)} - {*learned[np.arange(len(learned))].ravel().tolist()}) == held
    if not config.pool:  # which comes in one round
        rounds = rounds_of(settings)
        assert rounds.images * rounds.count == len(learned)
        assert max(chosen_images(0, update, 8, rounds).max() for update in range(20)) < len(learned)


def test_networks_are_compared_with_the_teacher_class_by_class(pool):
    teacher, other = tiny_teacher(), tiny_teacher(seed=1, channels=(3,))
    held_out = HeldOut(parse(free()), teacher, pool)
    figures = held_out.beside({'student': teacher, 'noise': other}, 'student')
    assert figures['held_out_images'] == 4
    assert (figures['held_out_agreement'], figures['held_out_class_agreement']) == (1.0, [1.0] * 3)
    assert figures['held_out_kl'] == pytest.approx(0, abs=1e-6)
    assert figures['noise_held_out_kl'] > 0.01
    assert json.dumps(figures)
    config = free(held_out=0.05)  # two images, of two classes
    assert HeldOut(parse(config), teacher, pool).figures(teacher)['held_out_class_agreement'].count(None) == 1
    config.data.name = 'digits'
    assert HeldOut(parse(config), teacher, pool).beside({'student': teacher}, 'student') == {}


@pytest.mark.parametrize('share', [-0.1, 0.6])
def test_a_share_that_leaves_too_little_is_refused(share):
    with pytest.raises(DvinvError, match=f'held_out is {share}; it is a fraction of the pool, from 0 to 0.5'):
        parse(free(held_out=share))


def test_no_more_images_are_counted_than_are_learned_from():
    parse(free(distillation__counts=(36,)))
    with pytest.raises(DvinvError, match='names 37; give whole numbers from 1 to 36, the number'):
        parse(free(distillation__counts=(37,)))


def test_a_run_of_before_goes_on_as_it_was(tmp_path):
    """Its config has no held_out: with real data that changes nothing, without it is 0."""
    for name, config, words in (('digits', smoke_config(), ''), ('', free(held_out=0.0), ''), ('', free(), 'held_out')):
        old = nested(parse(config))
        del old['held_out'], old['student']['factory']
        folder = tmp_path / (name or 'free')
        folder.mkdir(exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(old))
        (folder / 'results.json').write_text('{}')
        if words:
            with pytest.raises(DvinvError, match='another config: held_out'):
                Workdir(folder, parse(config))
        else:
            with contextlib.closing(Workdir(folder, parse(config))):
                pass
