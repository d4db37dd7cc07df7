"""python -m dvinv.moments --config configs/FILE.py --out moments.safetensors [--images 100] [--layers LayerNorm,Block*]

Records the moments of a network's layers on its training images, for networks without BatchNorm. Run it where the images
are, and invert the network anywhere with --config.teacher.moments=moments.safetensors. The file contains no image. The
network is that of teacher.weights or teacher.factory, or one that a run has trained in --workdir.
"""

import contextlib
from pathlib import Path

from absl import flags, logging

from dvinv import main as program
from dvinv.errors import DvinvError

_OUT = flags.DEFINE_string('out', '', 'The file to write.', allow_override=True)
_IMAGES = flags.DEFINE_integer('images', 100, 'Training images to record from, equally many per class.', allow_override=True)
_LAYERS = flags.DEFINE_list(
    'layers',
    [],
    "Paths or classes of layers, with * for any characters; their inputs, or their outputs with ':output' appended. "
    'Default: the inputs of all normalisations and the outputs of all residual blocks.',
    allow_override=True,
)


def _parse(argv: list[str]) -> list[str]:
    arguments = program.parse_flags(argv)  # that module defines --config and --workdir
    if not _OUT.value:
        raise DvinvError('--out is missing; name the file for the moments, moments.safetensors for instance.')
    if not Path(_OUT.value).absolute().parent.is_dir():
        raise DvinvError(f'--out is {_OUT.value!r}, but there is no such folder.')
    return arguments


def main(_) -> None:
    """Records the moments that the flags ask for, and prints a summary."""
    logging.set_verbosity(logging.FATAL)
    print(record(flags.FLAGS.config, flags.FLAGS.workdir, _OUT.value, _IMAGES.value, _LAYERS.value))


def record(config, workdir: str | None, out: str, images: int = 100, layers=()) -> str:
    """Records moments of the teacher of a config to the file `out`; returns a sentence that summarises them.

    Args:
      config: the config.
      workdir: the path of the run that has trained the teacher, if the config names no weights.
      out: the path of the file to write.
      images: the number of training images to record from.
      layers: paths or classes of layers, as for the flag --layers; empty for the default.

    Raises:
      DvinvError: there is no teacher, or there are no training images, or see `record_moments`.
    """
    from dvinv.config import parse  # imported late, so that a mistyped flag is reported at once
    from dvinv.pipeline.run import Run
    from dvinv.teacher import task as teacher

    run = Run(parse(config), workdir or '')
    with contextlib.ExitStack() as stack:
        if run.is_trained_here('teacher'):
            if not run.is_finished('teacher'):
                raise DvinvError(
                    'The config names no weights of a teacher, and --workdir has no trained teacher; give teacher.weights, '
                    'or as --workdir the folder of a run that has trained it.'
                )
            stack.enter_context(contextlib.closing(run.open_workdir()))
        moments = teacher.record(run, images, layers)
    moments.save(out)
    views = f', each augmented {moments.views} times as in its training' if moments.views else ''
    return f'{out}: the moments of {len(moments.layers)} layers, over {moments.images} training images{views}.'


if __name__ == '__main__':
    program.cli(main, _parse)
