"""Stage 'imagenet' of gpu.py: finished batches of a published MobileNetV1, and what 215,000 images would take.

Two batches of 84 by the published multi-resolution schedule, in bfloat16, through `python -m dvinv.main`, judged by a
SqueezeNet 1.1. The first batch compiles; the time between the two is that of a batch. For ResNet-50 the time follows from
its steps at 112 and 224 px, as the stage 'inversion' measured them.
"""

import json
import time
from pathlib import Path

import numpy as np
from gpu_report import Item, read_json
from gpu_runs import ENDED, Run, end_all

from dvinv.runtime.errors import DvinvError

CONFIG, BATCH, BATCHES = 'configs/imagenet_mobilenet_v1.py', 84, 2
TEACHER, VERIFIER = 'imagenet_mobilenet_v1_075_224.npz', 'imagenet_squeezenet1.1.npz'
IMAGES, PAPER_HOURS = 215_000, 2800  # the paper's set, and the V100 hours that it took
ITERATIONS = {'resnet50_112': 2000, 'resnet50_224': 1000}  # items of the stage 'inversion': iterations at this size
GRID_COLUMNS = 12
# A rehearsal has the config's argument `smoke`, and networks that compile in seconds.
REHEARSED = (
    '--config.data.image_size=0',
    '--config.teacher.network=small_resnet',
    '--config.teacher.width=0.25',
    '--config.verifier.network=small_convnet',
    '--config.synthesis.stages[0].resolution=8',
    '--config.synthesis.stages[1].resolution=8',
)


def items(stage: str, rehearse: bool) -> dict[str, Item]:
    """Returns what the stage measures."""
    batch = (
        'network',
        'images',
        'iterations',
        'seconds_per_image',  # of the second batch, which compiles nothing
        'gpu_hours_of_215000',
        'paper_v100_hours_over_it',
        'teacher_accuracy_of_images',
        'verifier_accuracy_of_images',
        'verifier_top5_accuracy_of_images',
        'feature_loss_first',
        'feature_loss_last',
        'synthesis_minutes',
        'minutes_with_start',
    )
    steps = (
        'step_seconds_112',
        'step_seconds_224',
        'seconds_per_image',
        'gpu_hours_of_215000',
        'paper_v100_hours_over_it',
    )
    return {
        'mobilenet_v1_batch': Item(1, 5 if rehearse else 60, dict.fromkeys(batch)),
        'resnet50_by_steps': Item(1, 0, dict.fromkeys(steps)),
    }


def measure(names: list[str], context) -> None:
    """Measures these items."""
    context.in_order(names, lambda name: _batch(name, context) if name == 'mobilenet_v1_batch' else _by_steps(name, context))


def _batch(name: str, context) -> None:
    workdir = Path(context.settings.workdir) / context.stage
    run = Run(workdir, flags_of(context))
    try:
        while run.status is None and context.remaining():
            time.sleep(0.1)
    finally:
        end_all([run])
    if run.status in ENDED:
        raise DvinvError('ended when its time was over')
    if run.status:
        raise DvinvError(run.explain())
    made, config, shards = run.results['synthesis'], run.config, sorted((workdir / 'pool').glob('shard-*.npz'))
    seconds = (shards[1].stat().st_mtime - shards[0].stat().st_mtime) / config['synthesis']['batch_size']
    figures = {
        'network': config['teacher']['network'],
        **{field: made[field] for field in ('images', 'iterations', 'feature_loss_first', 'feature_loss_last')},
        **_extrapolated(seconds),
        **{
            f'{judge}_of_images': made[judge]
            for judge in ('teacher_accuracy', 'verifier_accuracy', 'verifier_top5_accuracy')
        },
        'synthesis_minutes': made['wall_seconds'] / 60,
        'minutes_with_start': run.seconds / 60,
    }
    context.report.record(name, figures)
    write_grid(shards[0], Path(context.settings.out) / 'imagenet.jpg')


def _by_steps(name: str, context) -> None:
    measured = read_json(Path(context.settings.out) / 'inversion.json').get('items', {})
    seconds = {
        item: measured.get(item, {}).get('figures', {}).get('dvinv_bfloat16', {}).get('seconds_per_step')
        for item in ITERATIONS
    }
    context.report.record(name, {f'step_{item.replace("resnet50", "seconds")}': value for item, value in seconds.items()})
    if None in seconds.values():
        raise DvinvError("the stage 'inversion' has not measured these steps yet")
    total = sum(ITERATIONS[item] * value for item, value in seconds.items())
    context.report.record(name, _extrapolated(total / BATCH))


def _extrapolated(seconds: float) -> dict:
    """Returns the figures that follow from the seconds that an image takes."""
    hours = seconds * IMAGES / 3600
    return {'seconds_per_image': seconds, 'gpu_hours_of_215000': hours, 'paper_v100_hours_over_it': PAPER_HOURS / hours}


def flags_of(context) -> list[str]:
    """Returns the flags of the run, without its work directory."""
    settings, data = context.settings, Path(context.settings.data)
    flags = [
        "--config.tasks=('teacher', 'synthesis')",
        '--config.synthesis.controls=()',
        '--config.bn_stats=device',
        '--config.devices=1',
    ]
    if settings.rehearse:
        return ['--config', f'{CONFIG}:smoke', *flags, *REHEARSED]
    classes = tuple(sorted(np.random.default_rng(0).permutation(1000)[:BATCH].tolist()))
    return [
        *('--config', CONFIG, *flags),
        '--config.teacher.width=0.75',
        f'--config.teacher.weights={data / TEACHER}',
        f'--config.verifier.weights={data / VERIFIER}',
        '--config.synthesis.precision=bfloat16',
        f'--config.synthesis.images={BATCHES * BATCH}',
        f'--config.synthesis.batch_size={BATCH}',
        f'--config.synthesis.classes={json.dumps(classes).replace("[", "(").replace("]", ")")}',
    ]


def write_grid(shard: Path, path: Path) -> None:
    """Writes the images of a shard as one JPEG picture, in rows of GRID_COLUMNS."""
    from PIL import Image

    with np.load(shard, allow_pickle=False) as arrays:
        images = arrays['images']
    count, height, width, channels = images.shape
    rows = -(-count // GRID_COLUMNS)
    grid = np.zeros((rows * GRID_COLUMNS, height, width, channels), np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, GRID_COLUMNS, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, GRID_COLUMNS * width, channels)
    Image.fromarray(grid[:, :, 0] if channels == 1 else grid).save(path, quality=85)
