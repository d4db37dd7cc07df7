"""Adaptive DeepInversion while pruning: every step synthesizes images in competition with the network just pruned.

On these images the pruned network disagrees with the unpruned one (arXiv 1912.08795, sections 3.3 and 4.3).
"""

import dataclasses

from dvinv.data.pool import ImagePool
from dvinv.networks import apply_fn_of
from dvinv.pipeline.run import Run
from dvinv.synthesis.pools import missing_batches
from dvinv.synthesis.synthesizer import Synthesizer
from dvinv.training.targets import TrainTarget, seed_of


def run_of_step(run: Run, role: int, step: int) -> Run:
    """Returns the run with the synthesis settings of a step: its number of batches, and a seed of its own.

    Args:
      role: see `training.targets.TrainTarget`.
    """
    count, synthesis = run.settings.pruning.adaptive_batches, run.settings.synthesis
    images = count * synthesis.batch_size
    synthesis = dataclasses.replace(synthesis, method='adaptive', images=images, batches_per_round=count)
    return run.with_synthesis(synthesis, seed_of(run, role, step))


def images_against(run: Run, target: TrainTarget) -> ImagePool:
    """Synthesizes the pool of a step from the unpruned teacher, in competition with the network just pruned.

    Args:
      target: the pruned network before fine-tuning.

    Returns:
      The finished pool.
    """
    run, name = run_of_step(run, target.role, target.part), f'pruned_{target.part}'
    pool = ImagePool(run.workdir.path / 'pools' / name, run.teacher.digest(), quarantine=True)
    if missing := missing_batches(run.settings.synthesis, pool):
        student_fn, series = apply_fn_of(target.module), f'images_{name}'
        with Synthesizer(run, run.teacher, pool, 'adaptive', 'pruning', series, student_fn=student_fn) as synthesizer:
            synthesizer.fill(missing, target.start, step=target.part)
    return pool
