"""Adaptive DeepInversion while pruning: in every step images are made in competition with the network just pruned.

They show where it has come to disagree with the whole one (arXiv 1912.08795, sections 3.3 and 4.3).
"""

import ml_collections
import numpy as np

from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.inversion import Teacher
from dvinv.networks import apply_fn_of
from dvinv.pools import missing_batches
from dvinv.runtime.workdir import Workdir
from dvinv.synthesizer import Synthesizer
from dvinv.training import Learner


def check(config) -> None:
    """Refuse a number of batches that cannot be made in competition.

    Raises:
      DvinvError: names the field and its value.
    """
    batches, weight = config.pruning.adaptive_batches, config.synthesis.weights.competition
    if batches < 0:
        raise DvinvError(f'pruning.adaptive_batches is {batches}; it must be at least 0.')
    if batches and not weight > 0:
        raise DvinvError(
            f'pruning.adaptive_batches is {batches}, but synthesis.weights.competition is {weight}; give it a weight above '
            '0, or no batches.'
        )


def config_of_step(config, role: int, step: int) -> ml_collections.ConfigDict:
    """The config that the batches of a step are made by: so many, from noise of its own; `role`: see `training.Learner`."""
    count, config = config.pruning.adaptive_batches, config.copy_and_resolve_references()
    config.synthesis.update(method='adaptive', images=count * config.synthesis.batch_size, batches_per_round=count)
    config.seed = int(np.random.SeedSequence([16 * config.seed + role, step]).generate_state(1)[0])
    return config


def images_against(config, workdir: Workdir, teacher: Teacher, learner: Learner) -> ImagePool:
    """The finished pool of a step, from the whole `teacher`, against the network just pruned: `learner`, at its start."""
    config, name = config_of_step(config, learner.role, learner.part), f'pruned_{learner.part}'
    pool = ImagePool(workdir.path / 'pools' / name, teacher.digest(), ours=True)
    if missing := missing_batches(config, pool):
        student_fn = apply_fn_of(learner.module)
        with Synthesizer(
            config, workdir, teacher, pool, 'adaptive', 'pruning', f'images_{name}', student_fn=student_fn
        ) as synthesizer:
            synthesizer.fill(missing, learner.start, step=learner.part)
    return pool
