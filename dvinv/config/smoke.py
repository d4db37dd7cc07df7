"""The argument `smoke` of every config file: shrinks a config to a run of seconds."""

import ml_collections

from dvinv.config.parsing import default_config
from dvinv.config.presets import preset_for


def shrink(config: ml_collections.ConfigDict, width: float = 0.25) -> None:
    """Shrinks a config to seconds instead of minutes, without a download; the figures of such a run have no meaning.

    Every part still runs. Enlarged digits replace other data sets, but for a network of the user's own (teacher.factory),
    which may take only images of one shape: its config keeps its data, or none.

    Args:
      config: changed in place.
      width: factor of the number of channels of all networks.
    """
    if config.data.name != 'digits' and not config.teacher.factory:
        config.data.update(name='digits', image_size=32)
        config.teacher.mean, config.teacher.std = (0.3053,), (0.3761,)
    config.teacher.width, config.verifier.width = width, width
    config.teacher.moments_images = min(config.teacher.moments_images, 20)
    config.verifiers = ()
    config.student.width = width if config.distillation.hint else width / 2  # hints of layers need equal shapes
    trainings = (config.teacher.training, config.verifier.training, config.quantization.training)
    for group in (*trainings, config.distillation, config.pruning, config.continual):
        group.update(updates=20, batch_size=32, warmup=2, precision='float32')
    config.pruning.update(steps=2, updates_per_step=10, importance_batches=2, latency_batch=2)
    if config.continual.steps:
        config.data.classes = (0, 1, 2, 3)
        config.continual.steps = ({'classes': (4, 5, 6)}, {'classes': (7, 8, 9)})[: len(config.continual.steps)]
    config.bn_stats = 'device'  # since a batch of 20 images cannot be split over any number of devices
    config.synthesis.update(images=40, batch_size=20, classes=(), precision='float32')
    if config.synthesis.stages is None:
        config.synthesis.stages = default_config(preset_for((8, 8, 1))).synthesis.stages
    largest = max(stage.resolution for stage in config.synthesis.stages)
    for stage in config.synthesis.stages:
        resolution = stage.resolution and stage.resolution * config.data.image_size // largest
        stage.update(iterations=5, warmup=0, resolution=resolution, jitter=min(stage.jitter, 2))
    if config.synthesis.batches_per_round:
        config.synthesis.batches_per_round, config.distillation.updates_per_round = 1, 10
    if config.distillation.counts:
        config.distillation.counts = (20, 40)
    config.logging.update(every=5, checkpoint_every=10, iterations=2)
